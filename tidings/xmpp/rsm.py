"""XEP-0059: Result Set Management: which page of a long list is wanted, and which one was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.stanza import escape_text, quoteattr

if TYPE_CHECKING:
    from lxml.etree import _Element as Tree

SET = f"{{{ns.RSM}}}set"

# Digits of a number: a longer one is no number of items, and costs more the longer it is.
MAX_DIGITS = 18


@dataclass(frozen=True, slots=True)
class PageRequest:
    """What a <set/> asks for. None: it does not say."""

    # Items at most; 0 asks for their count only (2.7).
    max: int | None = None
    # The page behind the item of this id (2.2).
    after: str | None = None
    # The page before the item of this id (2.3); "" asks for the last page (2.5).
    before: str | None = None
    # The page that begins with the item at this place (2.6).
    index: int | None = None


def parse(wrapper: Tree) -> PageRequest:
    """What the <set/> within a request's payload asks for; nothing where there is none. Raises StanzaError."""
    wanted = wrapper.find(SET)
    if wanted is None:
        return PageRequest()
    return PageRequest(
        max=_number(wanted, "max"),
        # 2.2: without an id it is the page behind nothing, the first.
        after=_text(wanted, "after") or None,
        before=_text(wanted, "before"),
        index=_number(wanted, "index"),
    )


def result(first: str = "", last: str = "", *, index: int | None = None, count: int | None = None) -> str:
    """The <set/> of an answer. `first` and `last`: the ids of the page's outer items, '' when it is empty (2.2)."""
    place = "" if index is None else f" index={quoteattr(str(index))}"
    outer = f"<first{place}>{escape_text(first)}</first><last>{escape_text(last)}</last>" if first else ""
    total = "" if count is None else f"<count>{count}</count>"
    return f"<set xmlns='{ns.RSM}'>{outer}{total}</set>"


def _text(wanted: Tree, name: str) -> str | None:
    child = wanted.find(f"{{{ns.RSM}}}{name}")
    return None if child is None else (child.text or "").strip()


def _number(wanted: Tree, name: str) -> int | None:
    text = _text(wanted, name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > MAX_DIGITS:
        raise StanzaError("bad-request", f"<{name}/> is a number")
    return int(text)
