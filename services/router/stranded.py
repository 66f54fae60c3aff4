"""Messages that a router has stored behind its own end: it stood still, was put out, and woke with messages of its
clients, and gave them to sessions that were others' by then. Nobody is told of these; so they are looked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tidings.cluster.node import NodeState
from tidings.cluster.view import ClusterView

if TYPE_CHECKING:
    from services.router.deliveries import Deliveries
    from services.router.sessions import Sessions

# Seconds from the return of a router that was put out, which writes what it has before that, to the look; and from
# one session to the next.
AFTER = 1.0
PACE = 0.005


class Stranded:
    """Looks for them, for the sessions of one router."""

    def __init__(self, sessions: Sessions, deliveries: Deliveries, spawn: Callable[[Any, str], Any]) -> None:
        self._sessions = sessions
        self._deliveries = deliveries
        self._spawn = spawn
        # The names of routers that were put out and have not come back.
        self._failed: set[str] = set()

    def view_changed(self, view: ClusterView) -> None:
        routers = view.with_service("router")
        back = {node.hostname for node in routers if node.state is NodeState.UP} & self._failed
        self._failed |= {node.hostname for node in routers if node.state is NodeState.FAILED}
        self._failed -= back
        if back:
            self._spawn(self._look(), "messages that a router has stored behind its end")

    async def _look(self) -> None:
        await asyncio.sleep(AFTER)
        for session in self._sessions:
            self._spawn(self._deliveries.read_again(session), "messages of a router behind its end")
            await asyncio.sleep(PACE)
