"""The rules of joining, and the registry's own copy of the view."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from services.registry.failure import LATE, Observer
from services.registry.store import Change, NodeStore, after
from services.registry.witnesses import Ask, Probe, Witnesses
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.probe import Outcome, probe
from tidings.kit.rpc_errors import TidingsError

log = get_logger("registry")

# Seconds between two reads of the table, and for one that somebody waits for: then the last view must do.
LOOK = 0.3
READ_TIMEOUT = 1.0
# Times that a join is tried again when another one was faster.
TRIES = 10

# What a watcher gets: the change and the node as it is after it (before it, for LEFT).
Watcher = Callable[[Change, Node, ClusterView], None]


async def _nobody_to_ask(_asked: Node, _node: Node) -> Outcome:
    raise TimeoutError


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
        probe: Probe = probe,
        ask: Ask = _nobody_to_ask,
        spawn: Callable[[Coroutine[Any, Any, Any], str], Any] = _own_task,
    ) -> None:
        self._store = store
        self._lease = lease
        self._clock = clock
        self._spawn = spawn
        self._own = own_incarnation
        self._looking: set[str] = set()
        self._writing: set[str] = set()
        self._observer = Observer(own_incarnation, lease)
        self._witnesses = Witnesses(own_incarnation, probe, ask)
        self._reading = asyncio.Lock()
        # By watcher: what tells it that no more comes.
        self._watchers: dict[Watcher, Callable[[], None]] = {}
        # The table has been read once; an empty one has version 0 too.
        self._known = False
        self.view = ClusterView()
        # Since when the database answers no more; None while it does.
        self.away_since: float | None = None

    # --- joining ---

    async def join(self, node: Node) -> int:
        """Enters a node. Raises TidingsError when the rules forbid it, DatabaseAway."""
        check = partial(_check_alike, node)
        for _ in range(TRIES):
            _, nodes = await self._store.nodes()
            present = next((other for other in nodes if other.hostname == node.hostname), None)
            check([other for other in nodes if other is not present])
            if present is not None and present.incarnation == node.incarnation:
                return (await self.refresh()).version
            if present is not None and not await self._made_free(present, node):
                continue
            version = await self._store.join(node, present, check)
            if version is not None:
                await self.refresh()
                return version
        raise TidingsError(ErrorReason.ERROR_REASON_NAME_TAKEN, f"{node.hostname} is being taken by others")

    async def _made_free(self, present: Node, node: Node) -> bool:
        """Two starts under one name: the old one must be dead, known to be, and cleaned up after. False when its row
        has changed meanwhile."""
        if present.state is not NodeState.FAILED:
            await self._check_gone(present, node)
            if not await self._mark(present, NodeState.FAILED, "another start of it joins"):
                return False
        await self._check_cleaned(present)
        return True

    async def _check_gone(self, present: Node, node: Node) -> None:
        """Waits until the old start can't be alive: its beat stands still for the lease, or for less where a newcomer
        listens at its address, or nobody does. Either may be an error: two hosts may claim one address, and a
        firewall may refuse us. Raises TidingsError when it beats."""
        replaced = (present.address, present.port) == (node.address, node.port)
        dead = replaced or await self._witnesses.here(present) is Outcome.REFUSED
        wait = min(LATE, self._lease) if dead else self._lease
        if replaced and node.host and node.host == present.host:
            wait = 0.0  # one host, one address: only one of two can listen there
        deadline = self._clock() + wait - self._observer.stood(present, self._clock())
        while self._clock() < deadline:
            await asyncio.sleep(min(LOOK, wait / 4))
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
        self,
        hostname: str,
        incarnation: str,
        state: NodeState,
        cpu: float,
        memory: float,
        cleaned: int = 0,
        unreachable: tuple[str, ...] = (),
    ) -> bool:
        before = self.view.by_incarnation(incarnation)
        alive = await self._store.beat(hostname, incarnation, state, cpu, memory, cleaned, unreachable)
        if alive and (before is None or before.state is not state):
            await self.refresh()
        return alive

    async def leave(self, hostname: str, incarnation: str) -> None:
        await self._store.leave(hostname, incarnation)
        await self.refresh()

    async def not_reached_by(self, node: Node) -> list[str]:
        """The routers and registries of the cluster that do not get through to a node that joins, by name."""
        return await self._witnesses.not_reaching(node, self.view)

    # --- death ---

    async def look_at(self, node: Node, reporter: str = "", reporter_was_refused: bool = False) -> bool:
        """Looks whether a node is dead, and says so when it is proven: new connections to it are refused while its
        beat stands still. Raises DatabaseAway."""
        if node.incarnation in self._looking or node.incarnation == self._own:
            return False
        self._looking.add(node.incarnation)
        try:
            _, nodes = await self._store.nodes()
            row = next((other for other in nodes if other.incarnation == node.incarnation), None)
            if row is None or row.state is NodeState.FAILED:
                await self.refresh()
                return False
            late = self._observer.stood(row, self._clock()) >= LATE
            witness = reporter if reporter_was_refused else ""
            if not await self._witnesses.prove_dead(row, nodes, witness, late):
                return False
            return await self._mark(row, NodeState.FAILED, "connections are refused")
        finally:
            self._looking.discard(node.incarnation)

    async def look_soon(self, node: Node, reporter: str = "", refused: bool = False) -> None:
        """The same as a task of its own."""
        await self._unharmed(self.look_at(node, reporter, refused))

    async def _unharmed(self, work: Awaitable[Any]) -> None:
        """Does something that the next look does again, whatever comes of it now."""
        try:
            await work
        except DatabaseAway as error:
            log.debug("database_away", reason=str(error))
        except Exception:
            log.exception("look_failed")

    async def _mark(self, node: Node, state: NodeState, reason: str) -> bool:
        """Says what a node is, if its beat is still this one."""
        marked = await self._store.mark(node.hostname, node.incarnation, node.beat, state)
        if marked:
            log.warning(f"node_{state.value}", node=node.hostname, incarnation=node.incarnation, reason=reason)
        await self.refresh()
        return marked

    # --- the view ---

    def watch(self, watcher: Watcher, over: Callable[[], None]) -> Callable[[], object]:
        """Calls `watcher` with each change from now on; the result takes it off again. Calls `over` when there are
        changes that nobody knows any more: who watches must begin anew."""
        self._watchers[watcher] = over
        return partial(self._watchers.pop, watcher, None)

    async def latest(self) -> tuple[ClusterView, bool]:
        """The view as it is now; or, and then False, as it was when the database last answered."""
        if self.away_since is None:
            try:
                async with asyncio.timeout(READ_TIMEOUT):
                    return await self.refresh(), True
            except (DatabaseAway, TimeoutError):
                pass
        return self.view, False

    async def changes(self, since: int) -> list[Change] | None:
        """The changes behind a version; None when they are no longer all known. Raises DatabaseAway."""
        return await self._store.changes(since)

    async def refresh(self) -> ClusterView:
        """Reads the table and tells the watchers what is new. Raises DatabaseAway."""
        async with self._reading:
            before = self.view
            version, nodes = await self._store.nodes()
            changes = await self._store.changes(before.version) if self._known else []
            self._known = True
            self.view = view = ClusterView(version, nodes)
            if changes is None:
                # Too many; or the database has been set back to an earlier state.
                log.warning("changes_unknown", view=version, before=before.version)
                for over in list(self._watchers.values()):
                    over()
            for change in changes or ():
                node = view.by_incarnation(change.incarnation) or before.by_incarnation(change.incarnation)
                log.debug("node_changed", node=change.hostname, change=change.kind.value, view=change.version)
                if node is not None and change.version <= version:
                    for watcher in list(self._watchers):
                        watcher(change, after(change, node), view)
            return view

    async def run(self) -> None:
        """Looks at the table, over and over, and judges who stands still."""
        while True:
            await asyncio.sleep(LOOK)
            try:
                view = await self.refresh()
            except DatabaseAway as error:
                self._observer.unread()
                if self.away_since is None:
                    self.away_since = self._clock()
                    log.warning("database_away", reason=str(error))
            except Exception:
                # Whatever it is, nobody is dead for it, and the next look may go well.
                self._observer.unread()
                log.exception("look_failed")
            else:
                if self.away_since is not None:
                    log.info("database_back", away_s=round(self._clock() - self.away_since, 1))
                    self.away_since = None
                self._judge(view)

    def _judge(self, view: ClusterView) -> None:
        verdicts, removable = self._observer.look(view, self._clock())
        for node in self._observer.late(self._clock()):
            self._spawn(self.look_soon(node), "look at a node")
        for verdict in verdicts:
            node = verdict.node
            self._write(node, partial(self._mark, node, verdict.state, verdict.reason or "no beat"))
        for node in removable:
            self._write(node, partial(self._store.remove_failed, node.hostname, node.incarnation))

    def _write(self, node: Node, change: Callable[[], Awaitable[Any]]) -> None:
        """Changes a row as a task of its own: one that is locked must not hold up the look at the others."""
        if node.incarnation not in self._writing:
            self._writing.add(node.incarnation)
            self._spawn(self._write_now(node, change), f"change the row of {node.hostname}")

    async def _write_now(self, node: Node, change: Callable[[], Awaitable[Any]]) -> None:
        try:
            await self._unharmed(change())
        finally:
            self._writing.discard(node.incarnation)


def _check_alike(node: Node, others: Sequence[Node]) -> None:
    """All nodes of a cluster serve the same hosts, by the same strategy and nearly the same protocol; and each start
    of one has an incarnation of its own. Raises TidingsError."""
    for other in others:
        if other.incarnation == node.incarnation:
            raise TidingsError(
                ErrorReason.ERROR_REASON_EXISTS, f"{other.hostname} has the incarnation {node.incarnation}"
            )
        if other.state is NodeState.FAILED:
            continue
        if abs(other.protocol - node.protocol) > 1:
            raise TidingsError(
                ErrorReason.ERROR_REASON_PROTOCOL_DIFFERS,
                f"{other.hostname} speaks protocol {other.protocol}, this node {node.protocol}; run releases that "
                "follow each other",
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
