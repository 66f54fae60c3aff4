"""What sessions get: each stanza once, in order, behind what goes first."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sized

from services.router.iq_deadlines import IqDeadlines
from services.router.sessions import Session, Sessions
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ, MESSAGE
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream_management import NOTHING, REQUEST_RAW

log = get_logger("router")

# Stanzas that may be held back while a session gets its stored messages, and while it moves; a session that gets
# more than this meanwhile loses the rest, as with a full send queue: it stops the growth by a flood meanwhile.
MAX_HELD = 10_000

# Senders whose last number a session remembers; of more, those that have been silent for longest are forgotten. It
# stops a crowd of senders from filling memory.
MAX_TAKEN = 2000

# Seconds for which a new session's messages wait for its first presence.
FIRST_PRESENCE = 1.0
# Stanzas behind which a client is asked at once what it has.
ASK_AFTER = 10
# Unconfirmed stanzas that may share the memory of the batch that they came in.
MAX_SHARED = 64
# Stanzas that a client with XEP-0198 may leave unacknowledged, also while its session waits for it; then the session
# ends, and messages wait in the store. It stops a flood to somebody who does not come back from filling memory.
MAX_UNACKNOWLEDGED = 10_000
# Messages that a client without XEP-0198 may leave unconfirmed; of more, the oldest wait for the account's next
# session. It stops a client that answers no ping from filling memory.
MAX_UNCONFIRMED = 10_000

REQUESTS = ("get", "set")


class Deliveries:
    """Gives stanzas to the sessions of this router."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.deadlines = IqDeadlines(lambda: sessions, lambda session, envelope: self.deliver(session, envelope))
        # Whether answers wait for what their asker has sent before, and which messages are confirmed one by one:
        # safety and acknowledgements say so.
        self.withholds = False
        self.kept_as: Callable[[Envelope, Jid], bytes | None] = lambda _envelope, _account: None
        self.on_sent: Callable[[Session], None] = lambda _session: None
        # Called when a session has got more than its client may leave unacknowledged.
        self.on_full: Callable[[Session], None] = lambda _session: None
        # Total, for metrics.
        self.delivered = 0

    def to_session(self, session: Session, envelope: Envelope) -> None:
        """Gives a stanza to a session, behind what is held back for it; what it has had already is dropped."""
        if session.early is not None:
            _keep(session, session.early, envelope)
            return
        if session.held is not None and (session.holds or envelope.kind == MESSAGE):
            # Whether it is new is seen when its turn comes: what is stored goes first, and has lower numbers.
            _keep(session, session.held, envelope)
            return
        if not self._is_new(session, envelope):
            return
        if envelope.kind == MESSAGE:
            session.fresh = False
        elif envelope.kind == IQ and envelope.type not in REQUESTS and is_tracked(envelope.from_jid, session):
            if not self.deadlines.answered(session, envelope):
                return  # nobody asked, or was told already that there is no answer
        self.deliver(session, envelope)

    def _is_new(self, session: Session, envelope: Envelope) -> bool:
        """Whether a session takes a stanza: of each sender, numbers rise."""
        number = envelope.number
        if not number:
            return True
        taken = session.taken
        # Taken out and put in again, so that who is silent comes to stand first.
        last = taken.pop(envelope.origin, 0)
        if number <= last:
            taken[envelope.origin] = last
            return False
        taken[envelope.origin] = number
        if len(taken) > MAX_TAKEN:
            del taken[next(iter(taken))]
        return True

    def give_stored(self, session: Session, page: Iterable[tuple[Envelope, bytes, bool]]) -> None:
        """Writes messages that were stored to a session's stream, ahead of what is held back: each with its id, and
        whether sessions were given it when it came. What this one has had already is dropped."""
        account = session.jid.bare
        had = {
            self.kept_as(what, account) if isinstance(what, Envelope) else what for _, what in session.outbound.queue
        }
        for envelope, id_, given in page:
            last = session.taken.get(envelope.origin, 0)
            # Its sender may have sent something else since: a higher number alone says nothing to a fresh session.
            if id_ in had or (given and not session.fresh and envelope.number <= last):
                continue
            if envelope.number > last:
                self._is_new(session, envelope)
            self.deliver(session, envelope)

    def deliver(self, session: Session, envelope: Envelope) -> None:
        """Writes a stanza to a session's stream now, or, while it has none, as soon as it is resumed."""
        if not session.inbound.counts and self.withholds and self._is_withheld(session, envelope):
            return
        self._write(session, envelope)

    def _write(self, session: Session, envelope: Envelope) -> None:
        if session.frozen is not None:
            _keep(session, session.frozen, envelope)
            return
        inbound = session.inbound
        link = session.link
        if link is None and not session.resume_seconds:
            return  # it has ended
        outbound = session.outbound
        outbound.sent = number = outbound.sent + 1
        self.delivered += 1
        if inbound.counts:
            if len(outbound.queue) == MAX_UNACKNOWLEDGED:
                self.on_full(session)
            outbound.keep(envelope if link is not None and len(outbound.queue) < MAX_SHARED else own_copy(envelope))
        elif envelope.kind == MESSAGE and (id_ := self.kept_as(envelope, session.jid.bare)) is not None:
            outbound.keep(id_)
            if len(outbound.queue) > MAX_UNCONFIRMED:
                outbound.queue.popleft()
        else:
            if link is not None:
                link.deliver(session, envelope, number)
            return
        if link is not None:
            link.deliver(session, envelope, number)
            if inbound.counts and number - outbound.asked >= ASK_AFTER:
                outbound.asked = number
                link.write(session, REQUEST_RAW)
            else:
                self.on_sent(session)

    # --- answers that say too much (a client without XEP-0198 takes them for acknowledgements) ---

    def _is_withheld(self, session: Session, envelope: Envelope) -> bool:
        """Whether a stanza waits until all is safe that the session has sent before: an answer, or what follows one
        of the same sender."""
        withheld = session.withheld
        if withheld is not None and envelope.from_jid in withheld:
            _keep_behind(session, withheld[envelope.from_jid], envelope)
            return True
        if envelope.type != "error" and (envelope.kind != IQ or envelope.type != "result"):
            return False
        if session.inbound.safe_through >= session.inbound.number:
            return False
        if withheld is None:
            withheld = session.withheld = {}
        _keep_behind(session, withheld.setdefault(envelope.from_jid, deque()), envelope)
        return True

    def let_go(self, session: Session) -> None:
        """More of what a session has sent is safe."""
        withheld = session.withheld or {}
        safe = session.inbound.safe_through
        for sender, queue in list(withheld.items()):
            while queue and queue[0][0] <= safe:
                self._write(session, queue.popleft()[1])
            if not queue:
                del withheld[sender]
        if not withheld:
            session.withheld = None

    def is_open(self, session: Session) -> bool:
        """Whether what is delivered to a session now goes to its stream."""
        return (
            self._sessions.get(session.id) is session
            and session.link is not None
            and session.frozen is None
            and not session.closed
        )

    def settle(self, session: Session) -> None:
        """Keeps messages back from a session that was only just bound: with its first presence it gets what was
        stored before. A client that sends none gets them after a moment."""
        session.held = deque()
        session.settling = asyncio.get_running_loop().call_later(FIRST_PRESENCE, self._settled, session)

    def _settled(self, session: Session) -> None:
        session.settling = None
        if not session.holds:
            self._let_through(session)

    def hold(self, session: Session) -> None:
        session.holds += 1
        _stop_settling(session)
        if session.held is None:
            session.held = deque()

    def release(self, session: Session) -> None:
        session.holds -= 1
        if not session.holds:
            self._let_through(session)

    def _let_through(self, session: Session) -> None:
        held, session.held = session.held, None
        for envelope in held or ():
            self.to_session(session, envelope)

    def unconfirmed(self, session: Session) -> list[Envelope]:
        """What a session that ends was sent and has not confirmed, but for what waits in the store; in order."""
        queue, session.outbound.queue = session.outbound.queue, NOTHING
        account = session.jid.bare
        return [
            what
            for _, what in queue
            if isinstance(what, Envelope) and what.number and self.kept_as(what, account) is None
        ]

    def kept(self, session: Session) -> list[Envelope]:
        """What waits for a session that ends or goes to another router, in order; it waits here no longer."""
        frozen, session.frozen = session.frozen, None
        held, session.held = session.held, None
        _stop_settling(session)
        return [*(frozen or ()), *(held or ())]


def _stop_settling(session: Session) -> None:
    if session.settling is not None:
        session.settling.cancel()
        session.settling = None


def _keep(session: Session, queue: deque[Envelope], envelope: Envelope) -> None:
    if _has_room(session, queue):
        queue.append(own_copy(envelope))


def _keep_behind(session: Session, queue: deque[tuple[int, Envelope]], envelope: Envelope) -> None:
    if _has_room(session, queue):
        queue.append((session.inbound.number, own_copy(envelope)))


def _has_room(session: Session, queue: Sized) -> bool:
    if len(queue) < MAX_HELD:
        return True
    log.warning("held_queue_full", session=session.id, bound=MAX_HELD)
    return False


def own_copy(envelope: Envelope) -> Envelope:
    """One to keep for a while: an envelope that came in a batch keeps all of the batch in memory."""
    copy = Envelope()
    copy.CopyFrom(envelope)
    return copy


def is_tracked(other: str, session: Session) -> bool:
    """Whether a request to this address goes to somebody else than the session's own account and server."""
    return bool(other) and other != session.account and other != session.jid.domain
