"""The in-process channel and mutual TLS over loopback do the same: one suite over both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.api.registry.v1.registry_pb2_grpc import (
    RegistryServiceServicer,
    RegistryServiceStub,
    add_RegistryServiceServicer_to_server,
)
from tidings.api.router.v1.router_pb2 import AttachRequest, AttachResponse
from tidings.api.router.v1.router_pb2_grpc import (
    RouterServiceServicer,
    RouterServiceStub,
    add_RouterServiceServicer_to_server,
)
from tidings.cluster.node import Node
from tidings.cluster.view import ClusterView
from tidings.kit.channel import dial
from tidings.kit.grpc_server import ClusterServer, current_caller
from tidings.kit.identity import Caller, Identities
from tidings.kit.pki import NODE_DNS_NAME, REGISTRY_DNS_NAME, CertificateAuthority, KeyPair, normalised
from tidings.kit.ports import PortInUse
from tidings.kit.rpc_errors import TidingsError, error_detail, reason
from tidings.testing.server import free_port

AUTHORITY = CertificateAuthority.from_secret("a secret that is long enough")
KEYS = AUTHORITY.issue(["tidings:node:n1"], "n1")
SERVICES = frozenset({"connector", "router", "registry"})
REGISTRY = "tidings.api.registry.v1.RegistryService"


class Registry(RegistryServiceServicer):
    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        raise TidingsError(ErrorReason.ERROR_REASON_NAME_TAKEN, "that name is taken", hostname="n9")

    async def Beat(self, request: pb.BeatRequest, context: Any) -> pb.BeatResponse:
        raise KeyError("a secret of the inside")

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return pb.LeaveResponse()

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        caller = current_caller(context)
        response = pb.ListNodesResponse(view_version=7)
        response.nodes.add(hostname=caller.name, services=sorted(caller.services))
        return response

    async def WatchNodes(self, request: pb.WatchNodesRequest, context: Any) -> AsyncIterator[pb.WatchNodesResponse]:
        for version in range(3):
            yield pb.WatchNodesResponse(view_version=version)
        if request.since:
            raise TidingsError(ErrorReason.ERROR_REASON_DATABASE_AWAY, "away")


class Router(RouterServiceServicer):
    def __init__(self) -> None:
        self.taken = 0

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            self.taken += 1
            if request.credit:
                await asyncio.Event().wait()
            await context.write(AttachResponse(sequence=request.sequence))


class World:
    def __init__(self, channel: Any, server: ClusterServer, registry: Registry, router: Router) -> None:
        self.registry: Any = RegistryServiceStub(channel)
        self.router: Any = RouterServiceStub(channel)
        self.server = server
        self.registry_servicer = registry
        self.router_servicer = router


def a_server(port: int, keys: KeyPair = KEYS, roots: bytes = AUTHORITY.pem) -> ClusterServer:
    """A server that shows these keys; it accepts what `roots` have signed, and knows the authority."""
    view = ClusterView(
        1, [Node("n1", "i1", "127.0.0.1", port, tuple(SERVICES), certificate=normalised(KEYS.certificate))]
    )
    identities = Identities([AUTHORITY])
    return ClusterServer(
        ["127.0.0.1"], port, keys, lambda: roots, lambda leaf: identities.identify(leaf, view),
        Caller("local", "n1", SERVICES, "i1"),
    )  # fmt: skip


@pytest.fixture(params=["in-process", "loopback"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    port = free_port("127.0.0.1")
    server = a_server(port)
    registry, router = Registry(), Router()
    server.add(add_RegistryServiceServicer_to_server, registry, "tidings.api.registry.v1.RegistryService")
    server.add(add_RouterServiceServicer_to_server, router, "tidings.api.router.v1.RouterService")
    await server.start()
    remote = dial("127.0.0.1", port, AUTHORITY.pem, KEYS)
    yield World(server.local_channel() if request.param == "in-process" else remote, server, registry, router)
    await remote.close()
    await server.stop(0.1)


async def test_a_call_is_answered_and_knows_its_caller(world: World) -> None:
    response = await world.registry.ListNodes(pb.ListNodesRequest(), timeout=5)
    assert response.view_version == 7
    assert response.nodes[0].hostname == "n1"


async def test_a_refusal_keeps_its_type(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await world.registry.Join(pb.JoinRequest(), timeout=5)
    assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS
    detail = error_detail(error.value)
    assert detail is not None
    assert (detail.reason, detail.message, dict(detail.metadata)) == (
        ErrorReason.ERROR_REASON_NAME_TAKEN, "that name is taken", {"hostname": "n9"},
    )  # fmt: skip


async def test_what_went_wrong_inside_stays_inside(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await world.registry.Beat(pb.BeatRequest(), timeout=5)
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.value)
    assert "log" in (error.value.details() or "")


async def test_a_deadline_ends_the_call_on_both_sides(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await world.registry.Leave(pb.LeaveRequest(), timeout=0.2)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(world.registry_servicer.cancelled.wait(), 5)


async def test_a_method_that_is_not_there_is_unimplemented(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await world.registry.ReportUnreachable(pb.ReportUnreachableRequest(), timeout=5)
    assert error.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)


async def test_a_stream_of_answers_ends_as_its_handler_does(world: World) -> None:
    versions = [one.view_version async for one in world.registry.WatchNodes(pb.WatchNodesRequest(), timeout=5)]
    assert versions == [0, 1, 2]
    seen = []
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for one in world.registry.WatchNodes(pb.WatchNodesRequest(since=1), timeout=5):
            seen.append(one.view_version)
    assert seen == [0, 1, 2]
    assert reason(error.value) == ErrorReason.ERROR_REASON_DATABASE_AWAY


async def test_both_directions_keep_their_order(world: World) -> None:
    call = world.router.Attach(timeout=20)

    async def write() -> None:
        for number in range(1, 301):
            await call.write(AttachRequest(sequence=number))
        await call.done_writing()

    writing = asyncio.get_running_loop().create_task(write())
    seen = []
    while (response := await call.read()) is not grpc.aio.EOF:
        seen.append(response.sequence)
    await writing
    assert seen == list(range(1, 301))
    assert await call.code() is grpc.StatusCode.OK


async def test_messages_are_copied_never_shared(world: World) -> None:
    call = world.router.Attach(timeout=5)
    request = AttachRequest(sequence=1)
    await call.write(request)
    request.sequence = 99
    assert (await call.read()).sequence == 1
    call.cancel()


async def test_who_is_not_read_from_waits(world: World) -> None:
    """Queues are bounded: a writer whose peer does not read is held up."""
    call = world.router.Attach(timeout=10)
    big = AttachRequest(credit=1)
    big.envelopes.add(stanza=b"x" * 500_000)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            for _ in range(500):
                await call.write(big)
    assert world.router_servicer.taken == 1
    call.cancel()


async def test_a_call_that_is_cancelled_says_so(world: World) -> None:
    call = world.router.Attach(timeout=10)
    await call.write(AttachRequest(sequence=1))
    assert (await call.read()).sequence == 1
    call.cancel()
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await call.read()


async def test_a_server_that_stops_ends_its_streams(world: World) -> None:
    call = world.router.Attach(timeout=10)
    await call.write(AttachRequest(sequence=1))
    assert (await call.read()).sequence == 1
    await world.server.stop(0.1)
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        assert await call.read() is not grpc.aio.EOF


async def test_a_service_that_is_starting_says_so(world: World) -> None:
    """Its tables may not be there yet: callers try again."""
    world.server.hold(["tidings.api.registry.v1.RegistryService"])
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await world.registry.ListNodes(pb.ListNodesRequest(), timeout=5)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason(error.value) == ErrorReason.ERROR_REASON_NOT_SERVING
    world.server.open(["tidings.api.registry.v1.RegistryService"])
    await world.registry.ListNodes(pb.ListNodesRequest(), timeout=5)


# --- the port ---


async def test_two_servers_on_one_port_are_one_too_many() -> None:
    port = free_port("127.0.0.1")
    first, second = a_server(port), a_server(port)
    await first.start()
    with pytest.raises(PortInUse, match=r"port .* is in use by .*process"):
        await second.start()
    await first.stop(0)


async def test_a_stranger_gets_no_further_than_the_handshake() -> None:
    port = free_port("127.0.0.1")
    server = a_server(port)
    server.add(add_RegistryServiceServicer_to_server, Registry(), "tidings.api.registry.v1.RegistryService")
    await server.start()
    stranger = CertificateAuthority.from_secret("nobody here knows this secret").issue(["tidings:client:x"], "x")
    channel = dial("127.0.0.1", port, AUTHORITY.pem, stranger)
    stub: Any = RegistryServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.ListNodes(pb.ListNodesRequest(), timeout=5)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    await channel.close()
    await server.stop(0)


async def test_a_client_may_list_nodes_and_not_join() -> None:
    port = free_port("127.0.0.1")
    server = a_server(port)
    server.add(add_RegistryServiceServicer_to_server, Registry(), "tidings.api.registry.v1.RegistryService")
    await server.start()
    channel = dial("127.0.0.1", port, AUTHORITY.pem, AUTHORITY.issue(["tidings:client:backup"], "backup"))
    stub: Any = RegistryServiceStub(channel)
    assert (await stub.ListNodes(pb.ListNodesRequest(), timeout=5)).nodes[0].hostname == "backup"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Join(pb.JoinRequest(), timeout=5)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    await channel.close()
    await server.stop(0)


async def test_a_stranger_is_not_told_that_a_service_is_starting() -> None:
    """An accepted certificate can sign another one; its owner is nobody."""
    port = free_port("127.0.0.1")
    unknown = CertificateAuthority.from_secret("nobody here knows this secret")
    server = a_server(port, roots=AUTHORITY.pem + unknown.pem)
    server.add(add_RegistryServiceServicer_to_server, Registry(), REGISTRY)
    server.hold([REGISTRY])
    await server.start()
    for authority, expected in (
        (AUTHORITY, ErrorReason.ERROR_REASON_NOT_SERVING),
        (unknown, ErrorReason.ERROR_REASON_NOT_ALLOWED),
    ):
        channel = dial("127.0.0.1", port, AUTHORITY.pem, authority.issue(["tidings:client:x"], "x"))
        stub: Any = RegistryServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ListNodes(pb.ListNodesRequest(), timeout=5)
        assert reason(error.value) == expected
        await channel.close()
    await server.stop(0)


@pytest.mark.parametrize(
    ("uri", "dns_name", "trusted"),
    [
        ("tidings:node:n1", REGISTRY_DNS_NAME, True),
        ("tidings:node:n1/registry", REGISTRY_DNS_NAME, True),
        ("tidings:node:c1/connector", REGISTRY_DNS_NAME, False),
        ("tidings:node:c1/connector", NODE_DNS_NAME, True),
        ("tidings:client:weather", REGISTRY_DNS_NAME, False),
        ("tidings:client:weather", NODE_DNS_NAME, False),
    ],
)
async def test_who_knows_an_authority_alone_takes_only_a_registry_for_one(
    uri: str, dns_name: str, trusted: bool
) -> None:
    port = free_port("127.0.0.1")
    server = a_server(port, AUTHORITY.issue([uri], "x"))
    server.add(add_RegistryServiceServicer_to_server, Registry(), REGISTRY)
    await server.start()
    channel = dial("127.0.0.1", port, AUTHORITY.pem, KEYS, dns_name)
    stub: Any = RegistryServiceStub(channel)
    try:
        await stub.ListNodes(pb.ListNodesRequest(), timeout=5)
        code = grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        code = error.code()
    assert code is (grpc.StatusCode.OK if trusted else grpc.StatusCode.UNAVAILABLE)
    await channel.close()
    await server.stop(0)
