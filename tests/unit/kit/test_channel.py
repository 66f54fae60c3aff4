"""Channels to nodes that are no more."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.api.registry.v1.registry_pb2_grpc import (
    RegistryServiceServicer,
    RegistryServiceStub,
    add_RegistryServiceServicer_to_server,
)
from tidings.cluster.node import Node
from tidings.kit import channel
from tidings.kit.channel import Channels
from tidings.kit.grpc_server import ClusterServer
from tidings.kit.identity import Caller
from tidings.kit.pki import CertificateAuthority, normalised
from tidings.testing.server import free_port

KEYS = CertificateAuthority.from_secret("a secret that is long enough").issue(["tidings:node:n1"], "n1")


class Registry(RegistryServiceServicer):
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.answer = asyncio.Event()

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        self.called.set()
        await self.answer.wait()
        return pb.ListNodesResponse(view_version=7)


@pytest.fixture
async def registry() -> Any:
    port = free_port("127.0.0.1")
    server = ClusterServer(
        ["127.0.0.1"], port, KEYS, lambda: KEYS.certificate, lambda _: Caller("node", "n1"), Caller("local", "n1")
    )
    servicer = Registry()
    server.add(add_RegistryServiceServicer_to_server, servicer, "tidings.api.registry.v1.RegistryService")
    await server.start()
    node = Node("n1", "i1", "127.0.0.1", port, certificate=normalised(KEYS.certificate))
    yield node, servicer
    await server.stop(0.1)


async def test_a_call_under_way_to_a_node_that_is_no_more_ends_as_it_would_have(registry: Any) -> None:
    node, servicer = registry
    channels = Channels(KEYS, "own", None)
    stub: Any = RegistryServiceStub(channels.to(node))
    call = asyncio.ensure_future(stub.ListNodes(pb.ListNodesRequest(), timeout=5))
    await asyncio.wait_for(servicer.called.wait(), 5)
    closing = asyncio.create_task(channels.keep_only(set()))
    await asyncio.sleep(0.05)
    servicer.answer.set()
    assert (await call).view_version == 7
    await asyncio.wait_for(closing, 5)
    assert channels.to(node) is not None, "another one, if somebody asks"
    await channels.close()


async def test_a_call_that_takes_too_long_is_not_waited_for(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "GRACE", 0.1)
    node, servicer = registry
    channels = Channels(KEYS, "own", None)
    stub: Any = RegistryServiceStub(channels.to(node))

    async def call() -> str:
        try:
            await stub.ListNodes(pb.ListNodesRequest(), timeout=60)
        except (asyncio.CancelledError, grpc.RpcError):
            return "ended"
        return "answered"

    calling = asyncio.create_task(call())
    await asyncio.wait_for(servicer.called.wait(), 5)
    await asyncio.wait_for(channels.keep_only(set()), 5)
    assert await asyncio.wait_for(calling, 5) == "ended"
