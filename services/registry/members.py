"""The rules of joining, and the registry's own copy of the view."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from services.registry.failure import Observer
from services.registry.store import Change, ChangeKind, NodeStore
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.probe import refused
from tidings.kit.rpc_errors import TidingsError

log = get_logger("registry")

# Seconds between two reads of the table.
LOOK = 0.3
# Seconds for another registry to look at a node.
CONFIRM_TIMEOUT = 1.0
# Times that a join is tried again when another one was faster.
TRIES = 10

# What a watcher gets: the change and the node as it is after it (before it, for LEFT).
Watcher = Callable[[Change, Node, ClusterView], None]


async def _nobody_confirms(_asked: Node, _node: Node) -> bool:
    return False


def _own_task(work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(work, name=name)


class Members:
    """Applies the rules over the store, and tells watchers what changes."""

    def __init__(
        self,
        store: NodeStore,
        own_incarnation: str,
        lease: float,
        clock: Callable[[], float] = time.monotonic,
        probe: Callable[[str, int], Awaitable[bool]] = refused,
        confirm: Callable[[Node, Node], Awaitable[bool]] = _nobody_confirms,
        spawn: Callable[[Coroutine[Any, Any, Any], str], Any] = _own_task,
    ) -> None:
        """`probe` finds out whether a connection is refused; `confirm` has another registry's node do it (the
        node that is asked, the node that is looked at)."""
        self._store = store
        self._lease = lease
        self._clock = clock
        self._probe = probe
        self._confirm = confirm
        self._spawn = spawn
        self._own = own_incarnation
        self._looking: set[str] = set()
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
                await self._check_cleaned(present)
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

    async def _check_cleaned(self, old: Node) -> None:
        """A name is free when every router has cleaned up after its old start; who does not say so within the lease
        is passed over: incarnations keep old and new apart."""
        version, _ = await self._store.nodes()
        deadline = self._clock() + self._lease
        while True:
            _, nodes = await self._store.nodes()
            behind = [
                other.hostname
                for other in nodes
                if "router" in other.services
                and other.state in (NodeState.UP, NodeState.SUSPECT, NodeState.DRAINING)
                and other.incarnation != old.incarnation
                and other.cleaned < version
            ]
            if not behind or "router" not in old.services:
                return
            if self._clock() >= deadline:
                log.warning("not_cleaned_up", node=old.hostname, incarnation=old.incarnation, passed_over=behind)
                return
            await asyncio.sleep(LOOK)

    # --- the others' calls ---

    async def beat(
        self, hostname: str, incarnation: str, state: NodeState, cpu: float, memory: float, cleaned: int = 0
    ) -> bool:
        before = self.view.by_incarnation(incarnation)
        alive = await self._store.beat(hostname, incarnation, state, cpu, memory, cleaned)
        if alive and (before is None or before.state is not state):
            await self.refresh()
        return alive

    async def leave(self, hostname: str, incarnation: str) -> None:
        await self._store.leave(hostname, incarnation)
        await self.refresh()

    # --- proof of death ---

    async def look_at(self, node: Node, reporter: str = "", reporter_was_refused: bool = False) -> bool:
        """Looks whether a node is dead, and says so when it is proven: this registry, and one more node where there
        is one, find a new connection refused while the beat stands still. Raises DatabaseAway."""
        if node.incarnation in self._looking or node.incarnation == self._own:
            return False
        self._looking.add(node.incarnation)
        try:
            _, nodes = await self._store.nodes()
            row = next((other for other in nodes if other.incarnation == node.incarnation), None)
            if row is None or row.state is NodeState.FAILED:
                await self.refresh()
                return False
            if not await self._probe(row.address, row.port):
                return False
            witness = reporter_was_refused and reporter not in ("", self._own, row.incarnation)
            if not witness and not await self._confirmed(row, nodes):
                return False
            failed = await self._store.mark(row.hostname, row.incarnation, row.beat, NodeState.FAILED)
            if failed:
                log.warning("node_failed", node=row.hostname, incarnation=row.incarnation, proof="connection refused")
            await self.refresh()
            return failed
        finally:
            self._looking.discard(node.incarnation)

    async def look_soon(self, node: Node, reporter: str = "", refused: bool = False) -> None:
        """The same as a task of its own."""
        try:
            await self.look_at(node, reporter, refused)
        except DatabaseAway:
            pass  # nothing can be proven now

    async def _confirmed(self, node: Node, nodes: list[Node]) -> bool:
        """Whether a second node finds it refused too; true when there is none to ask."""
        others = [
            other
            for other in nodes
            if other.incarnation not in (self._own, node.incarnation)
            and other.state is not NodeState.FAILED
            and "registry" in other.services
        ]
        if not others:
            return True
        unreachable = 0
        for other in others:
            try:
                async with asyncio.timeout(CONFIRM_TIMEOUT):
                    return await self._confirm(other, node)
            except TimeoutError:
                unreachable += 1
        # None of them can be asked: then they may be dead themselves, each with its own proof.
        return all([await self._probe(other.address, other.port) for other in others])

    # --- the view ---

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Calls `watcher` with each change from now on; the result takes it off again."""
        self._watchers.add(watcher)
        return lambda: self._watchers.discard(watcher)

    async def changes(self, since: int) -> list[Change] | None:
        """The changes behind a version; None when they are no longer all known. Raises DatabaseAway."""
        return await self._store.changes(since)

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
                log.debug("node_changed", node=change.hostname, change=change.kind.value, view=change.version)
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
                for node in self._observer.late(self._clock()):
                    self._spawn(self.look_soon(node), "look at a node")
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


__all__ = ["Change", "ChangeKind", "Members", "Watcher"]
