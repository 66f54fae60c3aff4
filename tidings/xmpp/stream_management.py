"""XEP-0198: Stream Management. What of a session is acknowledged, in both directions. Pure.

`Inbound` counts what the client sends, `Outbound` what it gets. Both outlive a stream: they belong to the session.
A stanza of the client is *safe* when nothing that may die can lose it any more; only then is it in `h` (4). Until
then it is kept, so that a repetition after resumption (5) is known as such and keeps its number.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError, StreamError
from tidings.xmpp.stanza import quoteattr, to_tree

if TYPE_CHECKING:
    from lxml.etree import _Element as Tree

T = TypeVar("T")

# 4: h goes round to zero behind 2^32 - 1.
MODULUS = 1 << 32

ENABLE = f"{{{ns.SM}}}enable"
RESUME = f"{{{ns.SM}}}resume"
REQUEST = f"{{{ns.SM}}}r"
ACK = f"{{{ns.SM}}}a"

FEATURE = f"<sm xmlns='{ns.SM}'/>".encode()
REQUEST_RAW = f"<r xmlns='{ns.SM}'/>".encode()

# Most sessions of most servers have nothing under way, and an empty deque is 600 bytes: they share this one.
NOTHING: deque[Any] = deque(maxlen=0)
NONE: frozenset[int] = frozenset()

_DIGITS = re.compile(r"[0-9]{1,10}")
_DELAY = f"{{{ns.DELAY}}}delay"


# --- what comes from the client ---


class Sent(NamedTuple):
    """A stanza of the client that is not in `h` yet."""

    number: int
    kind: int
    id: str
    to: str
    raw: bytes
    # Known to be dealt with, and safe, at the router that had the session before.
    safe: bool = False


class Inbound:
    """What a session has sent.

    Each stanza gets a number, 1, 2, 3 … from bind. `expect` says that something more must happen before it is safe,
    `settle` that one of these things has; whoever takes a stanza has expected one, and settles it too.
    """

    __slots__ = (
        "_again", "_answered", "_counted", "_open", "_unknown", "before", "counts", "handled", "last", "number",
        "resumed_at", "revived",
    )  # fmt: skip

    def __init__(self) -> None:
        # The last number given.
        self.number = 0
        # By number, what has to happen yet; in rising order.
        self._open: dict[int, int] = {}
        # Those of them that the session has got its answer to: a result, or an error.
        self._answered: set[int] | frozenset[int] = NONE
        # Whether the client counts; and then: how many stanzas since <enable/> are in `h`, and those that follow,
        # in the order in which they came on the present stream.
        self.counts = False
        self.handled = 0
        self._counted: deque[Sent] = NOTHING
        # The last number given to a stanza that the client does not count; to one in `h`; and before it resumed.
        self.before = 0
        self.last = 0
        self.resumed_at = 0
        # Numbers of what the client may repeat, where it is not known whether that was dealt with; and the last of
        # these that was repeated, and is to be dealt with again.
        self._unknown: set[int] | frozenset[int] = NONE
        self.revived = 0
        # What the client may repeat since it has resumed.
        self._again: deque[Sent] = NOTHING

    def enable(self) -> None:
        """3: counting begins behind <enable/>."""
        self.counts = True
        self.before = self.last = self.number
        self._counted = deque()

    def take(self) -> int:
        """The number of a new stanza."""
        self.number = number = self.number + 1
        self._open[number] = 1
        return number

    def count(self, sent: Sent) -> None:
        """The client counts this one, if it came behind <enable/>; called behind `take` while `counts` is true."""
        if sent.number > self.before:
            self._counted.append(sent)

    def expect(self, number: int) -> None:
        """One thing more must happen before a stanza is safe; what is safe already stays it."""
        if number in self._open:
            self._open[number] += 1

    def settle(self, number: int) -> bool:
        """One of these things has happened. Whether the stanza is safe now."""
        left = self._open.get(number, 0) - 1
        if left > 0:
            self._open[number] = left
            return False
        if left < 0:
            return False
        del self._open[number]
        if self._answered:
            self._answered -= {number}
        self._advance()
        return True

    def answered(self, number: int) -> None:
        """The session gets the answer to a stanza, or an error. It is safe when all copies have that too; but who has
        it from a record of the session must not deal with the stanza a second time."""
        if number in self._open:
            self._answered = self._answered or set()
            self._answered |= {number}

    def _advance(self) -> None:
        if self.safe_through < self.before:
            return  # what came before <enable/> goes before it: a copy that is passed to another router says so too
        counted = self._counted
        while counted and counted[0].number not in self._open:
            self.last = max(self.last, counted.popleft().number)
            self.handled += 1

    @property
    def h(self) -> int:
        """4: what <a/> says."""
        return self.handled % MODULUS

    @property
    def is_behind(self) -> bool:
        """Whether something that the client has sent is not in `h`."""
        return bool(self._counted)

    @property
    def safe_through(self) -> int:
        """All numbers up to this one are safe."""
        return next(iter(self._open), self.number + 1) - 1

    def is_done(self, number: int) -> bool:
        """Whether a stanza is safe, or is as soon as a record of the session is that is made now."""
        return number not in self._open or number in self._answered

    def is_known_done(self, sent: Sent) -> bool:
        """Of what the client may repeat: whether that is known, and of all before <enable/>."""
        if sent.safe:
            return True
        known = sent.number not in self._unknown
        return known and self.is_done(sent.number) and self.safe_through >= self.before

    def unsafe(self) -> list[int]:
        return list(self._open)

    # --- what a copy elsewhere need not keep ---

    @property
    def position(self) -> int:
        """Of the stanzas that the client has sent, in the order in which they came since bind: how many went before
        the first one that is not in `h`, or not safe if it does not count."""
        return self.before + self.handled if self.counts else self.safe_through

    def place(self, number: int) -> int:
        """The position of what came with this number on the present stream, the first one being 1; 0 if it is in `h`,
        or safe if it does not count."""
        if not self.counts:
            return number if number > self.safe_through else 0
        places = enumerate(self._counted, self.position + 1)
        return next((place for place, sent in places if sent.number == number), 0)

    @property
    def passed(self) -> int:
        """The same, but for what the client does not count and is not safe yet."""
        return self.safe_through if self.counts and self.safe_through < self.before else self.position

    @property
    def last_passed(self) -> int:
        """The highest number among those that are passed."""
        return self.last if self.counts and self.passed >= self.before else self.passed

    @property
    def again_from(self) -> int:
        """The lowest number that the client may still repeat, or has repeated and is not in `h`; 0: none."""
        if not self.resumed_at:
            return 0
        kept = (sent.number for sent in (*self._again, *self._counted) if sent.number <= self.resumed_at)
        return min(kept, default=0)

    # --- resumption ---

    def resume(self) -> None:
        """5: what is not in `h` now may come again, all of it or only some, in its old order."""
        self.carry_on(self.kept())

    def carry_on(self, kept: list[Sent], doubtful: bool = False) -> None:
        """The same, with what a record of the session knows to be kept. `doubtful`: of that which is not known to be
        safe it is not known either whether it has been dealt with. What comes later is: here."""
        if doubtful:
            self._unknown = {sent.number for sent in kept if not sent.safe}
        self._again = deque(kept)
        self._counted = deque()
        self.resumed_at = self.last = self.number

    def repeated(self, kind: int, id_: str, to: str, raw: bytes) -> int:
        """The number of the stanza that this one repeats, or 0. What was sent before that one comes no more."""
        for index, sent in enumerate(self._again):
            if (sent.kind, sent.id, sent.to) == (kind, id_, to) and is_same(sent.raw, raw):
                for _ in range(index + 1):
                    self._again.popleft()
                self._counted.append(sent)
                if sent.number in self._unknown:
                    self._unknown -= {sent.number}
                    self._open[sent.number] = 1
                    self.revived = sent.number
                self._advance()
                return sent.number
        return 0

    @property
    def may_repeat(self) -> bool:
        return bool(self._again)

    def repeatable(self) -> list[Sent]:
        """What the client may repeat, or has repeated and is not in `h`, by number."""
        return [sent for sent in self.kept() if sent.number <= self.resumed_at]

    def under_way(self) -> list[Sent]:
        """What has come on the present stream and is not in `h`, as it came."""
        return list(self._counted)

    def kept(self) -> list[Sent]:
        """What is not in `h`, by number."""
        return sorted({sent.number: sent for sent in (*self._again, *self._counted)}.values())


def is_same(one: bytes, other: bytes) -> bool:
    """Whether two stanzas have the same children. A client that sends one again may add a <delay/> (4)."""
    return one == other or _content(to_tree(one)) == _content(to_tree(other))


def _content(tree: Tree) -> tuple[object, ...]:
    """What is in a stanza, to be compared; of its own attributes the caller compares what counts."""
    return (tree.text or "", *(_whole(child) for child in tree if child.tag != _DELAY))


def _whole(tree: Tree) -> tuple[object, ...]:
    return tree.tag, sorted(tree.attrib.items()), tree.text or "", [_whole(child) for child in tree], tree.tail or ""


# --- what goes to the client ---


class TooHigh(StreamError):
    """6: the client has acknowledged more than it was sent."""

    def __init__(self, h: int, sent: int) -> None:
        super().__init__(
            "undefined-condition",
            f"You acknowledged {h} stanzas, but only {sent} were sent to you so far.",
            application=f"<handled-count-too-high xmlns='{ns.SM}' h='{h}' send-count='{sent}'/>".encode(),
        )


class Outbound(Generic[T]):
    """What a session gets: each stanza has a number, 1, 2, 3 … from bind, and waits here for its acknowledgement."""

    __slots__ = ("_ids", "_sizes", "acknowledged", "asked", "base", "bytes", "queue", "sent")

    def __init__(self) -> None:
        # The last number given, and the last one that the client has confirmed.
        self.sent = 0
        self.acknowledged = 0
        # The number before the first one that the client counts.
        self.base = 0
        # The last one when the client was asked to confirm.
        self.asked = 0
        # What it has not confirmed, each with its number.
        self.queue: deque[tuple[int, T]] = NOTHING
        # The bytes of it, as far as they are known; and by number.
        self.bytes = 0
        self._sizes: dict[int, int] = {}
        # Of what stands there for something that has an id, that; by number.
        self._ids: dict[int, T] = {}

    def enable(self) -> None:
        """3: the client counts what follows. What it got before that is confirmed with the first of these."""
        self.base = self.acknowledged = self.asked = self.sent

    def keep(self, what: T, size: int = 0, id_: T | None = None) -> None:
        """The last one that was sent, of so many bytes, waits for its confirmation; `id_`: by which it is then
        known."""
        if self.queue is NOTHING:
            self.queue = deque()
        self.queue.append((self.sent, what))
        self._sizes[self.sent] = size
        self.bytes += size
        if id_ is not None:
            self._ids[self.sent] = id_

    def forget_oldest(self) -> None:
        """The first one that waits does so no longer."""
        number = self.queue.popleft()[0]
        self.bytes -= self._sizes.pop(number, 0)
        self._ids.pop(number, None)

    def acknowledge(self, h: int) -> list[T]:
        """<a/> or <resume/> said `h`: what is confirmed by that, in order. Raises TooHigh, and changes nothing."""
        new = (h - (self.acknowledged - self.base)) % MODULUS
        if new > self.sent - self.acknowledged:
            if new >= MODULUS // 2:
                return []  # less than was confirmed before: it came late
            raise TooHigh(h, (self.sent - self.base) % MODULUS)
        return self.confirm(self.acknowledged + new) if new else []

    def confirm(self, number: int) -> list[T]:
        """The client has all up to this number: what is confirmed by that, in order."""
        self.acknowledged = max(self.acknowledged, number)
        queue = self.queue
        confirmed: list[T] = []
        while queue and queue[0][0] <= number:
            sent, what = queue.popleft()
            confirmed.append(self._ids.pop(sent, what))
            self.bytes -= self._sizes.pop(sent, 0)
        return confirmed


# --- the elements ---


def count_of(text: str) -> int:
    """The value of an `h` attribute. Raises StanzaError."""
    if not _DIGITS.fullmatch(text) or int(text) >= MODULUS:
        raise StanzaError("bad-request", "`h` is an unsigned 32-bit number")
    return int(text)


def seconds_of(text: str) -> int | None:
    """The value of a `max` attribute; None when there is none, or nothing to go by."""
    return int(text) if _DIGITS.fullmatch(text) and int(text) else None


def is_true(text: str) -> bool:
    """The value of a boolean attribute (XML Schema)."""
    return text.strip() in ("true", "1")


def enabled(id_: str = "", max_: int = 0, location: str = "") -> bytes:
    """3; with an id the stream may be resumed."""
    attributes = f" id={quoteattr(id_)} resume='true' max='{max_}'" if id_ else ""
    if id_ and location:
        attributes += f" location={quoteattr(location)}"
    return f"<enabled xmlns='{ns.SM}'{attributes}/>".encode()


def resumed(id_: str, h: int) -> bytes:
    """5."""
    return f"<resumed xmlns='{ns.SM}' previd={quoteattr(id_)} h='{h}'/>".encode()


def failed(condition: str, h: int | None = None) -> bytes:
    """6; `h`: what was handled of a session that is over (5)."""
    counted = f" h='{h}'" if h is not None else ""
    return f"<failed xmlns='{ns.SM}'{counted}><{condition} xmlns='{ns.STANZA_ERRORS}'/></failed>".encode()


def ack(h: int) -> bytes:
    """4."""
    return b"<a xmlns='urn:xmpp:sm:3' h='%d'/>" % h
