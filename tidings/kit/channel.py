"""Channels to other nodes, and to the services of this process."""

from __future__ import annotations

from typing import Any

import grpc

from tidings.cluster.node import Node
from tidings.kit.inprocess import InProcessChannel
from tidings.kit.pki import NODE_DNS_NAME, KeyPair

OPTIONS: tuple[tuple[str, Any], ...] = (
    # A URI name alone fails gRPC's check: leaves carry this DNS name beside it.
    ("grpc.ssl_target_name_override", NODE_DNS_NAME),
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
    # One connection for each pair of processes, also where channels are many.
    ("grpc.use_local_subchannel_pool", 1),
)


def dial(address: str, port: int, roots: bytes, key_pair: KeyPair) -> grpc.aio.Channel:
    """A channel to a node. `roots`: its own certificate, or the authority that its joiners know (PEM)."""
    literal = f"[{address}]" if ":" in address else address
    credentials = grpc.ssl_channel_credentials(roots, key_pair.private_key, key_pair.certificate)
    return grpc.aio.secure_channel(f"{literal}:{port}", credentials, options=OPTIONS)


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
        """Closes the channels to starts of nodes that are no more."""
        for gone in set(self._channels) - incarnations:
            await self._channels.pop(gone).close()

    async def close(self) -> None:
        await self.keep_only(set())
