"""A full JID has one session in the whole cluster: how a session gets it, and gives it up.

The table of sessions is the truth. Who binds enters a row; when another session is in the way it is ended, at
whichever router it is, and then its place is free. Of two that bind at the same moment one finds the row of
the other, so exactly one is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from services.router.sessions import Session, Sessions
from services.router.store import SessionRow, SessionTable
from tidings.api.router.v1.router_pb2 import EndSessionRequest
from tidings.api.router.v1.router_pb2_grpc import RouterServiceStub
from tidings.cluster.node import NodeState
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.rpc_errors import describe
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid

if TYPE_CHECKING:
    from services.router.orphans import Orphans
    from tidings.kit.channel import Channels
    from tidings.kit.membership import Member

log = get_logger("cluster")

# Tries to get a full JID that others want too, and seconds between them.
TRIES = 20
PAUSE = 0.05
# Seconds for another router to end a session.
END_TIMEOUT = 3.0
# Seconds between two tries to write what the database did not take.
RETRY = 1.0
# Seconds that a new session may take to send presence, before its row says that it has sent none.
SILENT = 5.0
# Seconds in which changes of availability are collected.
COLLECT = 0.1


class Binding:
    """The router's hold on its rows of the table."""

    def __init__(
        self,
        own: str,
        sessions: Sessions,
        table: SessionTable,
        orphans: Orphans,
        member: Member,
        channels: Channels,
        spawn: Callable[[Any, str], Any],
    ) -> None:
        self._own = own
        self._sessions = sessions
        self._table = table
        self._orphans = orphans
        self._member = member
        self._channels = channels
        self._spawn = spawn
        self._seen: dict[str, tuple[Jid, bool]] = {}

    async def take(self, session: Session, displace: Callable[[Session], Awaitable[None]]) -> None:
        """Gets the full JID for a session; `displace` ends one of this router. Raises StanzaError, DatabaseAway."""
        for attempt in range(TRIES):
            row = await self._table.bind(session.jid, session.id, self._own)
            if row is None:
                asyncio.get_running_loop().call_later(SILENT, self._still_silent, session)
                return
            present = self._sessions.get(row.session)
            if present is not None:
                await displace(present)
            elif row.router == self._own and attempt < TRIES // 2:
                # One that binds at this moment has its row already; else it was left behind.
                await asyncio.sleep(PAUSE)
            elif row.router != self._own and await self._ended_elsewhere(row):
                await asyncio.sleep(PAUSE if attempt else 0)
            elif await self._table.replace(row, session.id, self._own):
                # Its router is no more, and nobody else has told so.
                session.epoch = row.epoch + 1
                await self._orphans.tell(row)
                return
        raise StanzaError("resource-constraint", "others bind the same resource; try again", type="wait")

    async def _ended_elsewhere(self, row: SessionRow) -> bool:
        """Has another router end its session; False when that router is no more."""
        node = self._member.view.by_incarnation(row.router)
        if node is None:
            # It may have come a moment ago.
            await self._member.newer_view(PAUSE)
            node = self._member.view.by_incarnation(row.router)
        if node is None or node.state is NodeState.FAILED:
            return False
        stub: Any = RouterServiceStub(self._channels.to(node))
        try:
            request = EndSessionRequest(session=row.session, jid=str(row.jid))
            await stub.EndSession(request, timeout=END_TIMEOUT)
        except grpc.RpcError as error:
            log.info("session_not_ended", router=node.hostname, reason=describe(error))
        return True

    async def give_up(self, session: Session) -> bool:
        """Removes the row of a session that ends; False when it is another router's by now."""
        self._seen.pop(session.id, None)
        try:
            return await self._table.end(session.jid, session.id, session.epoch) is not None
        except DatabaseAway:
            self._spawn(self._give_up_later(session), "row of a session that has ended")
            return True

    async def _give_up_later(self, session: Session) -> None:
        while True:
            await asyncio.sleep(RETRY)
            try:
                await self._table.end(session.jid, session.id, session.epoch)
                return
            except DatabaseAway:
                continue

    def _still_silent(self, session: Session) -> None:
        """A session that has sent no presence for a while: nobody needs to be told of its end."""
        if session.presence is None and self._sessions.get(session.id) is session:
            self.presence_changed(session, b"", "unavailable")

    def presence_changed(self, session: Any, _raw: bytes, type_: str) -> None:
        """Notes whether contacts may have seen a session available, for whoever must tell them of its end."""
        available = type_ == ""
        if session.seen_available is not available:
            session.seen_available = available
            self._seen[session.id] = (session.jid, available)

    async def run(self) -> None:
        """Writes what was noted, in groups."""
        while True:
            await asyncio.sleep(COLLECT)
            seen, self._seen = self._seen, {}
            if not seen:
                continue
            try:
                await self._table.set_available([(jid, id_, there) for id_, (jid, there) in seen.items()])
            except DatabaseAway:
                self._seen = {**seen, **self._seen}
                await asyncio.sleep(RETRY)
