"""The rules of joining, and the registry's own copy of the view."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from services.registry.failure import Observer
from services.registry.store import Change, ChangeKind, NodeStore
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.rpc_errors import TidingsError

log = get_logger("registry")

# Seconds between two reads of the table.
LOOK = 0.5
# Seconds for a connection that is to prove that a node is dead.
PROBE_TIMEOUT = 1.0
# Times that a join is tried again when another one was faster.
TRIES = 10

# What a watcher gets: the change and the node as it is after it (before it, for LEFT).
Watcher = Callable[[Change, Node, ClusterView], None]


async def refused(address: str, port: int) -> bool:
    """Whether a new connection is refused there: proof that no process listens."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            _, writer = await asyncio.open_connection(address, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False


class Members:
    """Applies the rules over the store, and tells watchers what changes."""

    def __init__(
        self,
        store: NodeStore,
        own_incarnation: str,
        lease: float,
        clock: Callable[[], float] = time.monotonic,
        probe: Callable[[str, int], Awaitable[bool]] = refused,
    ) -> None:
        self._store = store
        self._lease = lease
        self._clock = clock
        self._probe = probe
        self._observer = Observer(own_incarnation, lease)
        self._reading = asyncio.Lock()
        self._watchers: set[Watcher] = set()
        self.view = ClusterView()
        # Since when the database answers no more; None while it does.
        self.away_since: float | None = None

    # --- joining ---

    async def join(self, node: Node) -> int:
        """Enters a node. Raises TidingsError when the rules forbid it, DatabaseAway."""
        for _ in range(TRIES):
            _, nodes = await self._store.nodes()
            self._check_alike(node, [other for other in nodes if other.hostname != node.hostname])
            present = next((other for other in nodes if other.hostname == node.hostname), None)
            if present is not None and present.incarnation == node.incarnation:
                return (await self.refresh()).version
            if present is not None:
                await self._check_gone(present, node)
            version = await self._store.join(node, present)
            if version is not None:
                await self.refresh()
                return version
        raise TidingsError(ErrorReason.ERROR_REASON_NAME_TAKEN, f"{node.hostname} is being taken by others")

    def _check_alike(self, node: Node, others: list[Node]) -> None:
        """All nodes of a cluster serve the same hosts, by the same strategy and protocol."""
        for other in others:
            if other.state is NodeState.FAILED:
                continue
            if other.protocol != node.protocol:
                raise TidingsError(
                    ErrorReason.ERROR_REASON_PROTOCOL_DIFFERS,
                    f"{other.hostname} speaks protocol {other.protocol}, this node {node.protocol}; run one release",
                )
            if sorted(other.virtual_hosts) != sorted(node.virtual_hosts):
                raise TidingsError(
                    ErrorReason.ERROR_REASON_VIRTUAL_HOSTS_DIFFER,
                    f"{other.hostname} serves {','.join(other.virtual_hosts)}, this node "
                    f"{','.join(node.virtual_hosts)}; give all nodes the same --virt-hosts",
                )
            if other.strategy and node.strategy and other.strategy != node.strategy:
                raise TidingsError(
                    ErrorReason.ERROR_REASON_STRATEGY_DIFFERS,
                    f"{other.hostname} uses the strategy {other.strategy}, this node {node.strategy}; give all nodes "
                    "the same --sm-cluster-strategy-class",
                )

    async def _check_gone(self, present: Node, node: Node) -> None:
        """Two starts under one name: the old one must be dead."""
        if present.state is NodeState.FAILED:
            return
        if (present.address, present.port) == (node.address, node.port):
            return  # the newcomer listens where the old one did: that one cannot live
        if await self._probe(present.address, present.port):
            return
        deadline = self._clock() + self._lease
        while self._clock() < deadline:
            await asyncio.sleep(min(LOOK, self._lease / 4))
            _, nodes = await self._store.nodes()
            row = next((other for other in nodes if other.hostname == node.hostname), None)
            if row is None or row.incarnation != present.incarnation or row.state is NodeState.FAILED:
                return
            if row.beat != present.beat:
                raise TidingsError(
                    ErrorReason.ERROR_REASON_NAME_TAKEN,
                    f"a node named {node.hostname} runs at {present.address}:{present.port}; give this one another "
                    "--cluster-hostname",
                )

    # --- the others' calls ---

    async def beat(self, hostname: str, incarnation: str, state: NodeState, cpu: float, memory: float) -> bool:
        before = self.view.by_incarnation(incarnation)
        alive = await self._store.beat(hostname, incarnation, state, cpu, memory)
        if alive and (before is None or before.state is not state):
            await self.refresh()
        return alive

    async def leave(self, hostname: str, incarnation: str) -> None:
        await self._store.leave(hostname, incarnation)
        await self.refresh()

    # --- the view ---

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Calls `watcher` with each change from now on; the result takes it off again."""
        self._watchers.add(watcher)
        return lambda: self._watchers.discard(watcher)

    async def refresh(self) -> ClusterView:
        """Reads the table and tells the watchers what is new. Raises DatabaseAway."""
        async with self._reading:
            before = self.view
            version, nodes = await self._store.nodes()
            changes = await self._store.changes(before.version) if before.version else []
            view = ClusterView(version, nodes)
            self.view = view
            for change in changes or ():
                node = view.by_incarnation(change.incarnation) or before.by_incarnation(change.incarnation)
                if node is not None and change.version <= version:
                    for watcher in list(self._watchers):
                        watcher(change, node, view)
            return view

    async def run(self) -> None:
        """Looks at the table, over and over, and judges who stands still."""
        while True:
            await asyncio.sleep(LOOK)
            try:
                view = await self.refresh()
                if self.away_since is not None:
                    log.info("database_back", away_s=round(self._clock() - self.away_since, 1))
                    self.away_since = None
                verdicts, removable = self._observer.look(view, self._clock())
                for verdict in verdicts:
                    node = verdict.node
                    if await self._store.mark(node.hostname, node.incarnation, node.beat, verdict.state):
                        log.warning(f"node_{verdict.state.value}", node=node.hostname, incarnation=node.incarnation)
                for node in removable:
                    await self._store.remove_failed(node.hostname, node.incarnation)
                if verdicts or removable:
                    await self.refresh()
            except DatabaseAway as error:
                self._observer.unread()
                if self.away_since is None:
                    self.away_since = self._clock()
                    log.warning("database_away", reason=str(error))


__all__ = ["Change", "ChangeKind", "Members", "Watcher", "refused"]
