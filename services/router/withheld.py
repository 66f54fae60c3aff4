"""Answers that say too much: a client without XEP-0198 takes them for acknowledgements of what it has sent before."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tidings.kit.module import IQ, MESSAGE

if TYPE_CHECKING:
    from services.router.sessions import Session
    from tidings.api.common.v1.stanza_pb2 import Envelope


class Withheld:
    """What waits for one session until more of what its client has sent is safe: each with the number up to which all
    must be. An error goes before everything else that says of the same stanza that it was taken: it has the number of
    the stanza that it answers. Pure."""

    __slots__ = ("_last", "_queue", "_refused", "_taken")

    def __init__(self) -> None:
        # By number, then in the order in which they came.
        self._queue: list[tuple[int, int, Envelope]] = []
        self._taken = 0
        # Of each sender, the highest number.
        self._last: dict[str, int] = {}
        # Of each account, how many messages to it have come back, of which the client does not know.
        self._refused: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Envelope]:
        """In no order."""
        return (envelope for _, _, envelope in self._queue)

    def last(self, sender: str) -> int:
        """The number for which the last one of a sender waits, or 0."""
        return self._last.get(sender, 0)

    def refused(self, to: str) -> bool:
        """Whether a message to this address, or to another resource of it, has come back, and the client does not
        know: if this router dies the next one takes it for new, and what was taken behind it would be before it."""
        return bool(self._refused[_account(to)])

    def add(self, envelope: Envelope, number: int) -> None:
        if _comes_back(envelope):
            self._refused[_account(envelope.from_jid)] += 1
        self._taken += 1
        heapq.heappush(self._queue, (number, self._taken, envelope))
        self._last[envelope.from_jid] = max(number, self.last(envelope.from_jid))

    def take(self, safe_through: int) -> list[Envelope]:
        """Those that need not wait any longer, in order."""
        ready: list[Envelope] = []
        while self._queue and self._queue[0][0] <= safe_through:
            number, _, envelope = heapq.heappop(self._queue)
            if self.last(envelope.from_jid) <= number:
                self._last.pop(envelope.from_jid, None)
            if _comes_back(envelope):
                self._refused[_account(envelope.from_jid)] -= 1
            ready.append(envelope)
        return ready


def _comes_back(envelope: Envelope) -> bool:
    """Whether it is an error of ours for a message."""
    return envelope.kind == MESSAGE and bool(envelope.answers)


def _account(jid: str) -> str:
    return jid.partition("/")[0]


def awaited(session: Session, envelope: Envelope, answers: int) -> int:
    """The number up to which all must be safe that a session has sent, before it gets a stanza; 0: none. An answer
    waits for what it answers, where that is not known for all, while the client does not count (XEP-0198). What no
    router says itself waits for the last answer of its sender too. `answers`: the number of what it answers, if the
    envelope does not say it."""
    inbound = session.inbound
    number = 0
    is_answer = envelope.type == "error" or (envelope.kind == IQ and envelope.type == "result")
    if is_answer and not inbound.counts:
        # Where another session was answered, which had this one's place, its numbers may be higher.
        number = min(answers or envelope.answers or inbound.number, inbound.number)
        if number <= inbound.safe_through:
            number = 0
    if session.withheld is not None and not envelope.answers:
        number = max(number, session.withheld.last(envelope.from_jid))
    return number
