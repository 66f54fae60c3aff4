"""What another router does not answer is an error like another (services/router/peers.py)."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from services.router import peers
from services.router.peers import Failed, Peers
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.router.v1.router_pb2 import AdoptSessionRequest, AdoptSessionResponse
from tidings.api.router.v1.router_pb2_grpc import RouterServiceServicer, add_RouterServiceServicer_to_server
from tidings.cluster.node import Node
from tidings.kit.tasks import Tasks

NODE = Node("n", "n", "127.0.0.1", 1)


class Hanging(RouterServiceServicer):
    """Never answers."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def AdoptSession(self, request: Any, context: Any) -> AdoptSessionResponse:
        self.asked.set()
        await asyncio.Event().wait()
        raise AssertionError


class Channels:
    """One channel, to the router above."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    def to(self, node: Node) -> Any:
        return self.channel


async def test_a_call_ends_by_an_error_when_it_takes_too_long_and_when_the_node_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gRPC cancels a call whose channel is closed; were that taken for our own end, the session would hang for ever."""
    server = grpc.aio.server()
    add_RouterServiceServicer_to_server(hanging := Hanging(), server)
    channels: Any = Channels(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    routers = Peers(channels, Tasks().spawn)
    monkeypatch.setattr(peers, "ADOPT_TIMEOUT", 0.3)
    with pytest.raises(Failed) as late:
        await routers.adopt(NODE, AdoptSessionRequest())
    monkeypatch.setattr(peers, "ADOPT_TIMEOUT", 30.0)
    hanging.asked.clear()
    call = asyncio.create_task(routers.adopt(NODE, AdoptSessionRequest()))
    await hanging.asked.wait()
    await channels.channel.close()
    with pytest.raises(Failed) as left:
        await call
    with pytest.raises(Failed):
        await routers.adopt(NODE, AdoptSessionRequest())
    assert {late.value.reason, left.value.reason} == {ErrorReason.ERROR_REASON_UNSPECIFIED}
    await server.stop(0)
