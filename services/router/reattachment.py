"""Sessions whose router is gone, or does not answer: this router takes them over from a connector's copy (DESIGN 9).

The row in the table of sessions decides, as with every move: it becomes this router's, under the next epoch, or the
session is not taken. The client sees a pause; nobody sees presence. What the dead router had stored for the session
and not delivered is given first; what the client had sent and that router may not have dealt with follows from the
connector, with the numbers that it had.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from services.router.adoption import tell
from services.router.deliveries import is_tracked, wants_stored
from services.router.hand_over import MAX_MOVES
from services.router.routing_fields import fill
from services.router.session_record import session_of
from services.router.sessions import Session, Sessions
from services.router.store import SessionRow, SessionTable
from services.router.taken_over import TAKEN, taken
from tidings.cluster.forwarding import Item, Mode
from tidings.cluster.node import NodeState
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.module import MESSAGE, Hooks
from tidings.xmpp.jid import Jid, JidError

if TYPE_CHECKING:
    from services.router.acknowledgements import Acknowledgements
    from services.router.adoption import Adoption
    from services.router.binding import Binding
    from services.router.connector_link import ConnectorLink
    from services.router.hand_over import HandOver
    from services.router.routing import Routing
    from services.router.safety import Safety
    from services.router.tickets import Tickets
    from tidings.api.common.v1.session_pb2 import SessionRecord, Ticket
    from tidings.api.common.v1.stanza_pb2 import Envelope
    from tidings.api.router.v1.router_pb2 import SessionAttach

log = get_logger("cluster")

T = TypeVar("T")

# Seconds between two tries while the database is away; then the client waits too.
RETRY = 0.5
# Seconds after which a router that stands still, or is cut off, is put out or has answered; and in which the last
# commit of one that is gone is done.
SILENT = 6.0
WRITTEN = 1.0
# Sessions that are taken over at one time.
AT_ONCE = 32


class Reattachment:
    """Takes sessions over. One for each router."""

    def __init__(
        self,
        own: str,
        sessions: Sessions,
        table: SessionTable,
        binding: Binding,
        routing: Routing,
        safety: Safety,
        acknowledgements: Acknowledgements,
        tickets: Tickets,
        hand_over: HandOver,
        adoption: Adoption,
        hooks: Hooks,
        spawn: Callable[[Any, str], Any],
    ) -> None:
        self._own = own
        self._sessions = sessions
        self._table = table
        self._binding = binding
        self._routing = routing
        self._safety = safety
        self._acknowledgements = acknowledgements
        self._tickets = tickets
        self._hand_over = hand_over
        self._adoption = adoption
        self._hooks = hooks
        self._spawn = spawn
        self._slots = asyncio.Semaphore(AT_ONCE)
        # By session: held while it is taken over.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Sessions that this router has asked for: here their clients resume.
        self.wanted: set[str] = set()
        # Ends a session; lets one wait for its client.
        self.dismiss: Callable[[Session], Awaitable[None]] = _nothing
        self.wait: Callable[[Session, float], None] = lambda _session, _seconds: None
        # Totals, for metrics.
        self.taken = 0
        self.refused = 0

    async def take(
        self, link: ConnectorLink, stream: int, attach: SessionAttach, sent: Sequence[Envelope] = ()
    ) -> None:
        """Answers a connector that brings a copy; `stream` is 0 when the session waits for its client. `sent`: what
        that one has sent, and the router that is gone may not have dealt with."""
        record = attach.record
        ticket = self._tickets.open(attach.ticket, link.incarnation)
        try:
            jid = Jid.parse(record.jid)
        except JidError:
            jid = None
        if ticket is None or jid is None or not _is_for(ticket, record, jid):
            self._refuse(link, stream, record, "not its own")
            return
        wanted = record.id in self.wanted
        self.wanted.discard(record.id)
        node = self._hand_over.target(ticket.account) if attach.moves < MAX_MOVES and not wanted else None
        if node is not None and not self._was_asked(node.incarnation, attach):
            # Its account's other sessions will be there.
            moved = link.command(stream, record.id).moved
            moved.router_incarnation, moved.ticket = node.incarnation, attach.ticket
            return
        # A copy may be brought twice, by whoever lost its router and because it was asked for, and several may be
        # brought at one time: the next one finds the row as the one before has left it.
        lock = self._locks.setdefault(record.id, asyncio.Lock())
        async with lock, self._slots:
            session = await self._taken(link, stream, attach, jid)
        if session is None:
            self._refuse(link, stream, record, "its row is another router's, or gone")
            return
        for envelope in sent:
            link.again(session, envelope)
        self._acknowledgements.begin_again(session)

    @staticmethod
    def _was_asked(router: str, attach: SessionAttach) -> bool:
        """Whether the router is the one that has lost the session, or may have since: views differ for a moment."""
        return router == attach.router_incarnation or router in attach.asked_incarnations

    def _refuse(self, link: ConnectorLink, stream: int, record: SessionRecord, why: str) -> None:
        self.refused += 1
        log.info("session_not_taken", connector=link.name, session=record.id, reason=why)
        close = link.command(stream, record.id).close
        close.condition, close.text = "system-shutdown", "the session is no longer there; please connect again"

    async def _taken(self, link: ConnectorLink, stream: int, attach: SessionAttach, jid: Jid) -> Session | None:
        record = attach.record
        row = await self._row(jid, attach)
        if row is None or self._adoption.draining or link.over:
            return None
        record.epoch = row.epoch
        session = session_of(record, stream, self._spawn, doubtful=True)
        session.connector = link.incarnation
        with self._sessions.arriving(session.account):
            if not await _patiently(lambda: self._binding.adopt(jid, session.id, row.epoch, row.router)):
                return None
            for gone in (self._sessions.get(session.id), self._sessions.of(session.account).get(jid.resource)):
                if gone is not None:
                    # Its row was taken from it without our noticing.
                    await self.dismiss(gone)
            session.doubt()
            self._begin(link, stream, session, record)
        self._spawn(self._until_certain(session, row.router), "a router from which a session was taken over")
        return session

    async def _until_certain(self, session: Session, router: str) -> None:
        """Waits until the router that had the session takes nothing more for it: it has heard of this, and has
        written what it had; or it is gone. Then that is given, before anything else that comes from there."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        note = (TAKEN, taken(session.epoch, session.id))
        item = Item(("", session.account), session.account, "", note, Mode.NOTE)
        with self._routing.unsettled(session.account, router):
            if self._is_alive(router):
                self._routing.forwarder.ask((router,), item, partial(told.set_result, None))
                await asyncio.wait({told}, timeout=SILENT)
            if not self._is_alive(router):
                await asyncio.sleep(WRITTEN)  # its last commit may be under way
            if self._sessions.get(session.id) is session:
                await self._routing.deliveries.read_again(session)
        if self._sessions.get(session.id) is session:
            self._hand_over.place(session)

    async def _row(self, jid: Jid, attach: SessionAttach) -> SessionRow | None:
        """The session's row, if it is as the connector knows it: still its router's, or one's that it has asked
        since and that is gone too. A copy that has grown old finds another one."""
        record = attach.record
        for row in await _patiently(lambda: self._table.of_account(jid.bare)):
            if row.session == record.id and row.jid == jid:
                as_known = (row.router, row.epoch) == (attach.router_incarnation, record.epoch)
                asked = row.router in attach.asked_incarnations and row.epoch == record.epoch + 1
                return row if as_known or (asked and not self._is_alive(row.router)) else None
        return None

    def _is_alive(self, router: str) -> bool:
        node = self._routing.forwarder.view.by_incarnation(router)
        return router == self._own or (node is not None and node.state is not NodeState.FAILED)

    def _begin(self, link: ConnectorLink, stream: int, session: Session, record: SessionRecord) -> None:
        deliveries = self._routing.deliveries
        self._complete(session)
        self._sessions.add(session)
        self._routing.strategy.session_opened(session.account, session.jid.resource)
        # The connector does not tell apart whom they are for.
        asked = [(one.to_jid, one.id, one.left) for one in record.asked if is_tracked(one.to_jid, session)]
        deliveries.deadlines.adopted(session, asked)
        self._binding.adopted(session)
        # What is stored for it goes before anything new.
        deliveries.hold(session)
        if stream:
            session.link = link
        elif session.resume_seconds:
            self.wait(session, record.resume_left or float(session.resume_seconds))
        link.reattached(session, stream)
        self.taken += 1
        log.debug("session_taken_over", session=session.id, account=session.account, epoch=session.epoch)
        self._spawn(self._catch_up(session), "what is stored for a session that was taken over")

    def _complete(self, session: Session) -> None:
        """What a copy does not say of the stanzas that the client has not confirmed follows from their bytes."""
        queue: deque[tuple[int, Envelope | bytes]] = deque()
        for number, what in session.outbound.queue:
            if isinstance(what, bytes):
                queue.append((number, what))
                continue
            if not what.children:
                element = fill(what)
                if element is None:
                    continue
                what.from_jid = element.attrs.get("from", "")
            if what.kind == MESSAGE and what.number and self._safety.memory:
                # Its sender was told that two have it; this is one of them.
                self._safety.given(what, session.jid.bare, session.id)
            if session.inbound.counts:
                queue.append((number, what))
            elif what.kind == MESSAGE and (id_ := self._safety.kept_as(what, session.jid.bare)) is not None:
                queue.append((number, id_))
        if queue or session.outbound.queue:
            session.outbound.queue = queue
        if session.unmarked:
            # The router that is gone may not have written that.
            self._safety.acknowledged(session, [id_ for _, id_ in session.unmarked])

    async def _catch_up(self, session: Session) -> None:
        """What is stored for the session goes before anything new, as when it became available; then the modules
        hear that it is here."""
        deliveries = self._routing.deliveries
        try:
            # Who stores a message from here on knows that the session is here.
            await self._routing.notes.known()
            if wants_stored(session):
                await tell(self._hooks.session_available, session)
            elif session.presence is not None:
                await deliveries.read_again(session)
            await tell(self._hooks.session_attached, session)
        finally:
            if session.presence is not None:
                deliveries.release(session)
            else:
                # It may have been bound a moment ago: what is stored for its account goes before what is held.
                deliveries.first_presence.settle_again(session)
            self._hand_over.place(session)


def _is_for(ticket: Ticket, record: SessionRecord, jid: Jid) -> bool:
    """Whether a copy is of the ticket's session: the connector can't name another account."""
    return bool(ticket.session) and (ticket.session, ticket.account) == (record.id, jid.bare_text)


async def _patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Asks the database until it answers: the client waits meanwhile."""
    while True:
        try:
            return await ask()
        except DatabaseAway:
            await asyncio.sleep(RETRY)


async def _nothing(_session: Session) -> None: ...
