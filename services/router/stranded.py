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
    from services.router.sessions import Session, Sessions

# Seconds from the return of a router that was put out, which writes what it has before that, to the look; and from
# one session to the next.
AFTER = 1.0
PACE = 0.005
# Seconds for the last commit of a router that has died; and between two looks whether a session has come.
WRITTEN = 1.0
LOOK = 0.02


def rest_first(
    session: Session, deliveries: Deliveries, spawn: Callable[[Any, str], Any], comes: Callable[[], bool]
) -> None:
    """A router has died in the midst of a hand-over: what it has taken for the session, and stored, goes before
    anything that comes from now on. `comes`: whether the session is still on its way here."""
    session.doubt()
    deliveries.hold(session)
    spawn(_give_rest(session, deliveries, comes), "what a router that is gone has stored for a session")


async def _give_rest(session: Session, deliveries: Deliveries, comes: Callable[[], bool]) -> None:
    try:
        await asyncio.sleep(WRITTEN)
        while comes():  # noqa: ASYNC110 - bounded
            await asyncio.sleep(LOOK)
        await deliveries.read_again(session)
    finally:
        deliveries.release(session)


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
