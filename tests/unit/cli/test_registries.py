"""Commands go on when the registry goes that they talk to; and show what nodes say of themselves as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from io import StringIO
from typing import Any

import grpc
import pytest
from rich.console import Console

from services.registry.grpc_api import RegistryApi
from services.registry.members import Members
from services.registry.store_memory import MemoryNodeStore
from tidings.api.registry.v1.registry_pb2 import DESCRIPTOR, NodeChangeKind
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub, add_RegistryServiceServicer_to_server
from tidings.cli.app import Unreachable, make_table
from tidings.cli.client import channel, channels_to_registries
from tidings.cli.drain import _is_there
from tidings.cli.nodes import HEADER, _cells, _happened, _row, _tell, _updates
from tidings.cluster.node import Node, NodeState
from tidings.kit.channel import Channels
from tidings.kit.grpc_server import ClusterServer
from tidings.kit.identity import Caller, Identities
from tidings.kit.options import Options, load
from tidings.kit.pki import CertificateAuthority, normalised
from tidings.testing.server import free_port

SECRET = "a secret that is long enough"
AUTHORITY = CertificateAuthority.from_secret(SECRET)


class Registry:
    """One registry of a cluster, on an address of its own."""

    def __init__(self, name: str, address: str, port: int, store: MemoryNodeStore) -> None:
        keys = AUTHORITY.issue([f"tidings:node:{name}"], name)
        self.node = Node(
            name, f"{name}-1", address, port, ("registry",), virtual_hosts=("localhost",),
            certificate=normalised(keys.certificate),
        )  # fmt: skip
        self.members = Members(store, self.node.incarnation, lease=5.0)
        identities = Identities([AUTHORITY])
        self.server = ClusterServer(
            [address], port, keys, lambda: AUTHORITY.pem, lambda leaf: identities.identify(leaf, self.members.view),
            Caller("local", name),
        )  # fmt: skip
        self.server.add(
            add_RegistryServiceServicer_to_server,
            RegistryApi(self.members, Channels(keys, self.node.incarnation, None)),
            DESCRIPTOR.services_by_name["RegistryService"].full_name,
        )

    async def start(self) -> None:
        await self.server.start()
        await self.members.join(self.node)


class World:
    def __init__(self, options: Options, first: Registry, second: Registry) -> None:
        self.options = options
        self.first = first
        self.second = second


@pytest.fixture
async def world() -> AsyncIterator[World]:
    port, store = free_port("127.0.0.1"), MemoryNodeStore()
    made = World(
        load([f"--cluster-secret={SECRET}", "--bind-address=127.0.0.11", f"--cluster-port={port}", "--config="], {}),
        Registry("r1", "127.0.0.11", port, store),
        Registry("r2", "127.0.0.12", port, store),
    )
    await made.first.start()
    await made.second.start()
    yield made
    await made.first.server.stop(0)
    await made.second.server.stop(0)


async def test_a_watch_goes_on_at_another_registry_from_where_it_was(world: World) -> None:
    async with aclosing(_updates(world.options, for_ever=True)) as updates:
        first = await anext(updates)
        assert [node.hostname for node in first.snapshot.nodes] == ["r1", "r2"]
        await world.first.server.stop(0)
        await world.second.members.join(replace(world.second.node, hostname="c1", incarnation="c1-1", certificate=""))
        news = await anext(updates)
        assert (news.change.node.hostname, news.change.kind) == ("c1", NodeChangeKind.NODE_CHANGE_KIND_JOINED)
        assert news.view_version == first.view_version + 1


async def test_a_watch_of_a_registry_that_was_never_there_ends(world: World) -> None:
    await world.first.server.stop(0)
    with pytest.raises(Unreachable):
        async with aclosing(_updates(world.options, for_ever=True)) as updates:
            await anext(updates)


async def test_whether_a_node_has_left_is_known_by_the_registries_that_are_there(world: World) -> None:
    async with channel(world.options) as opened, channels_to_registries(world.options, [world.second.node]) as others:
        asked: list[Any] = [RegistryServiceStub(opened), *map(RegistryServiceStub, others)]
        assert await _is_there("r1-1", asked, own_registry=True)
        await world.first.server.stop(0)
        assert await _is_there("r1-1", asked, own_registry=True), "the other one still knows it"
        await world.second.members.leave("r1", "r1-1")
        assert not await _is_there("r1-1", asked, own_registry=True)
        await world.second.server.stop(0)
        assert not await _is_there("r1-1", asked, own_registry=True), "it was the last one"
        with pytest.raises(grpc.aio.AioRpcError):
            await _is_there("c1-1", asked, own_registry=False)


@pytest.mark.parametrize("text", ["[/x]", "[red]n1[/]", "[bold", "n1[example.org]"])
def test_what_a_node_calls_itself_is_shown_as_it_is(text: str) -> None:
    node = Node(text, "i1", "127.0.0.11", 5777, (text,), version=text, strategy=text)
    shown = StringIO()
    console = Console(file=shown, width=200)
    console.print(make_table(HEADER, [_cells(_row(node))]))
    assert shown.getvalue().count(text) == 4
    _tell(console, None, [], "failed", _row(node), 7, as_json=False)
    assert f"view 7  {text}  failed" in shown.getvalue()


def test_a_whole_list_says_what_became_of_each_node_since() -> None:
    """`make cluster` said of a node that was killed that it is there: the next one was asked, and told of all."""

    def listed(**states: NodeState) -> dict[str, dict[str, Any]]:
        return {name: _row(Node(name, f"{name}-1", "127.0.0.1", 5777, state=state)) for name, state in states.items()}

    up = listed(n1=NodeState.UP, n2=NodeState.UP, n3=NodeState.UP)
    now = listed(n1=NodeState.FAILED, n2=NodeState.UP, n4=NodeState.JOINING)
    assert [(what, row["hostname"]) for what, row in _happened({}, now)] == [
        ("failed", "n1"), ("is there", "n2"), ("is there", "n4"),
    ]  # fmt: skip
    assert [(what, row["hostname"]) for what, row in _happened(up, now)] == [
        ("failed", "n1"), ("is there", "n4"), ("left", "n3"),
    ]  # fmt: skip
