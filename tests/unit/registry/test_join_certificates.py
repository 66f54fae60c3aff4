"""What a node's certificate lets it put into its row (DESIGN 6), over a real port with real certificates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from services.registry.grpc_api import RegistryApi
from services.registry.members import Members
from services.registry.store_memory import MemoryNodeStore
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.registry.v1.registry_pb2 import DESCRIPTOR, JoinRequest
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub, add_RegistryServiceServicer_to_server
from tidings.cluster.node import Node
from tidings.kit.channel import Channels, dial
from tidings.kit.grpc_server import ClusterServer
from tidings.kit.identity import Caller, Identities
from tidings.kit.node_messages import node_into
from tidings.kit.pki import REGISTRY_DNS_NAME, CertificateAuthority, KeyPair
from tidings.kit.rpc_errors import reason
from tidings.testing.server import free_port

AUTHORITY = CertificateAuthority.from_secret("a secret that is long enough")
KEYS = AUTHORITY.issue(["tidings:node:r1"], "r1")
STRANGER = CertificateAuthority.from_secret("nobody here knows this secret")


class World:
    """A registry on a port, and who wants to join."""

    def __init__(self) -> None:
        self.members = Members(MemoryNodeStore(), "own", lease=0.2)
        self.port = free_port("127.0.0.1")
        identities = Identities([AUTHORITY])
        self.server = ClusterServer(
            ["127.0.0.1"], self.port, KEYS, lambda: AUTHORITY.pem,
            lambda leaf: identities.identify(leaf, self.members.view), Caller("local", "r1", frozenset({"registry"})),
        )  # fmt: skip
        channels = Channels(KEYS, "own", None)
        self.server.add(
            add_RegistryServiceServicer_to_server,
            RegistryApi(self.members, channels),
            DESCRIPTOR.services_by_name["RegistryService"].full_name,
        )

    async def join(self, keys: KeyPair, node: Node) -> None:
        channel = dial("127.0.0.1", self.port, AUTHORITY.pem, keys, REGISTRY_DNS_NAME)
        request = JoinRequest()
        node_into(node, request.node)
        stub: Any = RegistryServiceStub(channel)
        try:
            await stub.Join(request, timeout=10)
        finally:
            await channel.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    await made.server.start()
    yield made
    await made.server.stop(0)


def a_node(keys: KeyPair, *services: str) -> Node:
    certificate = keys.certificate.decode()
    return Node("c1", "i1", "127.0.0.1", 5777, services, virtual_hosts=("localhost",), certificate=certificate)


async def test_a_connector_that_has_joined_makes_itself_no_router(world: World) -> None:
    keys = AUTHORITY.issue(["tidings:node:c1/connector"], "c1")
    node = a_node(keys, "connector")
    await world.join(keys, node)
    more = replace(node, incarnation="i2", services=("connector", "registry", "router"))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await world.join(keys, more)
    assert reason(error.value) == ErrorReason.ERROR_REASON_NOT_ALLOWED
    (present,) = world.members.view
    assert (present.incarnation, present.services) == ("i1", ("connector",))


async def test_a_row_holds_the_certificate_that_was_shown_and_nothing_beside_it(world: World) -> None:
    """Whatever stands in a row is a root for all nodes."""
    keys = AUTHORITY.issue(["tidings:node:c1"], "c1")
    node = a_node(keys, "connector")
    await world.join(keys, replace(node, certificate=node.certificate + STRANGER.pem.decode()))
    (present,) = world.members.view
    assert present.certificate == node.certificate
