"""The taking side of a hand-over (hand_over.py): sessions that come from other routers.

A session is on its way from the moment that its row is this router's until the connector has attached its stream
and the router that gives it has passed on what came there. Till then it gets nothing: what is routed to it here
waits. What came there goes first, and of neither may anything be lost, come twice, or overtake.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from services.router.hand_over import GONE
from services.router.session_record import session_of
from services.router.sessions import Session, Sessions
from services.router.stranded import rest_first
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import AdoptSessionRequest, SessionAttach, SessionGiven
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.module import PRESENCE, Hooks, SessionHandler
from tidings.kit.rpc_errors import TidingsError
from tidings.xmpp.jid import Jid, JidError

if TYPE_CHECKING:
    from services.router.binding import Binding
    from services.router.connector_link import ConnectorLink
    from services.router.routing import Routing
    from services.router.tickets import Tickets

log = get_logger("cluster")

# Seconds that a session on its way waits: for what the other router gives, while that one is in the view; then for
# its connector.
GIVE_TIMEOUT = 60.0
ATTACH_TIMEOUT = 10.0


class _Arrival:
    """A session on its way."""

    __slots__ = ("given", "giver", "left", "timer", "told", "whole")

    def __init__(self, giver: str, left: float | None) -> None:
        self.giver = giver
        # Seconds that it waits for its client, when it has no stream that could be attached.
        self.left = left
        # What has come from there so far; and whether that is all.
        self.given: list[Envelope] = []
        self.whole = False
        # Set when it is.
        self.told = asyncio.Event()
        self.timer: asyncio.TimerHandle | None = None


class Adoption:
    """Takes sessions over."""

    def __init__(
        self,
        sessions: Sessions,
        binding: Binding,
        routing: Routing,
        tickets: Tickets,
        hooks: Hooks,
        spawn: Callable[[Any, str], Any],
    ) -> None:
        self._sessions = sessions
        # The routers that live, as the view says.
        self._living: frozenset[str] | None = None
        self._binding = binding
        self._routing = routing
        self._tickets = tickets
        self._hooks = hooks
        self._spawn = spawn
        self._arrivals: dict[str, _Arrival] = {}
        # Adoptions that are being carried through, by session.
        self._taking: dict[str, asyncio.Task[Session | Exception]] = {}
        # Set when this router drains: it takes no more.
        self.draining = False
        # Looks whether a session belongs here; ends a session and its stream.
        self.place: Callable[[Session], None] = lambda _session: None
        self.dismiss: Callable[[Session], Any] = lambda _session: None
        # Lets a session wait for its client, so many seconds.
        self.wait: Callable[[Session, float], None] = lambda _session, _seconds: None
        # Marks what a session had confirmed where it was before; that may not be written there.
        self.acknowledged: Callable[[Session, list[Envelope | bytes]], None] = lambda _session, _what: None
        # Asks its client what it has.
        self.moved: Callable[[Session], None] = lambda _session: None
        # Total, for metrics.
        self.adopted = 0

    def __len__(self) -> int:
        """Adoptions that are being carried through."""
        return len(self._taking)

    # --- asked by the router that gives ---

    async def adopt(self, request: AdoptSessionRequest, giver: str) -> tuple[int, bytes]:
        """Takes a session over: its new epoch, and the ticket for its connector. Raises TidingsError.

        What has begun is carried through when the caller waits no longer (gRPC cancels its handlers then); who asks
        again gets the same answer."""
        id_ = request.record.id
        taking = self._taking.get(id_)
        if taking is None:
            taking = self._taking[id_] = self._spawn(self._outcome(request, giver), "take a session over")
            taking.add_done_callback(lambda _done: self._taking.pop(id_))
        session = await asyncio.shield(taking)
        if isinstance(session, Exception):
            raise session
        ticket = self._tickets.seal(session.connector, session.account, session.id, session.epoch)
        return session.epoch, ticket

    async def _outcome(self, request: AdoptSessionRequest, giver: str) -> Session | Exception:
        """What is raised is for who asked, if that one still waits."""
        try:
            return await self._take(request, giver)
        except Exception as error:
            return error

    async def _take(self, request: AdoptSessionRequest, giver: str) -> Session:
        record = request.record
        present = self._sessions.get(record.id)
        if present is not None and present.epoch == record.epoch + 1:
            return present
        if self.draining:
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_SERVING, "this router drains")
        try:
            session = session_of(record, request.stream, self._spawn)
        except JidError as error:
            raise TidingsError(ErrorReason.ERROR_REASON_BAD_REQUEST, str(error)) from None
        with self._sessions.arriving(session.account):
            try:
                adopted = await self._binding.adopt(session.jid, session.id, record.epoch, giver)
            except DatabaseAway:
                raise TidingsError(ErrorReason.ERROR_REASON_DATABASE_AWAY, "the database does not answer") from None
            if not adopted:
                raise TidingsError(ErrorReason.ERROR_REASON_STALE_EPOCH, f"{record.jid} is not the caller's any more")
            for gone in (present, self._sessions.of(session.account).get(session.jid.resource)):
                if gone is not None:
                    # Its row was taken from it without our noticing.
                    await self.dismiss(gone)
            self._arrives(session, request, giver)
        return session

    def _arrives(self, session: Session, request: AdoptSessionRequest, giver: str) -> None:
        session.frozen, session.early = deque(), deque()
        session.moving = True
        self._sessions.add(session)
        self._routing.strategy.session_opened(session.account, session.jid.resource)
        self._routing.deliveries.deadlines.adopted(
            session, [(asked.to_jid, asked.id, asked.left) for asked in request.record.asked]
        )
        self._binding.adopted(session)
        if session.unmarked:
            self.acknowledged(session, [id_ for _, id_ in session.unmarked])
        record = request.record
        # One whose stream had broken comes without one, and waits here.
        left = record.resume_left if not request.stream else None
        arrival = self._arrivals[session.id] = _Arrival(giver, left)
        arrival.given.extend(request.held)
        self._wait(session, arrival, GIVE_TIMEOUT)
        self.adopted += 1
        if self._living is not None and giver not in self._living:
            # It has gone while the row was moved.
            self._given_up(session, arrival)

    # --- what it waits for ---

    def _wait(self, session: Session, arrival: _Arrival, timeout: float) -> None:
        if arrival.timer is not None:
            arrival.timer.cancel()
        arrival.timer = asyncio.get_running_loop().call_later(timeout, self._waited, session, arrival)

    def _waited(self, session: Session, arrival: _Arrival) -> None:
        if not arrival.whole:
            log.warning("session_not_given", session=session.id, waited=GIVE_TIMEOUT)
            self._given_up(session, arrival)
        elif session.resume_seconds:
            # Its connector may be gone; the client is not.
            arrival.left = float(session.resume_seconds)
            self._go_on(session, arrival)
        else:
            log.warning("session_not_attached", session=session.id, waited=ATTACH_TIMEOUT)
            self._spawn(self.dismiss(session), "end a session that nobody attached")

    def view_changed(self, view: ClusterView) -> None:
        """Routers that are gone give nothing more."""
        alive = self._living = frozenset(node.incarnation for node in view.living_routers())
        for id_, arrival in list(self._arrivals.items()):
            session = self._sessions.get(id_)
            if session is not None and not arrival.whole and arrival.giver not in alive:
                self._given_up(session, arrival)

    def _given_up(self, session: Session, arrival: _Arrival) -> None:
        """The router that gives it is gone, with what had waited there, which is stored."""
        rest_first(session, self._routing.deliveries, self._spawn, lambda: session.id in self._arrivals)
        self._is_whole(session, arrival)

    def given(self, _account: Jid, note: bytes) -> bytes:
        """A note of the router that gives a session; GONE when it is not on its way here: it has ended."""
        given = SessionGiven.FromString(note)
        session, arrival = self._sessions.get(given.session), self._arrivals.get(given.session)
        if session is None or arrival is None or arrival.whole:
            return GONE
        arrival.given.extend(given.held)
        if not given.more:
            self._is_whole(session, arrival)
        return b""

    def _is_whole(self, session: Session, arrival: _Arrival) -> None:
        arrival.whole = True
        arrival.told.set()
        self._wait(session, arrival, ATTACH_TIMEOUT)
        self._go_on(session, arrival)

    async def whole(self, session: Session) -> None:
        """Waits for what the other router still gives: a session that ends before must not send on what came here
        ahead of what came there."""
        arrival = self._arrivals.get(session.id)
        if arrival is not None:
            await arrival.told.wait()

    def attach(self, link: ConnectorLink, stream: int, attach: SessionAttach) -> tuple[Session | None, str]:
        """The connector brings the stream of a session: that one, None when it is not for this stream, or not here;
        and which it is, '' if nobody can know."""
        ticket = self._tickets.open(attach.ticket, link.incarnation)
        if ticket is None:
            return None, ""
        session = self._sessions.get(ticket.session)
        if session is None or session.epoch != ticket.epoch or session.link is not None:
            return None, ticket.session
        session.link = link
        session.stream = stream
        # One that may be resumed waits for its client, when the end of its stream comes.
        session.closed = attach.left and not session.resume_seconds
        return session, session.id

    def resumed(self, session: Session) -> None:
        """The client has come back with another stream."""
        arrival = self._arrivals.get(session.id)
        if arrival is not None:
            self._go_on(session, arrival)
        else:
            self._routing.deliveries.first_presence.told(session)
            session.lane.run(tell, self._hooks.session_attached, session)

    def attached(self, session: Session) -> None:
        """The link serves the stream now."""
        arrival = self._arrivals.get(session.id)
        if arrival is not None:
            self._go_on(session, arrival)

    def _go_on(self, session: Session, arrival: _Arrival) -> None:
        """When both have come, the client gets what has waited; if it has left meanwhile, the end of the session
        follows, and that goes elsewhere."""
        waits = arrival.left is not None or session.waits is not None
        if not arrival.whole or session.closed or (session.link is None and not waits):
            return
        if session.link is None and arrival.left is not None:
            self.wait(session, arrival.left)
        deliveries = self._routing.deliveries
        waited = self.ended(session)
        frozen, session.frozen = session.frozen, None
        session.moving = False
        for envelope in waited:
            deliveries.to_session(session, envelope)
        for envelope in frozen or ():
            deliveries.deliver(session, envelope)
        self.moved(session)
        session.lane.run(tell, self._hooks.session_attached, session)
        self.place(session)

    def ended(self, session: Session) -> list[Envelope]:
        """The session is on its way no longer; what has waited for it meanwhile, in order."""
        arrival = self._arrivals.pop(session.id, None)
        if arrival is None:
            return []
        if arrival.timer is not None:
            arrival.timer.cancel()
        arrival.told.set()
        early, session.early = session.early, None
        return list(in_order(arrival.given, early or ()))


async def tell(handlers: Iterable[SessionHandler], session: Session) -> None:
    """Tells modules of a session that has begun, or come here; one that fails keeps none of the others from it."""
    for handler in handlers:
        try:
            result = handler(session)
            if result is not None:
                await result
        except Exception:
            log.exception("session_handler_failed", session=session.id)


def in_order(given: list[Envelope], early: Iterable[Envelope]) -> Iterator[Envelope]:
    """What came by two ways to one session, each stanza once, and those of one sender by their numbers.

    The same one may have come by both: as copies for the sessions of an account. What has no number is known by its
    bytes then. Presence may be sent again, and the last one counts: of that, what both have is the end of what came
    by the first way, and the beginning of what came by the second."""
    both = Counter(envelope.stanza for envelope in given if not envelope.number and envelope.kind != PRESENCE)
    numbered: dict[str, dict[int, Envelope]] = {}
    order = list(given)
    shown, early = _presence(given), list(early)
    again = {sender: _overlap(shown.get(sender, []), presence) for sender, presence in _presence(early).items()}
    for envelope in early:
        if not envelope.number and envelope.kind == PRESENCE and again[envelope.from_jid]:
            again[envelope.from_jid] -= 1
        elif not envelope.number and both[envelope.stanza]:
            both[envelope.stanza] -= 1
        else:
            order.append(envelope)
    for envelope in order:
        if envelope.number:
            numbered.setdefault(envelope.origin, {})[envelope.number] = envelope
    due = {origin: iter(sorted(numbers)) for origin, numbers in numbered.items()}
    for envelope in order:
        if not envelope.number:
            yield envelope
        elif (number := next(due[envelope.origin], None)) is not None:
            yield numbered[envelope.origin][number]


def _presence(envelopes: Iterable[Envelope]) -> dict[str, list[bytes]]:
    """By sender, the presence that has no number."""
    shown: dict[str, list[bytes]] = {}
    for envelope in envelopes:
        if envelope.kind == PRESENCE and not envelope.number:
            shown.setdefault(envelope.from_jid, []).append(envelope.stanza)
    return shown


def _overlap(first: list[bytes], second: list[bytes]) -> int:
    """How much of the beginning of the second one is the end of the first one."""
    most = min(len(first), len(second))
    return next((count for count in range(most, 0, -1) if first[-count:] == second[:count]), 0)
