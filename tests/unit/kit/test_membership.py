"""A node's side of membership, against a real registry in the same process."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from services.registry.grpc_api import RegistryApi
from services.registry.members import Members
from services.registry.store_memory import MemoryNodeStore
from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.api.registry.v1.registry_pb2_grpc import (
    RegistryServiceServicer,
    add_RegistryServiceServicer_to_server,
)
from tidings.cluster.node import Node, NodeState
from tidings.kit import membership, view_watch
from tidings.kit.channel import Channels, dial
from tidings.kit.db import DatabaseAway
from tidings.kit.grpc_server import ClusterServer
from tidings.kit.identity import Caller
from tidings.kit.membership import Expelled, Member, Refused
from tidings.kit.pki import CertificateAuthority
from tidings.kit.tasks import Tasks

KEYS = CertificateAuthority.from_secret("a secret that is long enough").issue(["tidings:node:n1"], "n1")
NODE = Node("n1", "i1", "127.0.0.11", 5777, ("router",), virtual_hosts=("example.org",))


class Store(MemoryNodeStore):
    """A store whose database can be away."""

    away = False

    async def beat(self, *arguments: Any) -> bool:
        if self.away:
            raise DatabaseAway("away")
        return await super().beat(*arguments)


class Registry:
    """A registry that can go away and come back, over one store."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store()
        self.channels: list[Any] = []

    def start(self) -> None:
        self.members = Members(self.store, "registry", 5.0)
        self.server = server(RegistryApi(self.members, Channels(KEYS, "registry", None)))
        self.channels = [self.server.local_channel()]

    async def stop(self) -> None:
        await self.server._local.stop()


def server(*servicers: Any) -> ClusterServer:
    made = ClusterServer([], 0, KEYS, lambda: b"", lambda _: None, Caller("local", "n1"))
    for servicer in servicers:
        made.add(add_RegistryServiceServicer_to_server, servicer, "tidings.api.registry.v1.RegistryService")
    return made


class Hung(RegistryServiceServicer):
    """A registry that takes every call and answers none."""

    async def Join(self, request: Any, context: Any) -> Any:
        await asyncio.Event().wait()

    Beat = Leave = CheckReached = Join

    async def WatchNodes(self, request: Any, context: Any) -> AsyncIterator[pb.WatchNodesResponse]:
        await asyncio.Event().wait()
        yield pb.WatchNodesResponse()


