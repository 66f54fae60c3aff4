"""What a connector grants a client. Each limit is an option; 0 switches it off."""

from __future__ import annotations

import ipaddress
from collections import Counter
from dataclasses import dataclass

from tidings.kit.options import Options


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """The limits that are not the parser's."""

    # Seconds from connecting to being authenticated: stops clients that hold connections for nothing.
    auth_timeout: float
    # Stanzas and bytes a second; beyond it the socket is not read for the rest of the second: a flood
    # becomes slow for the flooder alone.
    stanzas_per_second: int
    bytes_per_second: int
    # Bytes that may wait for a client that does not read; beyond it the stream is closed, so that a
    # sleeping client cannot fill memory.
    send_queue_bytes: int

    @classmethod
    def of(cls, options: Options) -> ClientLimits:
        return cls(
            auth_timeout=options["auth-timeout"],
            stanzas_per_second=options["max-stanzas-per-second"],
            bytes_per_second=options["max-bytes-per-second"],
            send_queue_bytes=options["max-send-queue-bytes"],
        )


class Addresses:
    """Counts the streams of each address: stops one host from taking all connections.

    Clients on loopback are not counted: a proxy or a test stands for many there. IPv6 hosts are counted by
    their /64, which is what one customer gets.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._streams: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        """Counts one more stream; False when there are too many."""
        key = _key(address)
        if not self._most or key is None:
            return True
        if self._streams[key] >= self._most:
            return False
        self._streams[key] += 1
        return True

    def leave(self, address: str) -> None:
        """Counts one less. Only for what was let in."""
        key = _key(address)
        if not self._most or key is None:
            return
        self._streams[key] -= 1
        if self._streams[key] <= 0:
            del self._streams[key]


def _key(address: str) -> str | None:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif not ip.is_loopback:
            return str(ipaddress.ip_network((ip, 64), strict=False))
    return None if ip.is_loopback else str(ip)
