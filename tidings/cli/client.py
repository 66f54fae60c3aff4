"""How commands talk to a node: over its cluster port, as a client of this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from tidings.cli.app import Failed, Unreachable
from tidings.kit.channel import dial
from tidings.kit.own_node import authorities
from tidings.kit.pki import URI_CLIENT, KeyPair
from tidings.kit.rpc_errors import describe

TIMEOUT = 10.0


def address(options: Any) -> tuple[str, int]:
    """The node that commands talk to."""
    bound = options["bind-address"]
    return (bound[0] if bound else "127.0.0.1"), options["cluster-port"]


def keys(options: Any, name: str = "cli") -> tuple[KeyPair, bytes]:
    """A certificate of this machine, and the authorities that it trusts."""
    accepted = authorities(options)
    return accepted[0].issue([f"{URI_CLIENT}{name}"], name), b"".join(authority.pem for authority in accepted)


@asynccontextmanager
async def channel(options: Any) -> AsyncIterator[Any]:
    """A channel to the node; errors of calls become sentences. Raises Unreachable, Failed."""
    host, port = address(options)
    pair, roots = keys(options)
    opened = dial(host, port, roots, pair)
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
    pair, _ = keys(options)
    return dial(with_it[0].address, with_it[0].port, with_it[0].certificate.encode(), pair)
