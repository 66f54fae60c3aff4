"""The public API as an outside program sees it: synchronous stubs, by pytest-grpc's fixtures over our own channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tidings.api.registry.v1.registry_pb2 import ListNodesRequest, WatchNodesRequest
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.kit.options import load
from tidings.kit.own_node import authorities
from tidings.kit.pki import REGISTRY_DNS_NAME, URI_CLIENT
from tidings.testing.server import Installation


@pytest.fixture(scope="module")
def grpc_server() -> None:
    """None of pytest-grpc's own: the node is a real one."""


@pytest.fixture(scope="module")
def grpc_channel(installation: Installation) -> Iterator[grpc.Channel]:
    accepted = authorities(load(installation.arguments(), {}))
    pair = accepted[0].issue([f"{URI_CLIENT}outsider"], "outsider")
    credentials = grpc.ssl_channel_credentials(
        b"".join(one.pem for one in accepted), pair.private_key, pair.certificate
    )
    target = f"{installation.registry_address}:{installation.cluster_port}"
    with grpc.secure_channel(target, credentials, [("grpc.ssl_target_name_override", REGISTRY_DNS_NAME)]) as channel:
        yield channel


@pytest.fixture(scope="module")
def grpc_stub_cls(grpc_channel: grpc.Channel) -> type[RegistryServiceStub]:
    return RegistryServiceStub


def test_an_outsider_lists_the_nodes(grpc_stub: Any) -> None:
    listed = grpc_stub.ListNodes(ListNodesRequest(), timeout=10)
    assert {service for node in listed.nodes for service in node.services} == {
        "connector",
        "pubsub",
        "registry",
        "router",
    }


def test_an_outsider_watches_the_nodes_beginning_with_a_snapshot(grpc_stub: Any) -> None:
    watch = grpc_stub.WatchNodes(WatchNodesRequest(), timeout=10)
    first = next(watch)
    assert first.HasField("snapshot")
    assert first.view_version > 0
    watch.cancel()


def test_reflection_lists_the_services(grpc_channel: grpc.Channel, way: str) -> None:
    names = set(ProtoReflectionDescriptorDatabase(grpc_channel).get_services())
    expected = {"tidings.api.registry.v1.RegistryService", "grpc.health.v1.Health"}
    if way != "processes":
        expected |= {
            "tidings.api.router.v1.RouterService", "tidings.api.router.v1.AccountService",
            "tidings.api.connector.v1.ConnectorService", "tidings.api.component.v1.ComponentService",
            "tidings.api.pubsub.v1.PubsubService",
        }  # fmt: skip
    assert expected <= names


def test_health_says_serving(grpc_channel: grpc.Channel) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(grpc_channel)
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status == health_pb2.HealthCheckResponse.SERVING


async def test_streams_are_listed_and_closed_over_the_api(installation: Installation) -> None:
    from tidings.api.connector.v1 import connector_pb2 as pb
    from tidings.api.connector.v1.connector_pb2_grpc import ConnectorServiceStub
    from tidings.testing.client import RawClient

    await installation.add_account("listed@localhost")
    client = RawClient(installation.address, installation.tls_port, "localhost")
    await client.log_in("listed", "secret", "r", tls=True)
    channel = installation.dial(installation.address)
    stub: Any = ConnectorServiceStub(channel)
    streams = (await stub.ListStreams(pb.ListStreamsRequest(), timeout=10)).streams
    (mine,) = [stream for stream in streams if stream.jid == client.jid]
    assert mine.tls
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.CloseStream(pb.CloseStreamRequest(stream=mine.stream, condition="nonsense"), timeout=10)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await stub.CloseStream(pb.CloseStreamRequest(stream=mine.stream, condition="reset", text="bye"), timeout=10)
    assert (await client.closed()).condition == "reset"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.CloseStream(pb.CloseStreamRequest(stream=mine.stream), timeout=10)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    await client.abort()
    await channel.close()


async def test_the_admin_port_answers_probes_and_prometheus(installation: Installation, way: str) -> None:
    if way == "processes":
        assert all(process.poll() is None for process in installation.processes.values())
        return  # each process has its own, switched off in this way of running
    import aiohttp

    async with aiohttp.ClientSession(f"http://127.0.0.1:{installation.admin_port}") as session:
        for path, expected in (("/healthz", "ok"), ("/readyz", "ok"), ("/metrics", "tidings_sessions")):
            async with session.get(path) as response:
                assert response.status == 200
                assert expected in await response.text()
