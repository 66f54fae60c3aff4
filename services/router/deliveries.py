"""What sessions get: each stanza once, in order, behind what goes first."""

from __future__ import annotations

from collections import deque

from services.router.iq_deadlines import IqDeadlines
from services.router.sessions import Session, Sessions
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ

log = get_logger("router")

# Stanzas that may be held back while a session gets its stored messages, and while it moves; a session that gets
# more than this meanwhile loses the rest, as with a full send queue: it stops the growth by a flood meanwhile.
MAX_HELD = 10_000

# Senders whose last number a session remembers; of more, those that have been silent for longest are forgotten. It
# stops a crowd of senders from filling memory.
MAX_TAKEN = 2000

REQUESTS = ("get", "set")


class Deliveries:
    """Gives stanzas to the sessions of this router."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.deadlines = IqDeadlines(lambda: sessions, lambda session, envelope: self.deliver(session, envelope))
        # Total, for metrics.
        self.delivered = 0

    def to_session(self, session: Session, envelope: Envelope) -> None:
        """Gives a stanza to a session, behind what is held back for it; what it has had already is dropped."""
        if session.early is not None:
            _keep(session, session.early, envelope)
            return
        kind = envelope.kind
        number = envelope.number
        if number:
            taken = session.taken
            # Taken out and put in again, so that who is silent comes to stand first.
            last = taken.pop(envelope.origin, 0)
            if number <= last:
                taken[envelope.origin] = last
                return
            taken[envelope.origin] = number
            if len(taken) > MAX_TAKEN:
                del taken[next(iter(taken))]
        if kind == IQ and envelope.type not in REQUESTS and is_tracked(envelope.from_jid, session):
            if not self.deadlines.answered(session, envelope):
                return  # nobody asked, or was told already that there is no answer
        held = session.held
        if held is not None:
            _keep(session, held, envelope)
            return
        self.deliver(session, envelope)

    def deliver(self, session: Session, envelope: Envelope) -> None:
        """Writes a stanza to a session's stream now."""
        if session.frozen is not None:
            _keep(session, session.frozen, envelope)
            return
        link = session.link
        if link is None:
            return  # it has ended
        session.delivered += 1
        self.delivered += 1
        link.deliver(session, envelope)

    def is_open(self, session: Session) -> bool:
        """Whether what is delivered to a session now goes to its stream."""
        return (
            self._sessions.get(session.id) is session
            and session.link is not None
            and session.frozen is None
            and not session.closed
        )

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

    def kept(self, session: Session) -> list[Envelope]:
        """What waits for a session that ends or goes to another router, in order; it waits here no longer."""
        frozen, session.frozen = session.frozen, None
        held, session.held = session.held, None
        return [*(frozen or ()), *(held or ())]


def _keep(session: Session, queue: deque[Envelope], envelope: Envelope) -> None:
    if len(queue) < MAX_HELD:
        queue.append(own_copy(envelope))
    else:
        log.warning("held_queue_full", session=session.id, bound=MAX_HELD)


def own_copy(envelope: Envelope) -> Envelope:
    """One to keep for a while: an envelope that came in a batch keeps all of the batch in memory."""
    copy = Envelope()
    copy.CopyFrom(envelope)
    return copy


def is_tracked(other: str, session: Session) -> bool:
    """Whether a request to this address goes to somebody else than the session's own account and server."""
    return bool(other) and other != session.account and other != session.jid.domain
