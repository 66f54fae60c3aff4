"""`broadcast`: nobody knows anything; every stanza for an account goes to every router.

It needs no notes and no memory, and costs N-1 copies a stanza: right for a few nodes with many log-ins and
few stanzas, and the yardstick for the others.
"""

from __future__ import annotations

from tidings.cluster.strategy import HERE, Context, Plan
from tidings.cluster.view import ClusterView


class Broadcast:
    """Satisfies `tidings.cluster.strategy.Strategy`."""

    def __init__(self, own: str, context: Context) -> None:
        self._own = own
        self._plan = HERE

    def view_changed(self, view: ClusterView) -> None:
        # Also routers that drain or have only just come: whoever is in the view may have sessions.
        others = sorted(node.incarnation for node in view.with_router_sessions() if node.incarnation != self._own)
        self._plan = Plan(nodes=tuple(others), certain=False) if others else HERE

    def keeper(self, account: str) -> str:
        return ""

    def locate(self, account: str, resource: str) -> Plan:
        return self._plan

    def session_opened(self, account: str, resource: str) -> None:
        """Nobody needs to know."""

    def session_closed(self, account: str, resource: str) -> None:
        """Nobody needs to know."""

    def noted(self, node: str, note: bytes) -> None:
        """Nobody tells anything."""
