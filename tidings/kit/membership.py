"""A node's side of membership: it joins, beats, and keeps the view."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any

import grpc

from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.logging import get_logger
from tidings.kit.node_messages import node_from, node_into, state_message
from tidings.kit.probe import refused
from tidings.kit.rpc_errors import describe, reason
from tidings.kit.tasks import Tasks

log = get_logger("cluster")

BEAT = 1.0
RETRY = 0.5
REPORT_PAUSE = 0.5
CALL_TIMEOUT = 5.0
BEAT_TIMEOUT = 2.0
PEER_TIMEOUT = 1.0
# Joining may have to wait until an old start of this node has stood still for the lease.
JOIN_TIMEOUT = 20.0


class Peer(Enum):
    """What a peer's registry made of our beat."""

    TOOK = auto()
    DATABASE_AWAY = auto()
    PUT_OUT = auto()
    SILENT = auto()


class Refused(Exception):
    """The cluster does not let this node in; the text says why."""


class Member:
    """This node in the cluster.

    Guaranteed: versions of `view` never fall within one registry's word; while no registry answers, the last
    view holds. Not guaranteed: that every view between two is seen.
    """

    def __init__(
        self,
        node: Node,
        registries: Callable[[], Sequence[Any]],
        tasks: Tasks,
        load: Callable[[], tuple[float, float]],
        expelled: Callable[[str], None],
        peers: Callable[[], list[tuple[Node, Any]]] = list,
        lease: float = 5.0,
        needs_database: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`registries`: channels, in the order in which to try them. `load`: CPU and memory, in percent. `expelled`
        is told why this start of the node is over. `peers`: registries of other nodes, for when ours can do
        nothing."""
        self.node = node
        self._registries = registries
        self._tasks = tasks
        self._load = load
        self._expelled = expelled
        self._peers = peers
        self._lease = lease
        self._needs_database = needs_database
        self._clock = clock
        self._renewed = clock()
        self._state = NodeState.JOINING
        self._listeners: list[Callable[[ClusterView], None]] = []
        self._changed = asyncio.Event()
        self._joined = False
        # Nodes that went and after which this one still cleans up, with the view that showed it.
        self._cleaning: dict[str, int] = {}
        # By incarnation: when it may be reported again.
        self._reported: dict[str, float] = {}
        self.view = ClusterView()

    # --- joining and leaving ---

    async def join(self, patience: float) -> None:
        """Enters the cluster, within `patience` seconds. Raises Refused, TimeoutError."""
        request = pb.JoinRequest()
        node_into(self.node, request.node)
        told = False
        async with asyncio.timeout(patience):
            while True:
                try:
                    await self._ask(lambda stub: stub.Join(request, timeout=JOIN_TIMEOUT))
                    break
                except grpc.RpcError as error:
                    code = error.code()
                    if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                        raise Refused(describe(error)) from None
                    if not told:
                        told = True
                        log.info("waiting_for_registry", reason=describe(error))
                await asyncio.sleep(RETRY)
        self._joined = True
        self._renewed = self._clock()
        log.info(
            "node_joined",
            node=self.node.hostname,
            address=self.node.address,
            incarnation=self.node.incarnation,
        )
        self._tasks.spawn(self._beat(), "member: beat")
        self._tasks.spawn(self._watch(), "member: watch")

    async def set_state(self, state: NodeState) -> None:
        """Says in which state this node is."""
        self._state = state
        if self._joined:
            await self._beat_once()

    def report(self, node: Node, observation: str) -> None:
        """Tells a registry that a node could not be reached: it looks whether that node is dead. May be called
        again and again; it tells at most once every REPORT_PAUSE seconds."""
        now = asyncio.get_running_loop().time()
        if now < self._reported.get(node.incarnation, 0.0) or not self._joined:
            return
        self._reported = {incarnation: due for incarnation, due in self._reported.items() if due > now}
        self._reported[node.incarnation] = now + REPORT_PAUSE
        self._tasks.spawn(self._report(node, observation), f"member: report {node.hostname}")

    async def _report(self, node: Node, observation: str) -> None:
        current = self.view.by_incarnation(node.incarnation)
        if current is None or current.state is NodeState.FAILED:
            return
        request = pb.ReportUnreachableRequest(
            hostname=node.hostname,
            incarnation=node.incarnation,
            observation=observation,
            refused=await refused(node.address, node.port),
        )
        try:
            await self._ask(lambda stub: stub.ReportUnreachable(request, timeout=CALL_TIMEOUT))
        except (grpc.RpcError, Refused) as error:
            log.debug("report_failed", node=node.hostname, reason=str(error))

    def cleaning(self, incarnation: str) -> None:
        """This node cleans up after one that went; its name is not given to another start before that is done."""
        self._cleaning.setdefault(incarnation, self.view.version)

    def cleaned(self, incarnation: str) -> None:
        """It has."""
        self._cleaning.pop(incarnation, None)

    @property
    def cleaned_through(self) -> int:
        """The view up to which nothing is left to clean up."""
        return min(self._cleaning.values()) - 1 if self._cleaning else self.view.version

    async def leave(self) -> None:
        """Leaves the cluster; what can't be said now the lease will say."""
        if not self._joined:
            return
        self._joined = False
        request = pb.LeaveRequest(hostname=self.node.hostname, incarnation=self.node.incarnation)
        try:
            await self._ask(lambda stub: stub.Leave(request, timeout=2.0))
        except grpc.RpcError as error:
            log.warning("leaving_not_told", reason=describe(error))

    async def _ask(self, call: Callable[[Any], Awaitable[Any]]) -> Any:
        """Asks the registries one after the other until one is there."""
        failure: grpc.RpcError | None = None
        for channel in self._registries():
            try:
                return await call(RegistryServiceStub(channel))
            except grpc.RpcError as error:
                code = error.code()
                if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
                    raise
                failure = error
        if failure is None:
            raise Refused("there is no registry to join through; set --registry, or run one here")
        raise failure

    # --- beating ---

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            if self._joined:
                await self._beat_once()

    async def _beat_once(self) -> None:
        cpu, memory = self._load()
        request = pb.BeatRequest(
            hostname=self.node.hostname, incarnation=self.node.incarnation, state=state_message(self._state),
            cpu_usage=cpu, mem_usage=memory, cleaned_through=self.cleaned_through,
        )  # fmt: skip
        try:
            await self._ask(lambda stub: stub.Beat(request, timeout=BEAT_TIMEOUT))
            self._renewed = self._clock()
        except grpc.RpcError as error:
            if reason(error) == ErrorReason.ERROR_REASON_NOT_A_MEMBER:
                self._put_out("the cluster has put this node out: it had been silent for too long")
                return
            log.debug("beat_missed", reason=describe(error))
            if self._joined and self._clock() - self._renewed >= self._lease / 2:
                await self._beat_through_peers(request)

    async def _beat_through_peers(self, request: pb.BeatRequest) -> None:
        """No registry of ours can write the beat: what peers say tells what is wrong (DESIGN 7, cuts)."""
        peers = self._peers()
        answers = await asyncio.gather(*(self._try_peer(channel, request) for _, channel in peers))
        if Peer.TOOK in answers:
            self._renewed = self._clock()
            if self._needs_database:
                self._put_out("this node does not reach the database, and its peers do")
            return
        if Peer.PUT_OUT in answers:
            self._put_out("the cluster has put this node out: it had been silent for too long")
            return
        if Peer.DATABASE_AWAY in answers or not peers:
            return  # the database is away for all of us, or there is nobody but us: all goes on
        if self._clock() - self._renewed < self._lease:
            return
        dead = await asyncio.gather(*(refused(node.address, node.port) for node, _ in peers))
        if not all(dead):
            self._put_out("this node reaches neither the database nor any of its peers")

    async def _try_peer(self, channel: Any, request: pb.BeatRequest) -> Peer:
        try:
            stub: Any = RegistryServiceStub(channel)
            await stub.Beat(request, timeout=PEER_TIMEOUT)
        except grpc.RpcError as error:
            why = reason(error)
            if why == ErrorReason.ERROR_REASON_DATABASE_AWAY:
                return Peer.DATABASE_AWAY
            return Peer.PUT_OUT if why == ErrorReason.ERROR_REASON_NOT_A_MEMBER else Peer.SILENT
        return Peer.TOOK

    def _put_out(self, why: str) -> None:
        if self._joined:
            log.error("put_out", node=self.node.hostname, incarnation=self.node.incarnation, reason=why)
            self._joined = False
            self._expelled(why)

    # --- the view ---

    def on_change(self, listener: Callable[[ClusterView], None]) -> None:
        """Calls `listener` with each new view."""
        self._listeners.append(listener)

    async def wait_until(self, condition: Callable[[ClusterView], bool], timeout: float) -> bool:
        """Waits for a view that meets a condition; False when none does in time."""
        try:
            async with asyncio.timeout(timeout):
                while not condition(self.view):
                    await self._next_view()
        except TimeoutError:
            return False
        return True

    async def newer_view(self, timeout: float) -> bool:
        """Waits for any newer view; False when none comes in time."""
        version = self.view.version
        return await self.wait_until(lambda view: view.version != version, timeout)

    async def _next_view(self) -> None:
        await self._changed.wait()

    async def _watch(self) -> None:
        """Follows the registry's view; when it goes away, the last view holds."""
        while True:
            for channel in self._registries():
                try:
                    stub: Any = RegistryServiceStub(channel)
                    call = stub.WatchNodes(pb.WatchNodesRequest(since=self.view.version))
                    async for update in call:
                        self._take(update)
                except grpc.RpcError as error:
                    log.debug("watch_ended", reason=describe(error))
            await asyncio.sleep(RETRY)

    def _take(self, update: pb.WatchNodesResponse) -> None:
        if update.HasField("snapshot"):
            view = ClusterView(update.view_version, [node_from(node) for node in update.snapshot.nodes])
        else:
            node = node_from(update.change.node)
            kind = update.change.kind
            log.debug(
                "node_changed",
                node=node.hostname,
                change=pb.NodeChangeKind.Name(kind),
                view=update.view_version,
            )
            if kind == pb.NodeChangeKind.NODE_CHANGE_KIND_LEFT:
                view = self.view.without(update.view_version, node)
            elif kind == pb.NodeChangeKind.NODE_CHANGE_KIND_FAILED:
                current = self.view.node(node.hostname)
                if current is not None and current.incarnation != node.incarnation:
                    view = ClusterView(update.view_version, self.view)
                else:
                    view = self.view.with_node(update.view_version, replace(node, state=NodeState.FAILED))
            else:
                view = self.view.with_node(update.view_version, node)
        self.view = view
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in self._listeners:
            listener(view)
