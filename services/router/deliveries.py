"""What sessions get: each stanza once, in order, behind what goes first."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from services.router.first_presence import FirstPresence, stop_settling
from services.router.held import before, by_sender, is_behind, is_long, keep, own_copy
from services.router.iq_deadlines import REQUESTS, IqDeadlines
from services.router.passing import keeps_back
from services.router.sessions import BEHIND, Session, Sessions, when_copied
from services.router.withheld import Withheld, awaited
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ, MESSAGE
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream_management import NOTHING, REQUEST_RAW

if TYPE_CHECKING:
    from services.router.connector_link import ConnectorLink

log = get_logger("router")

# Senders whose last number a session remembers; of more, those that have been silent for longest are forgotten. It
# stops a crowd of senders from filling memory.
MAX_TAKEN = 2000

# Stanzas behind which a client is asked at once what it has.
ASK_AFTER = 10
# Unconfirmed stanzas that may share the memory of the batch that they came in.
MAX_SHARED = 64
# Stanzas, and bytes of them, that a session may have got and not confirmed, or that are held back for it; messages
# beyond that stay in the store, and are read back, in order, when its client has confirmed enough. It stops a slow
# client from filling memory.
WINDOW = 1000
WINDOW_BYTES = 1_048_576
# The part of it from which on messages are read back.
LOW = 0.5
# The same for what is in no store, and for sessions that do not want what is: then the session ends. It stops a flood
# to somebody who does not come back from filling memory.
MAX_UNACKNOWLEDGED = 10_000
MAX_UNACKNOWLEDGED_BYTES = 8_388_608
# Messages that a client without XEP-0198 may leave unconfirmed that has never confirmed any, so that nobody knows
# whether it can; of more, the oldest wait for the account's next session. The bound of its socket holds for it too.
MAX_UNCONFIRMED = 10_000


class Deliveries:
    """Gives stanzas to the sessions of this router."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.first_presence = FirstPresence(self._let_through)
        self.deadlines = IqDeadlines(lambda: sessions, lambda session, envelope: self.deliver(session, envelope))
        # Whether answers wait for what their asker has sent before, and which messages are confirmed one by one:
        # safety and acknowledgements say so.
        self.withholds = False
        self.kept_as: Callable[[Envelope, Jid], bytes | None] = lambda _envelope, _account: None
        self.on_sent: Callable[[Session], None] = lambda _session: None
        # Called once when a session has got more than its client may leave unacknowledged.
        self.on_full: Callable[[Session], None] = lambda _session: None
        # Called when a session falls behind: messages wait for it in the store. Whoever reads them says so when there
        # are no more (`caught_up`).
        self.on_behind: Callable[[Session], None] = lambda _session: None
        # Gives a session, by their ids, what another router has stored as given to it: one from which the session was
        # taken over, and which did not know that, or was behind its own end. Returns when that is done.
        self.read_again: Callable[[Session], Awaitable[None]] = _nothing
        # Whether a connector that holds a copy is on another host than this router, if there is another one.
        self.is_far: Callable[[ConnectorLink], bool] = lambda _link: True
        # Called with the id of a message that a session gets again and has confirmed.
        self.on_again: Callable[[Session, bytes], None] = lambda _session, _id: None
        # Total, for metrics.
        self.delivered = 0

    def to_session(self, session: Session, envelope: Envelope) -> None:
        """Gives a stanza to a session, behind what is held back for it; what it has had already is dropped. A message
        that finds no room stays in the store (`takes`)."""
        if envelope.answers and session.early is None:
            # Ahead of what is held back: it would be lost with that, and what it answers counts as dealt with.
            self._answer(session, envelope)
        elif session.behind is not None:
            self._put_behind(session, session.behind, envelope)
        elif envelope.kind == MESSAGE and self._is_full(session) and self._is_stored(session, envelope):
            self._put_behind(session, self.fall_behind(session), envelope)
        elif session.early is not None:
            keep(session, session.early, envelope)
        elif session.held is not None and (
            session.holds or envelope.kind == MESSAGE or is_behind(envelope, session.held)
        ):
            # Whether a message is new is seen when its turn comes: what is stored goes first, and has lower numbers.
            keep(session, session.held, envelope)
        elif self._is_new(session, envelope):
            self._give(session, envelope)
        elif envelope.kind == MESSAGE and envelope.to_jid == session.jid_text:
            self._comes_again(session, envelope)

    def _comes_again(self, session: Session, envelope: Envelope) -> None:
        """A message for a session alone comes again, by another way: a router that had it has died. If the client has
        confirmed it, it waits for nobody: what was just written says that it does."""
        if envelope.number < session.since.get(envelope.origin, 0):
            return  # it was never given to this session
        id_ = self.kept_as(envelope, session.jid.bare)
        name = envelope.origin, envelope.number
        if id_ is not None and not any(
            what == id_ if isinstance(what, bytes) else (what.origin, what.number) == name
            for what in chain(_given(session), session.frozen or ())
        ):
            self.on_again(session, id_)

    def is_copied(self, session: Session, envelope: Envelope) -> bool:
        """Whether a message for a session goes to its stream now, and a process on another host, if there is one,
        gets it before the stream."""
        return (
            session.holder is not None
            and self.is_far(session.holder)
            and self.takes(session)
            and not keeps_back(session)
            and not session.closed
            and not self._waits_for(session, envelope)
        )

    def _give(self, session: Session, envelope: Envelope) -> None:
        if envelope.kind == IQ and envelope.type not in REQUESTS:
            self._answer(session, envelope)
            return
        if envelope.kind == MESSAGE:
            session.fresh = False
        self.deliver(session, envelope)

    def _answer(self, session: Session, envelope: Envelope) -> None:
        number = envelope.answers
        if envelope.kind == IQ and is_tracked(envelope.from_jid, session):
            asked = self.deadlines.answered(session, envelope)
            if asked is None:
                return  # nobody asked, or was told already that there is no answer
            number = asked.number
        if envelope.target == session.id:
            session.inbound.answered(envelope.answers)
        self.deliver(session, envelope, answers=number)

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
        if not last:
            session.since[envelope.origin] = number
            if len(taken) > MAX_TAKEN:
                silent = next(iter(taken))
                del taken[silent]
                session.since.pop(silent, None)
        return True

    # --- who does not read as fast as others write ---

    def takes(self, session: Session) -> bool:
        """Whether a message that comes now is given to a session, or held for it in memory: else it is left to the
        store until the session has read what goes before it."""
        return session.behind is None and not self._is_full(session)

    def _is_full(self, session: Session) -> bool:
        queue = session.held if session.early is None else session.early
        if queue is not None:
            return is_long(queue, WINDOW, WINDOW_BYTES) and wants_stored(session)
        outbound = session.outbound
        if outbound.bytes < WINDOW_BYTES and len(outbound.queue) < WINDOW:
            return False
        # Where a session goes, it is known already whether it is behind.
        return session.frozen is None and wants_stored(session) and _confirms(session)

    def room(self, session: Session) -> int:
        """How many messages may be read back for a session now; 0 until its client has confirmed enough."""
        outbound = session.outbound
        waiting = len(outbound.queue)
        if _confirms(session) and (waiting > WINDOW * LOW or outbound.bytes > WINDOW_BYTES * LOW):
            return 0
        return max(WINDOW - waiting, 1)

    def fall_behind(self, session: Session) -> deque[Envelope]:
        """From now on messages for a session stay in the store, and all else that is routed to it waits behind them,
        as what is held back for it: so nothing overtakes."""
        if session.behind is None:
            session.behind = deque()
            held = session.held or ()
            if session.held is not None:
                session.held = deque()
            for envelope in held:
                self._put_behind(session, session.behind, envelope)
            session.notes[BEHIND] = b"1"
            session.changed()
            self.on_behind(session)
        return session.behind

    def _put_behind(self, session: Session, behind: deque[Envelope], envelope: Envelope) -> None:
        last = session.taken.get(envelope.origin, 0)
        if envelope.number and envelope.number <= last:
            return
        if envelope.kind == MESSAGE and self._is_stored(session, envelope):
            session.last_look = session.last_look and not is_long(behind, WINDOW, WINDOW_BYTES)
            if not session.last_look:
                session.left += 1
                return
        if not keep(session, behind, envelope):
            self._ends_full(session)

    def caught_up(self, session: Session) -> None:
        """Nothing waits in the store for a session: it gets what waits behind that, and then all as it comes."""
        behind, session.behind = session.behind, None
        session.last_look = False
        session.notes.pop(BEHIND, None)
        session.changed()
        self._let_out(session, behind or ())

    def _is_stored(self, session: Session, envelope: Envelope) -> bool:
        return self.kept_as(envelope, session.jid.bare) is not None

    def _let_out(self, session: Session, waiting: Iterable[Envelope]) -> None:
        """Gives a session what was held back while it got what was stored. A message may have been among that. What
        is in no store is new if it is for itself: stored messages with higher numbers may have gone before it."""
        others: dict[str, int] = {}
        for envelope in waiting:
            if session.behind is not None or envelope.kind == MESSAGE or not envelope.number:
                self.to_session(session, envelope)
            elif envelope.number > others.get(envelope.origin, 0):
                others[envelope.origin] = envelope.number
                self._is_new(session, envelope)
                self._give(session, envelope)

    def cut_off(self, session: Session) -> None:
        """The client of a session confirms nothing: its stream is closed, and the session waits for it, or ends."""
        if session.link is not None:
            log.info("client_confirms_nothing", session=session.id, account=session.account)
            session.link.close(session.stream, "connection-timeout", "what was sent to you was not confirmed")

    def _ends_full(self, session: Session) -> None:
        if not session.closed:
            session.closed = True
            self.on_full(session)

    # --- what was stored ---

    def give_stored(
        self, session: Session, page: Iterable[tuple[Envelope, bytes, bool]], confirmed: Iterable[bytes] = ()
    ) -> int:
        """Writes messages that were stored to a session's stream, ahead of what is held back: each with its id, and
        whether sessions were given it when it came. What this one has had already is dropped; `confirmed`: among
        that, ids of what it had confirmed when the page was asked for. How many are done with: the others find no
        room."""
        done = 0
        account = session.jid.bare
        had = {self.kept_as(what, account) if isinstance(what, Envelope) else what for what in _given(session)}
        had.update(confirmed, (id_ for _, id_ in session.unmarked))
        held = by_sender(chain(session.held or (), session.behind or ()))
        for envelope, id_, given in page:
            if session.outbound.bytes >= WINDOW_BYTES and _confirms(session):
                break
            done += 1
            last = session.taken.get(envelope.origin, 0)
            # Its sender may have sent something else since: a higher number alone says nothing to a fresh session,
            # nor to one whose former router may have stored this as given to it. And what came before anything else
            # of its sender did was not given to this session.
            since = session.since.get(envelope.origin, 0)
            seen = not (session.fresh or session.doubtful) and since <= envelope.number <= last
            if id_ in had or (given and seen):
                continue
            for earlier in before(envelope, held):
                if self._is_new(session, earlier):
                    self.deliver(session, earlier)
                    had.add(self.kept_as(earlier, account))
            if id_ in had:
                continue
            if envelope.number > last:
                self._is_new(session, envelope)
            self.deliver(session, envelope, id_)
        return done

    def deliver(self, session: Session, envelope: Envelope, stored_as: bytes | None = None, answers: int = 0) -> None:
        """Writes a stanza to a session's stream now, or, while it has none, as soon as it is resumed.

        `stored_as`: the id of a message that comes from the store. `answers`: the number of what it answers, or 0.
        """
        if not (number := self._waits_for(session, envelope, answers)):
            self._write(session, envelope, stored_as)
        elif session.withheld is not None and len(session.withheld) >= MAX_UNACKNOWLEDGED:
            self._ends_full(session)
        else:
            session.withheld = session.withheld or Withheld()
            session.withheld.add(own_copy(envelope), number)

    def _write(self, session: Session, envelope: Envelope, stored_as: bytes | None = None) -> None:
        if session.frozen is not None:
            keep(session, session.frozen, envelope)
            return
        inbound = session.inbound
        link = session.link
        if link is None and not session.resume_seconds:
            return  # it has ended
        outbound = session.outbound
        if inbound.counts and (
            len(outbound.queue) >= MAX_UNACKNOWLEDGED or outbound.bytes >= MAX_UNACKNOWLEDGED_BYTES
        ):
            self._ends_full(session)
            return
        outbound.sent = number = outbound.sent + 1
        self.delivered += 1
        if inbound.counts:
            shared = link is not None and len(outbound.queue) < MAX_SHARED
            # It is known now: the message was just written.
            id_ = self._id_of(session, envelope, stored_as)
            outbound.keep(envelope if shared else own_copy(envelope), len(envelope.stanza), id_)
        elif (id_ := self._id_of(session, envelope, stored_as)) is not None:
            outbound.keep(id_, len(envelope.stanza))
            if len(outbound.queue) > MAX_UNCONFIRMED:
                outbound.forget_oldest()
        else:
            if link is not None:
                link.deliver(session, envelope, number)
            return
        holder = session.holder
        if holder is None or holder is link:
            if link is not None:
                self._to_stream(session, link, envelope, number)
            return
        # Another connector than that of the stream holds the copy: it gets the stanza first.
        holder.deliver(session, envelope, number)
        if link is not None:
            when_copied(session, holder, partial(self._copied, session, link, session.stream, envelope, number))

    def _id_of(self, session: Session, envelope: Envelope, stored_as: bytes | None) -> bytes | None:
        """As what a message waits in the store, if it does."""
        if envelope.kind != MESSAGE:
            return None
        return stored_as or self.kept_as(envelope, session.jid.bare)

    def _copied(self, session: Session, link: ConnectorLink, stream: int, envelope: Envelope, number: int) -> None:
        # One that has resumed meanwhile was given it with all that its client has not confirmed.
        if session.link is link and session.stream == stream:
            self._to_stream(session, link, envelope, number)

    def _to_stream(self, session: Session, link: ConnectorLink, envelope: Envelope, number: int) -> None:
        link.deliver(session, envelope, number)
        outbound = session.outbound
        if session.inbound.counts and number - outbound.asked >= ASK_AFTER:
            outbound.asked = number
            link.write(session, REQUEST_RAW)
        else:
            self.on_sent(session)

    # --- answers that say too much (a client without XEP-0198 takes them for acknowledgements) ---

    def _waits_for(self, session: Session, envelope: Envelope, answers: int = 0) -> int:
        """The number up to which all must be safe that a session has sent, before it gets a stanza; or 0."""
        if not self.withholds or (session.inbound.counts and session.withheld is None):
            return 0
        return awaited(session, envelope, answers)

    def let_go(self, session: Session) -> None:
        """More of what a session has sent is safe."""
        if (withheld := session.withheld) is not None:
            for envelope in withheld.take(session.inbound.safe_through):
                self._write(session, envelope)
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

    def accepts(self, session: Session) -> bool:
        """Whether what is delivered to a session now goes to its stream, or waits for its client to resume."""
        return self.is_open(session) or (
            self._sessions.get(session.id) is session
            and session.link is None
            and session.resume_seconds > 0
            and session.frozen is None
            and not session.closed
        )

    def hold(self, session: Session) -> None:
        session.holds += 1
        stop_settling(session)
        if session.held is None:
            session.held = deque()

    def release(self, session: Session) -> None:
        session.holds -= 1
        if not session.holds:
            self._let_through(session)

    def _let_through(self, session: Session) -> None:
        held, session.held = session.held, None
        self._let_out(session, held or ())

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
        behind, session.behind = session.behind, None
        stop_settling(session)
        return [*(frozen or ()), *(held or ()), *(behind or ())]


def wants_stored(session: Session) -> bool:
    """Whether a session gets what is stored for its account."""
    return session.presence is not None and session.priority >= 0


def _confirms(session: Session) -> bool:
    """Whether its client is known to confirm what it gets. One without XEP-0198 that has never confirmed anything
    perhaps can't: the queue of its socket is its bound."""
    return session.inbound.counts or session.outbound.acknowledged > 0


def _given(session: Session) -> Iterator[Envelope | bytes]:
    """What a session was given, or is about to be, and has not confirmed."""
    return chain((what for _, what in session.outbound.queue), session.withheld or ())


def is_tracked(other: str, session: Session) -> bool:
    """Whether a request to this address goes to somebody else than the session's own account and server."""
    return bool(other) and other != session.account and other != session.jid.domain


async def _nothing(_session: Session) -> None: ...
