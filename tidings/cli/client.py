"""How commands talk to a node: over its cluster port, as a client of this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc

from tidings.cli.app import Failed, Unreachable
from tidings.kit.channel import dial
from tidings.kit.own_node import authorities, local_address
from tidings.kit.pki import REGISTRY_DNS_NAME, URI_CLIENT, KeyPair
from tidings.kit.rpc_errors import describe

TIMEOUT = 10.0

# What becomes of a call when the node that it went to ends.
GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


def address(options: Any) -> tuple[str, int]:
    """The node that commands talk to."""
    return local_address(options), options["cluster-port"]


def keys(options: Any, name: str = "cli", scopes: Sequence[str] = ()) -> tuple[KeyPair, bytes]:
    """A certificate of this machine, limited to scopes if there are any, and the authorities that it trusts."""
    accepted = authorities(options)
    return accepted[0].issue([client_uri(name, scopes)], name), b"".join(authority.pem for authority in accepted)


def client_uri(name: str, scopes: Sequence[str]) -> str:
    """What the certificate of a client says."""
    return f"{URI_CLIENT}{name}" + (f"/{','.join(scopes)}" if scopes else "")


@asynccontextmanager
async def channel(options: Any) -> AsyncIterator[Any]:
    """A channel to the node; errors of calls become sentences. Raises Unreachable, Failed."""
    host, port = address(options)
    pair, roots = keys(options)
    opened = dial(host, port, roots, pair, REGISTRY_DNS_NAME)
    try:
        yield opened
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED) and not tuple(
            error.trailing_metadata() or ()
        ):
            raise Unreachable(
                f"no node answers at {host}:{port}; is it running (`tidings run`), with the same --data-dir or "
                "--cluster-secret? --bind-address and --cluster-port say where to look"
            ) from None
        raise Failed(describe(error)) from None
    finally:
        await opened.close()


async def channel_with(options: Any, opened: Any, service: str) -> Any:
    """The channel to a node that runs a service: this one, or one that its registry knows."""
    from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
    from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub

    registry: Any = RegistryServiceStub(opened)
    try:
        listed = await registry.ListNodes(ListNodesRequest(), timeout=TIMEOUT)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return opened  # no registry there: it is asked itself
        raise
    host, port = address(options)
    with_it = [node for node in listed.nodes if service in node.services]
    for node in with_it:
        if (node.address, node.port) == (host, port):
            return opened
    if not with_it:
        raise Failed(f"no node of the cluster runs a {service}")
    return dial_node(options, with_it[0])


def dial_node(options: Any, node: Any) -> Any:
    """A channel to a node that a registry has listed."""
    pair, _ = keys(options)
    return dial(node.address, node.port, node.certificate.encode(), pair)


@asynccontextmanager
async def channels_to_registries(options: Any, nodes: Iterable[Any]) -> AsyncIterator[list[Any]]:
    """Channels to those of the listed nodes that run a registry."""
    async with AsyncExitStack() as opened:
        yield [
            await opened.enter_async_context(dial_node(options, node))
            for node in nodes
            if "registry" in node.services and node.certificate
        ]