@pytest.fixture
async def hung() -> AsyncIterator[Any]:
    """A channel to a registry that hangs."""
    running = server(Hung())
    yield running.local_channel()
    await running._local.stop()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines that a test can wait for."""
    for name in ("BEAT_TIMEOUT", "PEER_TIMEOUT", "JOIN_TIMEOUT", "CALL_TIMEOUT"):
        monkeypatch.setattr(membership, name, 0.1)
    monkeypatch.setattr(view_watch, "BEHIND", 0.1)


@pytest.fixture
async def registry(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Registry]:
    monkeypatch.setattr(membership, "BEAT", 0.02)
    monkeypatch.setattr(membership, "RETRY", 0.02)
    monkeypatch.setattr(view_watch, "RETRY", 0.02)
    running = Registry()
    running.start()
    yield running
    await running.stop()


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    owner = Tasks()
    yield owner
    await owner.stop()


def member(
    registry: Registry, tasks: Tasks, node: Node = NODE, expelled: Any = lambda _why, _how: None, peers: Any = list,
    clock: Callable[[], float] = time.monotonic,
) -> Member:  # fmt: skip
    return Member(node, lambda: registry.channels, tasks, lambda: (1.0, 2.0), expelled, peers, clock=clock)


async def test_who_joins_beats_and_sees_the_others(registry: Registry, tasks: Tasks) -> None:
    first, second = member(registry, tasks), member(registry, tasks, replace(NODE, hostname="n2", incarnation="i2"))
    await first.join(5)
    await second.join(5)
    await second.set_state(NodeState.UP)
    assert await first.wait_until(
        lambda view: view.node("n2") is not None and view.node("n2").state is NodeState.UP, 5
    )  # type: ignore[union-attr]
    seen = []
    first.on_change(lambda view: seen.append([node.hostname for node in view]))
    await second.leave()
    assert await first.wait_until(lambda view: view.node("n2") is None, 5)
    assert seen[-1] == ["n1"]
    async with asyncio.timeout(5):
        while (await registry.store.nodes())[1][0].beat < 3:
            await asyncio.sleep(0)


async def test_a_refusal_ends_the_start_with_its_reason(registry: Registry, tasks: Tasks) -> None:
    await member(registry, tasks).join(5)
    other = member(registry, tasks, replace(NODE, hostname="n2", incarnation="i2", virtual_hosts=("example.net",)))
    with pytest.raises(Refused, match="--virt-hosts"):
        await other.join(5)


async def test_a_registry_that_is_not_there_yet_is_waited_for(registry: Registry, tasks: Tasks) -> None:
    await registry.stop()
    joining = asyncio.get_running_loop().create_task(member(registry, tasks).join(5), name="join")
    await asyncio.sleep(0)
    registry.start()
    await joining
    with pytest.raises(TimeoutError):
        await registry.stop()
        await member(registry, tasks, replace(NODE, hostname="n3")).join(0.1)


async def test_with_the_registry_away_the_last_view_holds_and_it_is_found_again(
    registry: Registry, tasks: Tasks
) -> None:
    first = member(registry, tasks)
    await first.join(5)
    assert await first.wait_until(lambda view: len(view) == 1, 5)
    await registry.stop()
    view = first.view
    assert not await first.newer_view(0.1)
    assert first.view is view
    registry.start()
    await member(registry, tasks, replace(NODE, hostname="n2", incarnation="i2")).join(5)
    assert await first.wait_until(lambda view: len(view) == 2, 5)


async def test_who_was_put_out_is_told_once(registry: Registry, tasks: Tasks) -> None:
    told = asyncio.Event()
    first = member(registry, tasks, expelled=lambda _why, how: told.set() if how is Expelled.PUT_OUT else None)
    await first.join(5)
    await registry.store.leave("n1", "i1")
    await asyncio.wait_for(told.wait(), 5)


async def test_who_asks_whether_it_is_still_in_is_told_by_a_beat(registry: Registry, tasks: Tasks) -> None:
    told: list[Expelled] = []
    first = member(registry, tasks, expelled=lambda _why, how: told.append(how))
    assert not await first.is_in(), "it has not joined"
    await first.join(5)
    assert await first.is_in()
    registry.store.away = True
    assert not await first.is_in(), "nobody knows"
    assert told == []
    registry.store.away = False
    await registry.store.leave("n1", "i1")
    assert not await first.is_in()
    assert told == [Expelled.PUT_OUT]


async def test_who_has_not_beaten_for_long_is_unsure_whether_it_is_still_in_until_it_is_told(
    registry: Registry, tasks: Tasks
) -> None:
    ahead = 0.0
    first = member(registry, tasks, clock=lambda: time.monotonic() + ahead)
    assert not first.unsure, "it has not joined"
    await first.join(5)
    assert not first.unsure
    ahead = 2.6
    assert first.unsure, "it may have stood still for half a lease"
    assert await first.is_in()
    assert not first.unsure
    assert not first.is_put_out
    await registry.store.leave("n1", "i1")
    assert not await first.is_in()
    assert first.is_put_out
    assert first.unsure, "for good"


async def test_without_any_registry_there_is_nothing_to_join(registry: Registry, tasks: Tasks) -> None:
    registry.channels = []
    with pytest.raises(Refused, match="--registry"):
        await member(registry, tasks).join(1)


async def beats_more(store: Store, name: str = "n1", times: int = 3) -> None:
    """Waits until a node has beaten some more times."""
    async with asyncio.timeout(5):
        first = await beat_of(store, name)
        while await beat_of(store, name) < first + times:
            await asyncio.sleep(0.01)


async def beat_of(store: Store, name: str) -> int:
    return next(node.beat for node in (await store.nodes())[1] if node.hostname == name)


# --- a registry that hangs ---


async def test_a_registry_that_hangs_costs_nobody_their_place(
    registry: Registry, hung: Any, tasks: Tasks, short: None
) -> None:
    why: list[str] = []
    first = Member(
        NODE, lambda: [hung, *registry.channels], tasks, lambda: (1.0, 2.0), lambda what, _how: why.append(what),
        peers=lambda: [(NODE, registry.channels[0])], lease=0.5,
    )  # fmt: skip
    await first.join(5)
    assert await first.wait_until(lambda view: view.node("n1") is not None, 5)
    await beats_more(registry.store, times=30)
    assert why == []
    await first.leave()
    assert (await registry.store.nodes())[1] == []


async def test_the_watch_does_not_stay_with_a_registry_that_hangs(
    registry: Registry, hung: Any, tasks: Tasks, short: None
) -> None:
    first = Member(
        NODE, lambda: [hung, *registry.channels], tasks, lambda: (1.0, 2.0), lambda _why, _how: None, lease=0.5
    )
    await first.join(5)
    assert await first.wait_until(lambda view: view.node("n1") is not None, 5)
    await registry.members.join(replace(NODE, hostname="n2", incarnation="i2"))
    assert await first.wait_until(lambda view: view.node("n2") is not None, 5)


# --- no registry of its own ---


@pytest.fixture
async def theirs(registry: Registry) -> AsyncIterator[Registry]:
    """Another node's registry; the store is one, as the database is."""
    running = Registry(registry.store)
    running.start()
    yield running
    await running.stop()


