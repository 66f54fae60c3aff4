"""The TCP shell."""

from __future__ import annotations

import asyncio
import socket

from services.connector.limits import Addresses
from services.connector.transports.tcp import KEEPALIVE_IDLE, USER_TIMEOUT_MS, Flusher, TcpConnection


class Silent:
    """A stream that takes what comes."""

    def received(self, data: bytes) -> None: ...

    def disconnected(self, reason: str) -> None: ...


async def test_the_kernel_watches_over_connections_that_say_nothing() -> None:
    """A half-open connection would hold its session for ever."""
    made: list[TcpConnection] = []

    def factory() -> TcpConnection:
        made.append(TcpConnection(lambda _: Silent(), Flusher(), None))  # type: ignore[arg-type, return-value]
        return made[-1]

    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    async with asyncio.timeout(5):
        while not made or made[0].transport is None:
            await asyncio.sleep(0)
    accepted = made[0].transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == KEEPALIVE_IDLE
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == USER_TIMEOUT_MS
    writer.close()
    await writer.wait_closed()
    made[0].abort()
    server.close()
    await server.wait_closed()


def test_addresses_are_counted_by_host_and_loopback_is_not() -> None:
    addresses = Addresses(2)
    assert [addresses.enter("127.0.0.1") for _ in range(5)] == [True] * 5
    assert [addresses.enter("192.0.2.1") for _ in range(3)] == [True, True, False]
    addresses.leave("192.0.2.1")
    assert addresses.enter("192.0.2.1")
    one_customer = ("2001:db8::1", "2001:db8::2", "2001:db8::3")
    assert [addresses.enter(address) for address in one_customer] == [True, True, False], "by the /64"
    assert addresses.enter("2001:db8:0:1::1")
    assert [addresses.enter("::ffff:192.0.2.9") for _ in range(3)] == [True, True, False]
    assert Addresses(0).enter("192.0.2.1"), "0 switches it off"
