"""What sessions get: each stanza once, in order, behind what goes first."""

from __future__ import annotations

from collections import deque

from services.router.iq_deadlines import IqDeadlines
from services.router.sessions import Session, Sessions
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ, MESSAGE

log = get_logger("router")

# Stanzas that may be held back while a session gets its stored messages; a session that gets more than
# this meanwhile loses the rest, as with a full send queue: it stops the growth by a flood during log-in.
MAX_HELD = 10_000

# Senders whose last number a session remembers; of more, the oldest are forgotten. It stops a crowd of senders from
# filling memory.
MAX_TAKEN = 2000

REQUESTS = ("get", "set")


class Deliveries:
    """Gives stanzas to the sessions of this router."""

    def __init__(self, sessions: Sessions) -> None:
        self.deadlines = IqDeadlines(lambda: sessions, lambda session, envelope: self.deliver(session, envelope))
        # Total, for metrics.
        self.delivered = 0

    def to_session(self, session: Session, envelope: Envelope) -> None:
        """Gives a stanza to a session, behind what is held back for it; what it has had already is dropped."""
        kind = envelope.kind
        number = envelope.number
        if number:
            taken = session.taken
            if number <= taken.get(envelope.origin, 0):
                return
            taken[envelope.origin] = number
            if len(taken) > MAX_TAKEN:
                del taken[next(iter(taken))]
        if kind == IQ and envelope.type not in REQUESTS and is_tracked(envelope.from_jid, session):
            if not self.deadlines.answered(session, envelope):
                return  # nobody asked, or was told already that there is no answer
        held = session.held
        if held is not None and kind == MESSAGE:
            if len(held) < MAX_HELD:
                held.append(envelope)
            else:
                log.warning("held_queue_full", session=session.id, bound=MAX_HELD)
            return
        self.deliver(session, envelope)

    def deliver(self, session: Session, envelope: Envelope) -> None:
        """Writes a stanza to a session's stream now."""
        if session.frozen is not None:
            session.frozen.append(envelope)
            return
        link = session.link
        if link is None:
            return  # it has ended
        session.delivered += 1
        self.delivered += 1
        link.deliver(session, envelope)

    def hold(self, session: Session) -> None:
        session.holds += 1
        if session.held is None:
            session.held = deque()

    def release(self, session: Session) -> None:
        session.holds -= 1
        if session.holds:
            return
        held, session.held = session.held, None
        for envelope in held or ():
            self.deliver(session, envelope)


def is_tracked(other: str, session: Session) -> bool:
    """Whether a request to this address goes to somebody else than the session's own account and server."""
    return bool(other) and other != session.account and other != session.jid.domain