async def test_while_its_registries_are_not_there_a_node_hears_of_the_others_from_theirs(
    registry: Registry, theirs: Registry, tasks: Tasks
) -> None:
    first = member(registry, tasks, peers=lambda: [(NODE, theirs.channels[0])])
    await first.join(5)
    assert await first.wait_until(lambda view: len(view) == 1, 5)
    await registry.stop()
    second = member(theirs, tasks, replace(NODE, hostname="n2", incarnation="i2"))
    await second.join(5)
    assert await first.wait_until(lambda view: len(view) == 2, 5)
    third = replace(NODE, hostname="n3", incarnation="i3", port=1)
    await member(theirs, tasks, third).join(5)
    assert await first.wait_until(lambda view: len(view) == 3, 5)
    looked: list[Node] = []
    told = asyncio.Event()

    async def look_soon(node: Node, *_: Any) -> None:
        looked.append(node)
        told.set()

    theirs.members.look_soon = look_soon  # type: ignore[method-assign]
    first.report(third, "connections are refused")
    async with asyncio.timeout(5):
        await told.wait()
    assert [node.hostname for node in looked] == ["n3"]


async def test_the_channel_of_a_node_that_went_while_another_one_was_watched_is_not_used(
    registry: Registry, theirs: Registry, tasks: Tasks
) -> None:
    """grpcio ends the process that makes a stub for a closed channel (drills, seed 163: three at one time)."""
    going = dial("127.0.0.1", 1, b"", KEYS, "registry")
    peers = [(NODE, theirs.channels[0]), (NODE, going)]
    first = member(registry, tasks, peers=lambda: peers)
    await first.join(5)
    await registry.stop()
    await member(theirs, tasks, replace(NODE, hostname="n2", incarnation="i2")).join(5)
    assert await first.wait_until(lambda view: len(view) == 2, 5)
    del peers[1:]
    await going.close()
    await theirs.stop()
    registry.start()
    await member(registry, tasks, replace(NODE, hostname="n3", incarnation="i3")).join(5)
    assert await first.wait_until(lambda view: len(view) == 3, 5)


async def test_a_registry_of_its_own_is_watched_again_when_it_is_back(
    registry: Registry, tasks: Tasks, hung: Any
) -> None:
    first = member(registry, tasks, peers=lambda: [(NODE, hung)])
    await first.join(5)
    assert await first.wait_until(lambda view: len(view) == 1, 5)
    await registry.stop()
    assert not await first.newer_view(0.1)
    registry.start()
    await member(registry, tasks, replace(NODE, hostname="n2", incarnation="i2")).join(5)
    assert await first.wait_until(lambda view: len(view) == 2, 5)


# --- the database of one node ---


def one_of_two(
    registry: Registry, other: Registry, tasks: Tasks, said: list[Expelled], own_registry: bool = True
) -> Member:
    """A node whose registry can be cut off from the database while that of a peer goes on."""
    return Member(
        NODE, lambda: registry.channels, tasks, lambda: (1.0, 2.0), lambda _why, how: said.append(how),
        peers=lambda: [(NODE, other.channels[0])], lease=0.1, own_registry=own_registry,
    )  # fmt: skip


@pytest.fixture
async def other(registry: Registry) -> AsyncIterator[Registry]:
    """A second registry, over the rows of the first."""
    running = Registry()
    running.store._rows = registry.store._rows
    running.start()
    yield running
    await running.stop()


async def test_who_does_not_reach_the_database_leaves_when_a_peer_does_again_and_again(
    registry: Registry, other: Registry, tasks: Tasks
) -> None:
    said: list[Expelled] = []
    await one_of_two(registry, other, tasks, said).join(5)
    registry.store.away = True
    async with asyncio.timeout(5):
        while not said:
            await asyncio.sleep(0.01)
    assert said[0] is Expelled.LEAVES


