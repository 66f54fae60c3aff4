"""Sessions go from router to router: when the view gives their account another keeper, and when one drains.

The stream stays where it is. In order: the connector stops reading the client and says so behind all that the
client has sent (`prepare_move`, `move_ready`); what that set in motion is waited for; the session is frozen,
its record goes to the other router, which takes the session over in the table under the next epoch
(`AdoptSession`); the connector is told (`moved`) and attaches the stream there. What arrives for a frozen
session goes with it. Nobody sees presence, and a client sees a pause.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from services.router.sessions import Session, Sessions
from services.router.store import SessionRow, SessionTable
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.common.v1.session_pb2 import AskedIq, SessionFlags, SessionRecord
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import AdoptSessionRequest
from tidings.api.router.v1.router_pb2_grpc import RouterServiceStub
from tidings.cluster.forwarding import Item
from tidings.cluster.hashing import rendezvous
from tidings.cluster.node import Node, NodeState
from tidings.cluster.strategy import Plan, routers
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.module import PRESENCE, Hooks
from tidings.kit.rpc_errors import TidingsError, describe
from tidings.xmpp.jid import Jid

if TYPE_CHECKING:
    from services.router.connector_link import ConnectorLink
    from services.router.routing import Routing
    from services.router.tickets import Tickets
    from tidings.kit.channel import Channels

log = get_logger("cluster")

# Moves at one time: each holds one session still for some milliseconds.
AT_ONCE = 32
# Seconds for the connector to stop reading, for what is under way, and for the other router.
READY_TIMEOUT = 5.0
QUIET_TIMEOUT = 10.0
ADOPT_TIMEOUT = 5.0
# Seconds between two tries, and between two looks at what is under way.
RETRY = 1.0
LOOK = 0.005
# Seconds that a session which was taken over waits for its connector.
ATTACH_TIMEOUT = 10.0
# How often a stream that is not bound yet is sent on: routers whose views differ would send it in a circle.
MAX_MOVES = 4


class HandOver:
    """Hands over the sessions of this router that belong elsewhere, and takes those of others."""

    def __init__(
        self,
        own: str,
        sessions: Sessions,
        table: SessionTable,
        routing: Routing,
        tickets: Tickets,
        hooks: Hooks,
        channels: Channels,
        spawn: Callable[[Any, str], Any],
    ) -> None:
        self._own = own
        self._sessions = sessions
        self._table = table
        self._routing = routing
        self._tickets = tickets
        self._hooks = hooks
        self._channels = channels
        self._spawn = spawn
        self._view = ClusterView()
        self._draining = False
        self._ready: dict[str, asyncio.Future[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        # What becomes of a session whose connector never came for it.
        self.abandon: Callable[[Session], Any] = lambda _session: None
        # Totals, for metrics.
        self.given = 0
        self.adopted = 0

    # --- where sessions belong ---

    def view_changed(self, view: ClusterView) -> None:
        """Called when the strategy knows the view."""
        self._view = view
        for session in self._sessions:
            self.place(session)

    async def drain(self) -> None:
        """Hands over all sessions; returns when none is left, or nobody can take them."""
        self._draining = True
        while len(self._sessions) and any(self.target(session.account) for session in self._sessions):
            for session in self._sessions:
                self.place(session)
            await asyncio.sleep(LOOK * 4)

    def target(self, account: str) -> Node | None:
        """The other router that is to keep the sessions of an account; None when it is this one."""
        keeper = self._routing.strategy.keeper(account)
        if self._draining and keeper in ("", self._own):
            others = [node.incarnation for node in routers(self._view) if node.incarnation != self._own]
            keeper = rendezvous(account, others) if others else self._own
        if keeper in ("", self._own):
            return None
        node = self._view.by_incarnation(keeper)
        return node if node is not None and node.state in (NodeState.UP, NodeState.SUSPECT) else None

    def place(self, session: Session) -> None:
        """Starts to hand a session over, if it belongs elsewhere."""
        if session.moving or session.link is None:
            return
        node = self.target(session.account)
        if node is not None:
            session.moving = True
            self._spawn(self._move(session, node), "hand a session over")

    # --- giving ---

    def ready(self, session: Session) -> None:
        """The connector has stopped reading."""
        ready = self._ready.pop(session.id, None)
        if ready is not None and not ready.done():
            ready.set_result(None)

    def ended(self, session: Session) -> None:
        """The session is over: nothing needs to be waited for."""
        self.ready(session)

    async def _move(self, session: Session, node: Node) -> None:
        async with self._slots:
            link = session.link
            if link is None or self._sessions.get(session.id) is not session:
                return
            moved = False
            try:
                moved = await self._try(session, node, link)
            finally:
                self._ready.pop(session.id, None)
                if not moved:
                    self._stay(session, link)
        if not moved:
            await asyncio.sleep(RETRY)
            if self._sessions.get(session.id) is session:
                self.place(session)

    async def _try(self, session: Session, node: Node, link: ConnectorLink) -> bool:
        ready = self._ready[session.id] = asyncio.get_running_loop().create_future()
        link.command(session.stream).prepare_move.SetInParent()
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                await ready
            async with asyncio.timeout(QUIET_TIMEOUT):
                await self._quiet(session)
        except TimeoutError:
            log.warning("session_not_moved", session=session.id, to=node.hostname, reason="it was not quiet in time")
            return False
        if self._sessions.get(session.id) is not session or session.link is not link:
            return False
        session.frozen = deque()
        request = AdoptSessionRequest(record=self._record(session), stream=session.stream)
        try:
            stub: Any = RouterServiceStub(self._channels.to(node))
            reply = await stub.AdoptSession(request, timeout=ADOPT_TIMEOUT)
            epoch, ticket = reply.epoch, reply.ticket
        except grpc.RpcError as error:
            log.info("session_not_moved", session=session.id, to=node.hostname, reason=describe(error))
            if not await self._is_gone(session, node):
                return False
            epoch = session.epoch + 1
            ticket = self._tickets.seal(session.connector, session.account, session.id, epoch)
        self._give(session, node, link, ticket)
        log.debug("session_moved", session=session.id, account=session.account, to=node.hostname, epoch=epoch)
        return True

    async def _quiet(self, session: Session) -> None:
        """Waits until all that the session has sent is dealt with, and all that was stored for it given to it."""
        while True:
            await session.lane.idle()
            if not session.holds and not self._routing.forwarder.under_way(session.account):
                return
            await asyncio.sleep(LOOK)

    async def _is_gone(self, session: Session, node: Node) -> bool:
        """Whether the other router has it after all: its answer may have been lost."""
        try:
            rows = await self._table.of_account(session.jid.bare)
        except DatabaseAway:
            return False
        return any(row.session == session.id and row.router == node.incarnation for row in rows)

    def _give(self, session: Session, node: Node, link: ConnectorLink, ticket: bytes) -> None:
        """It is the other router's now."""
        frozen, session.frozen = session.frozen or deque(), None
        self._sessions.remove(session)
        session.link = None
        link.release(session)
        moved = link.command(session.stream).moved
        moved.router_incarnation = node.incarnation
        moved.view_version = self._view.version
        moved.ticket = ticket
        self._routing.deliveries.deadlines.ended(session)
        self._routing.strategy.session_closed(session.account, session.jid.resource)
        for handler in self._hooks.session_left:
            handler(session)
        self.given += 1
        for envelope in frozen:
            self._pass_on(session, envelope, node)

    def _pass_on(self, session: Session, envelope: Envelope, node: Node) -> None:
        """What came while the session was frozen."""
        passed = Envelope()
        passed.CopyFrom(envelope)
        passed.to_jid = session.jid_text
        flow = (passed.from_jid.partition("/")[0], session.account)
        item = Item(flow, session.account, session.jid.resource, passed)
        self._routing.forwarder.copies(item, Plan(nodes=(node.incarnation,)), False)

    def _stay(self, session: Session, link: ConnectorLink) -> None:
        """The move did not come about; all goes on as before."""
        session.moving = False
        frozen, session.frozen = session.frozen, None
        for envelope in frozen or ():
            self._routing.deliveries.deliver(session, envelope)
        if session.link is link:
            link.command(session.stream).moved.SetInParent()

    def _record(self, session: Session) -> SessionRecord:
        asked = self._routing.deliveries.deadlines.left(session)
        record = SessionRecord(
            id=session.id, epoch=session.epoch, jid=session.jid_text, lang=session.lang, sent=session.delivered,
            number=session.number, taken=session.taken, directed_presence=sorted(session.directed),
            flags=SessionFlags(interested=session.interested, priority=session.priority),
            connector_incarnation=session.connector,
            asked=[AskedIq(to_jid=to, id=id_, left=left) for to, id_, left in asked],
        )  # fmt: skip
        if session.presence is not None:
            record.presence.kind = PRESENCE
            record.presence.stanza = session.presence
        return record

    # --- taking ---

    async def adopt(self, request: AdoptSessionRequest, giver: str) -> tuple[int, bytes]:
        """Takes a session over: its new epoch, and the ticket for its connector. Raises TidingsError."""
        record = request.record
        jid = Jid.parse(record.jid)
        present = self._sessions.get(record.id)
        if present is None:
            try:
                moved = await self._table.move(SessionRow(jid, record.id, record.epoch, giver), self._own)
            except DatabaseAway:
                raise TidingsError(ErrorReason.ERROR_REASON_DATABASE_AWAY, "the database does not answer") from None
            if not moved:
                raise TidingsError(ErrorReason.ERROR_REASON_STALE_EPOCH, f"{record.jid} is not the caller's any more")
            present = self._adopted(jid, request)
        ticket = self._tickets.seal(present.connector, present.account, present.id, present.epoch)
        return present.epoch, ticket

    def _adopted(self, jid: Jid, request: AdoptSessionRequest) -> Session:
        record = request.record
        session = Session(jid, record.lang, None, request.stream, self._spawn)
        session.id = record.id
        session.epoch = record.epoch + 1
        session.connector = record.connector_incarnation
        session.number = record.number
        session.delivered = record.sent
        session.taken = dict(record.taken)
        session.directed = set(record.directed_presence)
        session.interested = record.flags.interested
        session.priority = record.flags.priority
        session.presence = record.presence.stanza if record.HasField("presence") else None
        # Until the connector attaches its stream.
        session.frozen = deque(request.held)
        session.moving = True
        self._sessions.add(session)
        self._routing.strategy.session_opened(session.account, jid.resource)
        self._routing.deliveries.deadlines.adopted(
            session, [(asked.to_jid, asked.id, asked.left) for asked in record.asked]
        )
        self.adopted += 1
        asyncio.get_running_loop().call_later(ATTACH_TIMEOUT, self._never_attached, session)
        return session

    def _never_attached(self, session: Session) -> None:
        if session.link is None and self._sessions.get(session.id) is session:
            log.warning("session_not_attached", session=session.id, waited=ATTACH_TIMEOUT)
            self._spawn(self.abandon(session), "end a session that nobody attached")

    def attach(self, link: ConnectorLink, stream: int, sealed: bytes) -> Session | None:
        """The connector brings the stream of a session; None when it is not for this stream, or not here."""
        ticket = self._tickets.open(sealed, link.incarnation)
        session = self._sessions.get(ticket.session) if ticket is not None else None
        if ticket is None or session is None or session.epoch != ticket.epoch or session.link is not None:
            return None
        session.link = link
        session.stream = stream
        return session

    def attached(self, session: Session) -> None:
        """What waited for it goes to its stream."""
        frozen, session.frozen = session.frozen, None
        session.moving = False
        for envelope in frozen or ():
            self._routing.deliveries.deliver(session, envelope)
        self.place(session)
