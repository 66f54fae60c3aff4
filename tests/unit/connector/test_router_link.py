"""The links of connectors and components to routers: how long they are kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from services.connector import router_link
from services.connector.limits import Addresses
from services.connector.router_link import RouterLinks
from services.connector.streams import Streams
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.component.v1 import component_pb2
from tidings.api.component.v1.component_pb2_grpc import (
    ComponentServiceServicer,
    add_ComponentServiceServicer_to_server,
)
from tidings.api.registry.v1.registry_pb2 import WatchNodesResponse
from tidings.api.router.v1 import router_pb2
from tidings.api.router.v1.router_pb2_grpc import RouterServiceServicer, add_RouterServiceServicer_to_server
from tidings.cluster.node import Node, NodeState
from tidings.kit import component
from tidings.kit.channel import Channels
from tidings.kit.component import Component
from tidings.kit.grpc_server import ClusterServer
from tidings.kit.identity import Caller
from tidings.kit.membership import Member
from tidings.kit.node_messages import node_into
from tidings.kit.pki import CertificateAuthority, normalised
from tidings.kit.rpc_errors import TidingsError
from tidings.kit.tasks import Tasks
from tidings.testing.server import free_port

KEYS = CertificateAuthority.from_secret("a secret that is long enough").issue(["tidings:node:r1"], "r1")
OWN = Node("c1", "c", "127.0.0.1", 5777, ("connector", "weather"), NodeState.UP)


class Calls:
    """Welcomes who attaches, and says nothing more; counts the calls."""

    def __init__(self, welcome: Any) -> None:
        self._welcome = welcome
        self.refuses = False
        self.open = 0
        self.ever = 0

    async def Attach(self, requests: Any, context: Any) -> None:
        await context.read()
        if self.refuses:
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_SERVING, "the router is starting or stopping")
        self.open += 1
        self.ever += 1
        try:
            await context.write(self._welcome)
            while await context.read() is not grpc.aio.EOF:
                pass
        finally:
            self.open -= 1


class Router(Calls, RouterServiceServicer):
    pass


class Components(Calls, ComponentServiceServicer):
    pass


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    owner = Tasks()
    yield owner
    await owner.stop()


@pytest.fixture
async def channels() -> AsyncIterator[Channels]:
    made = Channels(KEYS, OWN.incarnation, None)
    yield made
    await made.close()


@pytest.fixture(params=["connector", "component"])
async def attached(
    request: pytest.FixtureRequest, tasks: Tasks, channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Calls, Member, Node, dict[str, Any]]]:
    """What counts the calls, the member whose view decides, the router, and the links to it."""
    monkeypatch.setattr(router_link, "RETRY", 0.02)
    monkeypatch.setattr(component, "RETRY", 0.02)
    member = Member(OWN, list, tasks, lambda: (0.0, 0.0), lambda _why, _how: None)
    router = Router(router_pb2.AttachResponse(welcome=router_pb2.AttachWelcome(router_incarnation="r")))
    components = Components(component_pb2.AttachResponse(registered=component_pb2.Registered()))
    port = free_port("127.0.0.1")
    server = ClusterServer(
        ["127.0.0.1"], port, KEYS, lambda: KEYS.certificate,
        lambda _: Caller("node", "c1", frozenset(OWN.services)), Caller("local", "r1"),
    )  # fmt: skip
    server.add(add_RouterServiceServicer_to_server, router, "tidings.api.router.v1.RouterService")
    server.add(add_ComponentServiceServicer_to_server, components, "tidings.api.component.v1.ComponentService")
    await server.start()
    node = Node("r1", "r", "127.0.0.1", port, ("router",), NodeState.UP, certificate=normalised(KEYS.certificate))
    show(member, 1, node)
    if request.param == "connector":
        streams = Streams(
            lambda stream: links.choose(stream),
            lambda name: links.to(name),
            lambda name: links.other(name),
            lambda name: links.now(name),
            Addresses(0),
            tasks.spawn,
        )
        links = RouterLinks(streams, member, channels, OWN, tasks)
        links.start()
        yield router, member, node, links._links
    else:
        context: Any = SimpleNamespace(member=member, channels=channels, node=OWN)
        weather = Component(context, "weather", domains=["weather.example.org"])
        await weather.start()
        yield components, member, node, weather.links
        await weather.stop()
    await server.stop(0.1)


def show(member: Member, version: int, *nodes: Node) -> None:
    """A registry tells the member of this view."""
    update = WatchNodesResponse(view_version=version)
    update.snapshot.SetInParent()
    for node in nodes:
        node_into(node, update.snapshot.nodes.add())
    member._watch._take(update)


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("goes", ["failed", "gone"])
async def test_a_link_ends_when_its_router_has_failed_or_is_gone(attached: Any, goes: str) -> None:
    """A failed router may live, and say what counts no more: its row stays for another lease."""
    calls, member, node, links = attached
    await until(lambda: calls.open == 1 and links)
    show(member, 2, *([replace(node, state=NodeState.FAILED)] if goes == "failed" else []))
    await until(lambda: calls.open == 0)
    assert links == {}
    for _ in range(5):
        await asyncio.sleep(0.02)
    assert calls.ever == 1


async def test_a_link_whose_call_this_side_has_ended_comes_again(
    attached: Any, channels: Channels, tasks: Tasks
) -> None:
    calls, _, _, links = attached
    await until(lambda: calls.open == 1 and links)
    tasks.spawn(channels.close(), "close the channels")
    await until(lambda: calls.ever == 2 and calls.open == 1 and links)


async def test_a_router_that_refuses_is_reached(attached: Any, channels: Channels, tasks: Tasks) -> None:
    """Drills, seed 514: a router that had joined took a while to serve. The first tries had found nobody there, its
    refusals counted for nothing, and after three seconds all connectors were put out for not reaching it."""
    calls, member, node, links = attached
    await until(lambda: calls.open == 1 and links)
    calls.refuses = True
    member._unreachable.add(node.incarnation)
    tasks.spawn(channels.close(), "close the channels")
    await until(lambda: not member._unreachable)
    assert calls.ever == 1
