"""Sessions whose router is no more: their rows are removed, and who saw them available is told, exactly once.

Each router takes the accounts that hash to it; the table lets one of them win, whatever their views. Nothing is
said before the row is gone: a router that was stopped and wakes finds that its sessions are no longer its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from services.router.sessions import Session
from services.router.store import SessionRow, SessionTable
from tidings.cluster.hashing import rendezvous
from tidings.cluster.strategy import routers
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.module import Hooks

if TYPE_CHECKING:
    from services.router.routing import Routing
    from tidings.kit.membership import Member

log = get_logger("cluster")

# Seconds between two looks at what is left.
LOOK = 1.0
# Seconds between two looks for rows of routers that no view shows: all nodes may have died at once. They go when
# they were seen twice.
SWEEP = 10.0


class Orphans:
    """Looks after the sessions of routers that are gone."""

    def __init__(
        self,
        own: str,
        table: SessionTable,
        routing: Routing,
        hooks: Hooks,
        spawn: Callable[[Any, str], Any],
        member: Member,
    ) -> None:
        self._own = own
        self._table = table
        self._routing = routing
        self._hooks = hooks
        self._spawn = spawn
        self._member = member
        self._view = ClusterView()
        self._alive: set[str] = set()
        self._cleaning: set[str] = set()
        self.ended = 0

    def view_changed(self, view: ClusterView) -> None:
        alive = {node.incarnation for node in view.with_router_sessions()}
        gone = self._alive - alive
        self._alive = alive
        self._view = view
        for router in gone:
            self._start(router)

    def _start(self, router: str) -> None:
        if router not in self._cleaning and router != self._own:
            self._cleaning.add(router)
            self._member.cleaning(router)
            self._spawn(self._clean(router), "sessions of a router that is gone")

    async def _clean(self, router: str) -> None:
        first = True
        try:
            while router not in self._alive:
                try:
                    rows = await self._table.of_router(router)
                    if not rows:
                        break
                    log.info("ending_orphans", router=router, sessions=len(rows))
                    others = [node.incarnation for node in routers(self._view)] or [self._own]
                    for row in rows:
                        # At first each router takes its share; who should have taken one may be gone itself.
                        if not first or rendezvous(str(row.jid.bare), others) == self._own:
                            await self.end(row)
                    first = False
                except DatabaseAway:
                    pass  # it comes back
                await asyncio.sleep(LOOK)
        finally:
            self._cleaning.discard(router)
            self._member.cleaned(router)

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
        for handler in self._hooks.session_ended:
            try:
                async with self._routing.step():
                    result = handler(session, row.available)
                    if result is not None:
                        await result
            except Exception:
                log.exception("session_end_failed", session=session.id)

    async def run(self) -> None:
        """Looks for rows of routers that no view has shown for two sweeps."""
        unknown: set[str] = set()
        while True:
            await asyncio.sleep(SWEEP)
            try:
                found = set(await self._table.routers()) - self._alive - {self._own}
            except DatabaseAway:
                continue
            for router in found & unknown:
                self._start(router)
            unknown = found
