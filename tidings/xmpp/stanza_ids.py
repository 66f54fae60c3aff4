"""XEP-0359: the ids that archives give to messages, put into their bytes and taken out of them.

Both work on one self-contained <message/>, and leave every other byte as it came.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from pyexpat import ParserCreate

from tidings.xmpp import ns
from tidings.xmpp.jid import Jid, JidError
from tidings.xmpp.stanza import START_TAG, append, escape_text, quoteattr

# Among the names of a stanza's children: there may be something to remove.
STANZA_ID = f"{{{ns.STANZA_ID}}}stanza-id"
_EXPAT_NAME = f"{ns.STANZA_ID} stanza-id"

# Accounts whose address is kept in quotes: those whose messages are on their way now.
CACHED = 16_384

# What does not stand in single quotes as it is.
_TO_ESCAPE = re.compile(r"[^ -%(-;=?-~]").search
_ESCAPES = {"'": "&apos;", "\t": "&#9;", "\n": "&#10;", "\r": "&#13;"}


def add(raw: bytes, by: str, id: str) -> bytes:
    """Puts <stanza-id/> into a message, as its last child: the archive `by` knows it as `id`.

    One by the same archive must not be in it before (section 3, rule 4): see `remove_forged`.
    """
    value = id.encode() if _TO_ESCAPE(id) is None else escape_text(id, _ESCAPES).encode()
    return append(raw, b"%b%b'/>" % (_opened(by), value))


@lru_cache(maxsize=CACHED)
def _opened(by: str) -> bytes:
    return f"<stanza-id xmlns='{ns.STANZA_ID}' by={quoteattr(by)} id='".encode()


def remove_forged(raw: bytes, by: Collection[str]) -> bytes:
    """Takes out every <stanza-id/> that says it is by one of these archives (prepared JIDs): section 3, rule 2.

    Ids by others stay (rule 3), and so do those within other elements: they belong to a message that is quoted. Call
    it for messages that have a child `STANZA_ID`.
    """
    found: list[tuple[int, int]] = []
    depth = 0
    start = -1

    def started(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, start
        if depth == 1 and name == _EXPAT_NAME and _is_by(attributes.get("by", ""), by):
            start = expat.CurrentByteIndex
        depth += 1

    def ended(_name: str) -> None:
        nonlocal depth, start
        depth -= 1
        if depth == 1 and start >= 0:
            tag = START_TAG.match(raw, start)
            assert tag is not None
            if tag.group().endswith(b"/>"):
                end = tag.end()
            else:
                # expat stands before the end tag.
                end = raw.index(b">", expat.CurrentByteIndex) + 1
            found.append((start, end))
            start = -1

    expat = ParserCreate("utf-8", " ")
    expat.StartElementHandler = started
    expat.EndElementHandler = ended
    expat.Parse(raw, True)
    # The handlers hold expat, which holds them.
    expat.StartElementHandler = expat.EndElementHandler = None
    for start, end in reversed(found):
        raw = raw[:start] + raw[end:]
    return raw


def _is_by(text: str, archives: Collection[str]) -> bool:
    """Rule 7: addresses are compared as prepared."""
    try:
        return str(Jid.parse(text)) in archives
    except JidError:
        return False
