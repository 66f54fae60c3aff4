"""Stanzas that are held back for a session, in memory: bounded, and in order with what is stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.logging import get_logger
from tidings.kit.module import MESSAGE

if TYPE_CHECKING:
    from services.router.sessions import Session

log = get_logger("router")

# Stanzas, and bytes of them, that may be held back in memory for a session: while it gets its stored messages, while
# it moves, and while what waits in the store for it goes first. It loses the rest, as with a full send queue. It
# stops the growth by a flood meanwhile.
MAX_HELD = 10_000
MAX_HELD_BYTES = 8_388_608
# How many of them come between two looks at their bytes.
WEIGHED = 16


def keep(session: Session, queue: deque[Envelope], envelope: Envelope) -> bool:
    """Whether there was room."""
    if is_long(queue, MAX_HELD, MAX_HELD_BYTES):
        log.debug("held_queue_full", session=session.id, bound=MAX_HELD)
        return False
    queue.append(own_copy(envelope))
    return True


def is_long(queue: deque[Envelope], most: int, most_bytes: int) -> bool:
    """Whether so much is in a queue. Its bytes are summed up now and then."""
    count = len(queue)
    if count >= most:
        return True
    return count > 0 and count % WEIGHED == 0 and sum(len(one.stanza) for one in queue) >= most_bytes


def is_behind(envelope: Envelope, held: Iterable[Envelope]) -> bool:
    """Whether something of the same sender is held back: its numbers rise, so nothing of it may go past that."""
    return bool(envelope.number) and any(one.origin == envelope.origin for one in held)


def by_sender(held: Iterable[Envelope]) -> dict[str, deque[Envelope]]:
    """The messages among what is held back that have numbers, of each sender in order."""
    senders: dict[str, deque[Envelope]] = {}
    for envelope in held:
        if envelope.kind == MESSAGE and envelope.number:
            senders.setdefault(envelope.origin, deque()).append(envelope)
    return senders


def before(stored: Envelope, held: dict[str, deque[Envelope]]) -> Iterator[Envelope]:
    """Takes out what goes before a stored message of the same sender: what is for one resource is held for it while
    it sends no presence, and what is for its account is stored then."""
    queue = held.get(stored.origin)
    while queue and queue[0].number <= stored.number:
        yield queue.popleft()


def own_copy(envelope: Envelope) -> Envelope:
    """One to keep for a while: an envelope that came in a batch keeps all of the batch in memory."""
    copy = Envelope()
    copy.CopyFrom(envelope)
    return copy
