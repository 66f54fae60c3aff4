"""Sessions whose router is no more: their rows are removed, and who saw them available is told, exactly once.

Those of which there are copies are taken over before that (reattachment.py). Of the others each router takes the
accounts that hash to it; the table lets one of them win, whatever their views. Nothing is said before the row is
gone: a router that was stopped and wakes finds that its sessions are no longer its own.

Not promised: that those are told to whom the session had sent presence directly (RFC 6121 4.6) in the last tenths of
a second of its router, and who are no contacts: that is written in groups (binding.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc

from services.router.sessions import Session
from services.router.store import SessionRow, SessionTable
from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.cluster.hashing import rendezvous
from tidings.cluster.strategy import routers
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.node_messages import node_from
from tidings.kit.rpc_errors import describe

if TYPE_CHECKING:
    from services.router.routing import Routing
    from tidings.kit.channel import Channels
    from tidings.kit.membership import Member

log = get_logger("cluster")

# Seconds for holders of copies to take sessions over, from the moment that their router is known to be gone; and
# between two looks whether all have been taken.
GRACE = 5.0
LOOK_EARLY = 0.25
# Seconds between two looks at what is left.
LOOK = 1.0
# Seconds between two looks for rows of routers that no view shows: all nodes may have died at once. They go when
# they were seen twice, and a registry says that there is no such node: our view may stand still.
SWEEP = 10.0
LIST_TIMEOUT = 5.0
# Sessions that are ended at one time.
AT_ONCE = 32


class Orphans:
    """Looks after the sessions of routers that are gone."""

    def __init__(
        self,
        own: str,
        table: SessionTable,
        routing: Routing,
        spawn: Callable[[Any, str], Any],
        member: Member,
        channels: Channels,
    ) -> None:
        self._own = own
        self._table = table
        self._routing = routing
        self._spawn = spawn
        self._member = member
        self._channels = channels
        self._view = ClusterView()
        self._alive: set[str] = set()
        self._cleaning: set[str] = set()
        # By router that is gone: the accounts of its sessions that may yet be taken over; None: that is not known
        # yet. And set at the next look.
        self._left: dict[str, frozenset[str] | None] = {}
        self._looked = asyncio.Event()
        self.ended = 0

    def view_changed(self, view: ClusterView) -> None:
        alive = {node.incarnation for node in view.with_router_sessions()}
        gone = self._alive - alive
        self._alive = alive
        self._view = view
        for router in gone:
            self._start(router, GRACE)

    def _start(self, router: str, grace: float = 0.0) -> None:
        if router not in self._cleaning and router != self._own:
            self._cleaning.add(router)
            if grace:
                # Its rows are no obstacle to another start under its name: incarnations keep old and new apart.
                self._left[router] = None
            else:
                self._member.cleaning(router)
            self._spawn(self._clean(router, grace), "sessions of a router that is gone")

    async def _clean(self, router: str, grace: float) -> None:
        first = True
        loop = asyncio.get_running_loop()
        ends = loop.time() + grace
        try:
            while router not in self._alive:
                try:
                    rows = await self._table.of_router(router)
                    if not rows and loop.time() >= ends:
                        break
                    if loop.time() < ends:
                        # Also when there is none: one may have been on its way to that router.
                        self._left[router] = frozenset(str(row.jid.bare) for row in rows)
                        self._look_again()
                        await asyncio.sleep(LOOK_EARLY)
                        continue
                    self._nobody_left(router)
                    log.info("ending_orphans", router=router, sessions=len(rows))
                    others = [node.incarnation for node in routers(self._view)] or [self._own]
                    if first:
                        # At first each router takes its share; who should have taken one may be gone itself.
                        rows = [row for row in rows if rendezvous(str(row.jid.bare), others) == self._own]
                        first = False
                    await self._end_all(rows)
                except DatabaseAway:
                    # It comes back; nobody waits longer than for a take-over.
                    if loop.time() >= ends:
                        self._nobody_left(router)
                await asyncio.sleep(LOOK)
        finally:
            self._nobody_left(router)
            self._cleaning.discard(router)
            self._member.cleaned(router)

    # --- who waits for that ---

    def is_settled(self, account: str) -> bool:
        """Whether no session of an account is at a router that is gone, and may yet be taken over."""
        return not any(left is None or account in left for left in self._left.values())

    async def settled(self, account: str) -> None:
        """Waits until that is so, for the time of a take-over at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                while not self.is_settled(account):
                    await self._looked.wait()

    def _nobody_left(self, router: str) -> None:
        """What has not been taken over till now is over."""
        if self._left.pop(router, ()) != ():
            self._look_again()

    def _look_again(self) -> None:
        self._looked.set()
        self._looked = asyncio.Event()

    # --- the end ---

    async def _end_all(self, rows: list[SessionRow]) -> None:
        """Raises DatabaseAway when all that could be ended are."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(row: SessionRow) -> None:
            async with slots:
                await self.end(row)

        for outcome in await asyncio.gather(*map(one, rows), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def end(self, row: SessionRow) -> None:
        """Ends a session on behalf of its router, if nobody else has. Raises DatabaseAway."""
        removed = await self._table.end(row.jid, row.session, row.epoch)
        if removed is None:
            return
        await self.tell(removed)

    async def tell(self, row: SessionRow) -> None:
        """Does what the end of a session brings with it; its row is no more."""
        self.ended += 1
        session = Session(row.jid, "", None, 0, self._spawn)
        session.id = row.session
        session.presence = b"<presence/>" if row.available else None
        session.directed = set(row.directed)
        await self._routing.endings.tell(session, row.available)

    async def run(self) -> None:
        """Looks for rows of routers that no view has shown for two sweeps."""
        unknown: set[str] = set()
        while True:
            await asyncio.sleep(SWEEP)
            try:
                found = set(await self._table.routers()) - self._alive - {self._own}
            except DatabaseAway:
                continue
            gone = found & unknown
            if gone and (alive := await self._alive_now()):
                for router in gone - alive:
                    self._start(router)
            unknown = found

    async def _alive_now(self) -> set[str]:
        """The routers that have not failed, as a registry tells it now; none when no registry answers."""
        for node in self._view.with_service("registry"):
            stub: Any = RegistryServiceStub(self._channels.to(node))
            try:
                reply = await stub.ListNodes(ListNodesRequest(), timeout=LIST_TIMEOUT)
            except grpc.RpcError as error:
                log.debug("nodes_not_listed", by=node.hostname, reason=describe(error))
                continue
            listed = ClusterView(reply.view_version, [node_from(message) for message in reply.nodes])
            return {one.incarnation for one in listed.living_routers()}
        return set()
