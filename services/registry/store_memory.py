"""The nodes in memory: for tests, and to show what the port means."""

from __future__ import annotations

from dataclasses import replace

from services.registry.store import Change, ChangeKind, Check
from tidings.cluster.node import Node, NodeState

KEPT_CHANGES = 1000


class MemoryNodeStore:
    """Satisfies `services.registry.store.NodeStore`."""

    def __init__(self) -> None:
        self._rows: dict[str, Node] = {}
        self._changes: list[Change] = []
        self._version = 0

    def _changed(self, kind: ChangeKind, node: Node) -> int:
        self._version += 1
        self._changes.append(Change(self._version, kind, node.hostname, node.incarnation))
        del self._changes[:-KEPT_CHANGES]
        return self._version

    def _row(self, hostname: str, incarnation: str) -> Node | None:
        row = self._rows.get(hostname)
        return row if row is not None and row.incarnation == incarnation else None

    async def join(self, node: Node, replaces: Node | None, check: Check) -> int | None:
        row = self._rows.get(node.hostname)
        if (row.incarnation if row else None) != (replaces.incarnation if replaces else None):
            return None
        if row is not None and row.state is not NodeState.FAILED:
            return None
        others = [other for other in self._rows.values() if other is not row]
        check(others)
        if any(other.incarnation == node.incarnation for other in others):
            return None
        if row is not None:
            self._changed(ChangeKind.LEFT, row)
        version = self._changed(ChangeKind.JOINED, node)
        self._rows[node.hostname] = replace(node, beat=0, joined=version)
        return version

    async def beat(
        self,
        hostname: str,
        incarnation: str,
        state: NodeState,
        cpu: float,
        memory: float,
        cleaned: int = 0,
        unreachable: tuple[str, ...] = (),
    ) -> bool:
        row = self._row(hostname, incarnation)
        if row is None or row.state is NodeState.FAILED:
            return False
        self._rows[hostname] = new = replace(
            row, beat=row.beat + 1, state=state, cpu_usage=cpu, mem_usage=memory, cleaned=cleaned,
            unreachable=unreachable,
        )  # fmt: skip
        if state is not row.state:
            self._changed(ChangeKind.DRAINING if state is NodeState.DRAINING else ChangeKind.BACK, new)
        return True

    async def leave(self, hostname: str, incarnation: str) -> None:
        row = self._row(hostname, incarnation)
        if row is not None:
            del self._rows[hostname]
            self._changed(ChangeKind.LEFT, row)

    async def mark(self, hostname: str, incarnation: str, beat: int, state: NodeState) -> bool:
        row = self._row(hostname, incarnation)
        if row is None or row.beat != beat or row.state is NodeState.FAILED:
            return False
        if state is NodeState.SUSPECT and row.state is not NodeState.UP:
            return False
        self._rows[hostname] = replace(row, state=state)
        self._changed(ChangeKind(state.value), row)
        return True

    async def remove_failed(self, hostname: str, incarnation: str) -> None:
        row = self._row(hostname, incarnation)
        if row is not None and row.state is NodeState.FAILED:
            await self.leave(hostname, incarnation)

    async def nodes(self) -> tuple[int, list[Node]]:
        return self._version, sorted(self._rows.values(), key=lambda node: node.hostname)

    async def changes(self, since: int) -> list[Change] | None:
        if since > self._version or (self._changes and since < self._changes[0].version - 1):
            return None
        return [change for change in self._changes if change.version > since]
