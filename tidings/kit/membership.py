"""A node's side of membership: it joins, beats, and keeps the view."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from enum import Enum, auto
from typing import Any

import grpc

from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.logging import get_logger
from tidings.kit.node_messages import node_into, state_message
from tidings.kit.probe import Outcome, probe, refused
from tidings.kit.rpc_errors import describe, reason
from tidings.kit.tasks import Tasks, is_cancelled
from tidings.kit.view_watch import ViewWatch

log = get_logger("cluster")

BEAT = 1.0
RETRY = 0.5
REPORT_PAUSE = 0.5
CALL_TIMEOUT = 5.0
BEAT_TIMEOUT = 2.0
PEER_TIMEOUT = 1.0
# Rounds of beats, about a second apart, that only peers could write down before this node leaves: after a stall of
# the database, or while it comes back, one is a little before the other.
ROUNDS = 3
# Seconds for joining, beside two leases: an old start of this node may have to stand still, and be cleaned up after.
JOIN_TIMEOUT = 10.0
# Seconds between two looks whether the peers reach this node, at first and at the most; and when it is worth a
# line in the log that they do not: at first they only have to learn of its certificate.
REACHED_PAUSES = (0.2, 1.0)
REACHED_LATE = 3.0


class Expelled(Enum):
    """Why this start of the node is over."""

    # The others take it for dead, or it must take itself for cut off: it has nothing to hand over any more.
    PUT_OUT = auto()
    # It is still a member, and leaves for its own reasons: it hands over what it has.
    LEAVES = auto()


class Answer(Enum):
    """What a registry made of our beat."""

    TOOK = auto()
    DATABASE_AWAY = auto()
    PUT_OUT = auto()
    SILENT = auto()


_ANSWERS: dict[int, Answer] = {
    ErrorReason.ERROR_REASON_DATABASE_AWAY: Answer.DATABASE_AWAY,
    ErrorReason.ERROR_REASON_NOT_A_MEMBER: Answer.PUT_OUT,
}
# A registry that answers so is not there, or can't do what another one may.
_NOT_THERE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
)


class Refused(Exception):
    """The cluster does not let this node in; the text says why."""


class Member:
    """This node in the cluster.

    Guaranteed: versions of `view` rise, unless the table itself was set back; while no registry answers, the last
    view holds. Not guaranteed: that every view between two is seen.
    """

    def __init__(
        self,
        node: Node,
        registries: Callable[[], Sequence[Any]],
        tasks: Tasks,
        load: Callable[[], tuple[float, float]],
        expelled: Callable[[str, Expelled], None],
        peers: Callable[[], list[tuple[Node, Any]]] = list,
        lease: float = 5.0,
        own_registry: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`registries`: channels, in the order in which to try them; with `own_registry` the first one is in this
        process. `load`: CPU and memory, in percent. `expelled` is told why this start of the node is over. `peers`:
        registries of other nodes, for when ours can do nothing."""
        self.node = node
        self._registries = registries
        self._tasks = tasks
        self._load = load
        self._expelled = expelled
        # The cluster has put this node out: what it had is others' by now.
        self.is_put_out = False
        self._peers = peers
        self._lease = lease
        self._own_registry = own_registry
        self._clock = clock
        # When a registry of ours has last taken a beat, and when any has.
        self._renewed = self._written = clock()
        # The registry that answered last.
        self._answered: Any = None
        self._state = NodeState.JOINING
        self._joined = False
        # Nodes that went and after which this one still cleans up, with the view that showed it.
        self._cleaning: dict[str, int] = {}
        # By incarnation: when it may be reported again.
        self._reported: dict[str, float] = {}
        # Incarnations that links of ours do not reach.
        self._unreachable: set[str] = set()
        self._watch = ViewWatch(registries, clock, self._of_peers)

    # --- joining and leaving ---

    async def join(self, patience: float) -> None:
        """Enters the cluster, within `patience` seconds. Raises Refused, TimeoutError."""
        request = pb.JoinRequest()
        node_into(self.node, request.node)
        told = False
        timeout = JOIN_TIMEOUT + 2 * self._lease
        deadline = self._clock() + patience
        while True:
            try:
                await self._ask(lambda stub: stub.Join(request, timeout=timeout))
                break
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise Refused(describe(error)) from None
                if self._clock() >= deadline:
                    raise TimeoutError(describe(error)) from None
                if not told:
                    told = True
                    log.info("waiting_for_registry", reason=describe(error))
            await asyncio.sleep(RETRY)
        self._joined = True
        self._renewed = self._written = self._clock()
        log.info(
            "node_joined",
            node=self.node.hostname,
            address=self.node.address,
            incarnation=self.node.incarnation,
        )
        self._tasks.spawn(self._beat(), "member: beat")
        self._tasks.spawn(self._watch.run(), "member: watch")

    async def reached(self, patience: float) -> None:
        """Waits until the routers and registries of the cluster reach this node at its own address. Raises Refused
        after `patience` seconds, with what to do."""
        request = pb.CheckReachedRequest(hostname=self.node.hostname, incarnation=self.node.incarnation)
        started = self._clock()
        pause, longest = REACHED_PAUSES
        told: list[str] = []
        while self._joined:
            why = (
                f"can't connect to this node at {self.node.address}:{self.node.port}; set --cluster-address to an "
                "address that peers reach, and let them through to --cluster-port"
            )
            try:
                by = list((await self._ask(lambda stub: stub.CheckReached(request, timeout=CALL_TIMEOUT))).not_by)
                if not by:
                    return
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    return  # registries of an earlier release, which let everybody in
                by, why = ["no registry"], f"tells whether peers reach this node: {describe(error)}"
            if self._clock() >= started + patience:
                raise Refused(f"{', '.join(by)} {why}")
            if by != told and self._clock() >= started + REACHED_LATE:
                told = by
                log.warning("not_reached", by=by, address=self.node.address, port=self.node.port)
            await asyncio.sleep(pause)
            pause = min(longest, pause * 1.5)

    async def set_state(self, state: NodeState) -> None:
        """Says in which state this node is."""
        self._state = state
        if self._joined:
            await self._beat_once()

    async def is_in(self) -> bool:
        """Whether the cluster has this node, asked now: a registry takes a beat of it. Also False when none can, or
        when that has taken so long that it may be different by now."""
        asked = self._clock()
        if self._joined:
            await self._beat_once()
        return self._joined and self._written >= asked and self._clock() - asked < self._lease / 2

    @property
    def unsure(self) -> bool:
        """Whether the cluster may have put this node out without its knowing: no registry has taken a beat for half
        of the time that this needs. It stood still, or is cut off, or the database is away; `is_in` finds out."""
        return self.is_put_out or (self._joined and self._clock() - self._written >= self._lease / 2)

    def reaches(self, node: Node) -> None:
        """A node has answered, and be it that it does not serve yet."""
        self._unreachable.discard(node.incarnation)

    def report(self, node: Node, observation: str) -> None:
        """Tells a registry that a node could not be reached: it looks whether that node is dead. May be called
        again and again; it tells at most once every REPORT_PAUSE seconds. Until `reaches` the beats say it too."""
        now = asyncio.get_running_loop().time()
        due = self._reported.get(node.incarnation, 0.0)
        if now < due or not self._joined or node.incarnation == self.node.incarnation:
            return
        if node.incarnation not in self._unreachable:
            self._unreachable.add(node.incarnation)
            self._tasks.spawn(self._beat_once(), "member: beat at once")
        self._reported = {one: until for one, until in self._reported.items() if until > now}
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
            channels = [*self._registries(), *self._of_peers()]
            await self._ask(lambda stub: stub.ReportUnreachable(request, timeout=CALL_TIMEOUT), channels)
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
            await self._ask(lambda stub: stub.Leave(request, timeout=BEAT_TIMEOUT))
            return
        except grpc.RpcError as error:
            failure = error
        # Ours may be cut off from the database.
        for stub in _stubs(self._of_peers()):
            try:
                await stub.Leave(request, timeout=PEER_TIMEOUT)
                return
            except grpc.RpcError as error:
                failure = error
            except grpc.aio.UsageError:
                continue  # its node has gone
        log.warning("leaving_not_told", reason=describe(failure))

    def _of_peers(self) -> list[Any]:
        """The registries of other nodes, for when ours are not there."""
        return [channel for _, channel in self._peers()]

    async def _ask(self, call: Callable[[Any], Awaitable[Any]], channels: Sequence[Any] | None = None) -> Any:
        """Asks the registries one after the other until one is there, first the one that was there last. A hung one
        may have done what it was asked: whatever is asked here may be repeated. `channels`: of these, not of ours."""
        failure: grpc.RpcError | None = None
        known = self._registries() if channels is None else channels
        ordered = sorted(known, key=lambda one: one is not self._answered)
        for channel, stub in zip(ordered, _stubs(ordered), strict=True):
            try:
                response = await call(stub)
            except grpc.aio.UsageError:
                continue  # its node has gone
            except grpc.RpcError as error:
                if error.code() not in _NOT_THERE:
                    raise
                failure = error
            else:
                self._answered = channel
                return response
        if failure is None:
            raise Refused("there is no registry to join through; set --registry, or run one here")
        raise failure

    # --- beating ---

    async def _beat(self) -> None:
        rounds = 0
        started = self._clock()
        while True:
            await asyncio.sleep(max(0.0, started + BEAT - self._clock()))
            started = self._clock()
            if not self._joined:
                continue
            rounds = rounds + 1 if await self._beat_once() else 0
            if rounds >= ROUNDS and self._own_registry and self._state is not NodeState.DRAINING:
                self._expelled("this node does not reach the database, and its peers do", Expelled.LEAVES)

    async def _beat_once(self) -> bool:
        """Says that this node lives, and finds out what is wrong when ours can't write it down (DESIGN 7, cuts).
        Returns whether a peer's registry could."""
        cpu, memory = self._load()
        request = pb.BeatRequest(
            hostname=self.node.hostname, incarnation=self.node.incarnation, state=state_message(self._state),
            cpu_usage=cpu, mem_usage=memory, cleaned_through=self.cleaned_through,
            unreachable=sorted(one for one in self._unreachable if self.view.by_incarnation(one) is not None),
        )  # fmt: skip
        if self._ours_fails():
            # Has failed for a while: to compare it with the peers', all are asked at the same moment.
            ours, *peers = await asyncio.gather(
                self._through_ours(request, PEER_TIMEOUT), *self._through_peers(request)
            )
        else:
            ours, peers = await self._through_ours(request, BEAT_TIMEOUT), []
            if ours is not Answer.TOOK and self._ours_fails():
                peers = await asyncio.gather(*self._through_peers(request))
        if Answer.TOOK in (ours, *peers):
            self._written = self._clock()
            return ours is not Answer.TOOK
        if Answer.PUT_OUT in (ours, *peers):
            self._put_out("the cluster has put this node out: it was silent, or cut off, for too long")
        elif Answer.DATABASE_AWAY not in peers and self._clock() - self._written >= self._lease:
            await self._look_for_peers()
        return False  # the database is away for all of us, or it will come: all goes on

    def _ours_fails(self) -> bool:
        return self._joined and self._clock() - self._renewed >= self._lease / 2

    async def _through_ours(self, request: pb.BeatRequest, timeout: float) -> Answer:
        """A beat by the registry of this process where there is one, or else by one of those that we were told of."""
        own = self._registries()[:1] if self._own_registry else None
        answer, response = await _answer(lambda: self._ask(lambda stub: stub.Beat(request, timeout=timeout), own))
        if response is not None:
            self._renewed = self._clock()
            self._watch.compare(response.view_version)
        return answer

    def _through_peers(self, request: pb.BeatRequest) -> list[Coroutine[Any, Any, Answer]]:
        """The same by the registries of all others."""

        async def through(stub: Any) -> Answer:
            return (await _answer(lambda: stub.Beat(request, timeout=PEER_TIMEOUT)))[0]

        return [through(stub) for stub in _stubs(self._of_peers())]

    async def _look_for_peers(self) -> None:
        others = [node for node in self.view if node.incarnation != self.node.incarnation]
        found = await asyncio.gather(*(probe(node.address, node.port) for node in others))
        # Somebody is there, and only the registries are not; or all are dead, and we are all that is left.
        if Outcome.SILENT in found and Outcome.ACCEPTED not in found:
            self._put_out("this node reaches neither the database nor any of its peers")

    def _put_out(self, why: str) -> None:
        if self._joined:
            log.error("put_out", node=self.node.hostname, incarnation=self.node.incarnation, reason=why)
            self._joined, self.is_put_out = False, True
            self._expelled(why, Expelled.PUT_OUT)

    # --- the view ---

    @property
    def view(self) -> ClusterView:
        """The last view that a registry has told."""
        return self._watch.view

    def on_change(self, listener: Callable[[ClusterView], None]) -> None:
        """Calls `listener` with each new view."""
        self._watch.on_change(listener)

    async def wait_until(self, condition: Callable[[ClusterView], bool], timeout: float) -> bool:
        """Waits for a view that meets a condition; False when none does in time."""
        return await self._watch.wait_until(condition, timeout)

    async def newer_view(self, timeout: float) -> bool:
        """Waits for any newer view; False when none comes in time."""
        version = self.view.version
        return await self.wait_until(lambda view: view.version != version, timeout)


def _stubs(channels: Sequence[Any]) -> list[Any]:
    """One for each channel, before anything is waited for: to make one for a channel that was closed meanwhile ends
    the process (grpcio 1.85). What is asked through one then raises UsageError."""
    return [RegistryServiceStub(channel) for channel in channels]


async def _answer(call: Callable[[], Awaitable[pb.BeatResponse]]) -> tuple[Answer, pb.BeatResponse | None]:
    """What becomes of a beat; its channel may be closed before or while it is under way."""
    try:
        return Answer.TOOK, await call()
    except grpc.RpcError as error:
        log.debug("beat_missed", reason=describe(error))
        return _ANSWERS.get(reason(error), Answer.SILENT), None
    except (asyncio.CancelledError, grpc.aio.UsageError):
        if is_cancelled():
            raise
        return Answer.SILENT, None
