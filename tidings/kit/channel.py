"""Channels to other nodes, and to the services of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from tidings.cluster.node import Node
from tidings.kit.inprocess import InProcessChannel
from tidings.kit.pki import NODE_DNS_NAME, KeyPair

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.enable_http_proxy", 0),
    # A silent peer is noticed within 3 seconds, so that a cut ends within 6 (services.registry.failure).
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    # However long no data flow.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    # One connection for each pair of processes, also where channels are many.
    ("grpc.use_local_subchannel_pool", 1),
)

# Seconds for calls under way when the node that they go to is no more: as long as the longest of them may take.
GRACE = 5.0

# Put around every channel that leaves the process; benchmarks count what goes between nodes with it. It is no
# grpc.aio interceptor, for those put a queue before each write, and what is counted would not be what is sent.
intercept: Callable[[grpc.aio.Channel], grpc.aio.Channel] | None = None


def dial(address: str, port: int, roots: bytes, key_pair: KeyPair, dns_name: str = NODE_DNS_NAME) -> grpc.aio.Channel:
    """A channel to a node. `roots`: its own certificate; or the authorities that joiners and clients know (PEM), and
    then `dns_name` is REGISTRY_DNS_NAME, or any leaf of theirs could stand in for a registry."""
    literal = f"[{address}]" if ":" in address else address
    credentials = grpc.ssl_channel_credentials(roots, key_pair.private_key, key_pair.certificate)
    options = (*OPTIONS, ("grpc.ssl_target_name_override", dns_name))
    channel = grpc.aio.secure_channel(f"{literal}:{port}", credentials, options=options)
    return channel if intercept is None else intercept(channel)


class Channels:
    """The channels of one process, one for each start of a node."""

    def __init__(self, key_pair: KeyPair, own_incarnation: str, local: InProcessChannel | None) -> None:
        """`local`: where this process's own services are reached; None makes it dial itself."""
        self._key_pair = key_pair
        self._own = own_incarnation
        self._local = local
        self._channels: dict[str, grpc.aio.Channel] = {}

    def to(self, node: Node) -> Any:
        """The channel to a node; it trusts that node's certificate alone."""
        if self._local is not None and node.incarnation == self._own:
            return self._local
        channel = self._channels.get(node.incarnation)
        if channel is None:
            channel = dial(node.address, node.port, node.certificate.encode(), self._key_pair)
            self._channels[node.incarnation] = channel
        return channel

    async def keep_only(self, incarnations: set[str]) -> None:
        """Closes the channels to starts of nodes that are no more. Calls under way end by their own deadlines: a
        channel that ends takes them along without a word."""
        await self._close(set(self._channels) - incarnations, GRACE)

    async def close(self) -> None:
        """Closes all of them at once."""
        await self._close(set(self._channels), None)

    async def _close(self, incarnations: set[str], grace: float | None) -> None:
        gone = [self._channels.pop(incarnation) for incarnation in incarnations]
        await asyncio.gather(*(channel.close(grace) for channel in gone))