async def test_a_database_that_comes_back_to_a_peer_a_little_sooner_makes_nobody_leave(
    registry: Registry, other: Registry, tasks: Tasks
) -> None:
    said: list[Expelled] = []
    took = 0

    async def beat(*arguments: Any) -> bool:
        # It stalls; after two rounds in which the peer was faster all is well.
        nonlocal took
        took += 1
        registry.store.away = took % 3 != 2
        return await MemoryNodeStore.beat(other.store, *arguments)

    other.store.beat = beat  # type: ignore[method-assign]
    await one_of_two(registry, other, tasks, said).join(5)
    for _ in range(3):
        registry.store.away = True
        before = took
        async with asyncio.timeout(5):
            while took < before + 2:
                await asyncio.sleep(0.01)
        await beats_more(registry.store)
    assert said == []


async def test_who_has_no_registry_of_its_own_says_nothing_about_the_database(
    registry: Registry, other: Registry, tasks: Tasks
) -> None:
    said: list[Expelled] = []
    await one_of_two(registry, other, tasks, said, own_registry=False).join(5)
    registry.store.away = True
    await beats_more(other.store, times=20)
    assert said == []


# --- being reached ---


async def test_who_joins_through_a_registry_of_an_earlier_release_is_not_looked_at(
    registry: Registry, tasks: Tasks
) -> None:
    first = member(registry, tasks)
    await first.join(5)
    registry.channels = [server().local_channel()]
    await asyncio.wait_for(first.reached(60), 5)


async def test_waiting_to_be_reached_ends_though_no_registry_answers(
    registry: Registry, hung: Any, tasks: Tasks, short: None
) -> None:
    first = member(registry, tasks)
    await first.join(5)
    registry.channels = [hung]
    with pytest.raises(Refused, match="no registry"):
        await asyncio.wait_for(first.reached(0.3), 5)


# --- what ends a call without a word ---


async def test_a_channel_that_is_closed_under_a_beat_does_not_end_the_beats(registry: Registry, tasks: Tasks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = dial("127.0.0.1", silent.getsockname()[1], KEYS.certificate, KEYS)
        asked = asyncio.Event()

        def peers() -> list[tuple[Node, Any]]:
            asked.set()
            return [(NODE, peer)]

        first = Member(
            NODE, lambda: registry.channels, tasks, lambda: (1.0, 2.0), lambda _why, _how: None, peers, lease=0.1
        )
        await first.join(5)
        registry.store.away = True
        await asyncio.wait_for(asked.wait(), 5)
        await peer.close()
        registry.store.away = False
        await beats_more(registry.store)


# --- a newer release ---


async def test_what_only_a_newer_release_knows_ends_no_watch(registry: Registry, tasks: Tasks) -> None:
    class Newer(RegistryApi):
        async def WatchNodes(self, request: Any, context: Any) -> AsyncIterator[pb.WatchNodesResponse]:
            unknown = pb.WatchNodesResponse(view_version=1)
            unknown.change.kind = 99  # type: ignore[assignment]
            unknown.change.node.hostname = "n8"
            unknown.change.node.state = 98  # type: ignore[assignment]
            yield unknown
            nothing = pb.WatchNodesResponse(view_version=2)
            nothing.change.node.hostname = "n9"
            yield nothing
            await asyncio.Event().wait()

    registry.channels = [server(Newer(registry.members, Channels(KEYS, "registry", None))).local_channel()]
    first = member(registry, tasks)
    await first.join(5)
    assert await first.wait_until(lambda view: view.version == 2, 5)
    assert [(node.hostname, node.state) for node in first.view] == [("n8", NodeState.SUSPECT)]


# --- joining that takes long ---


async def test_joining_may_take_two_leases(registry: Registry, tasks: Tasks, short: None) -> None:
    """An old start of the node has to stand still for one, and may be cleaned up after for another."""
    asked = 0

    class Waiting(RegistryApi):
        async def Join(self, request: Any, context: Any) -> Any:
            nonlocal asked
            asked += 1
            for _ in range(8):
                await asyncio.sleep(0.05)
            return await super().Join(request, context)

    registry.channels = [server(Waiting(registry.members, Channels(KEYS, "registry", None))).local_channel()]
    first = Member(NODE, lambda: registry.channels, tasks, lambda: (1.0, 2.0), lambda _why, _how: None, lease=0.5)
    await first.join(0.1)
    assert asked == 1
