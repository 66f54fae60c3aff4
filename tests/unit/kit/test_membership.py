"""A node's side of membership, against a real registry in the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from services.registry.grpc_api import RegistryApi
from services.registry.members import Members
from services.registry.store_memory import MemoryNodeStore
from tidings.api.registry.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from tidings.cluster.node import Node, NodeState
from tidings.kit import membership
from tidings.kit.channel import Channels
from tidings.kit.grpc_server import ClusterServer
from tidings.kit.identity import Caller
from tidings.kit.membership import Member, Refused
from tidings.kit.pki import CertificateAuthority
from tidings.kit.tasks import Tasks

KEYS = CertificateAuthority.from_secret("a secret that is long enough").issue(["tidings:node:n1"], "n1")
NODE = Node("n1", "i1", "127.0.0.11", 5777, ("router",), virtual_hosts=("example.org",))


class Registry:
    """A registry that can go away and come back, over one store."""

    def __init__(self) -> None:
        self.store = MemoryNodeStore()
        self.channels: list[Any] = []

    def start(self) -> None:
        self.members = Members(self.store, "registry", 5.0)
        self.server = ClusterServer([], 0, KEYS, lambda: b"", lambda _: None, Caller("local", "n1"))
        self.server.add(
            add_RegistryServiceServicer_to_server,
            RegistryApi(self.members, Channels(KEYS, "registry", None)),
            "tidings.api.registry.v1.RegistryService",
        )
        self.channels = [self.server.local_channel()]

    async def stop(self) -> None:
        await self.server._local.stop()


@pytest.fixture
async def registry(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Registry]:
    monkeypatch.setattr(membership, "BEAT", 0.02)
    monkeypatch.setattr(membership, "RETRY", 0.02)
    running = Registry()
    running.start()
    yield running
    await running.stop()


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    owner = Tasks()
    yield owner
    await owner.stop()


def member(registry: Registry, tasks: Tasks, node: Node = NODE, expelled: Any = lambda _why: None) -> Member:
    return Member(node, lambda: registry.channels, tasks, lambda: (1.0, 2.0), expelled)


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
    first = member(registry, tasks, expelled=lambda _why: told.set())
    await first.join(5)
    await registry.store.leave("n1", "i1")
    await asyncio.wait_for(told.wait(), 5)


async def test_without_any_registry_there_is_nothing_to_join(registry: Registry, tasks: Tasks) -> None:
    registry.channels = []
    with pytest.raises(Refused, match="--registry"):
        await member(registry, tasks).join(1)
