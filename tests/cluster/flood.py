"""Many clients that write as fast as they can, and some that do not read."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import grpc

from tidings.api.router.v1.account_pb2 import CreateAccountRequest
from tidings.api.router.v1.account_pb2_grpc import AccountServiceStub
from tidings.testing.client import RawClient
from tidings.testing.server import Installation
from tidings.xmpp import ns

# Sessions of each account that writes.
RESOURCES = 10
# Log-ins at a time, and messages in one write.
AT_A_TIME = 16
AT_ONCE = 50
BODY = "abcdefghij" * 10
LOG_IN = 60.0
# Of the sockets that write: what the kernel keeps for them is not the server's.
SEND_BUFFER = 65_536


async def add_accounts(installation: Installation, names: list[str]) -> None:
    channel = installation.dial(installation.router_address)
    accounts: Any = AccountServiceStub(channel)
    slots = asyncio.Semaphore(AT_A_TIME)

    async def created(request: CreateAccountRequest) -> bool:
        """False when the database was too busy."""
        try:
            await accounts.CreateAccount(request, timeout=LOG_IN)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ALREADY_EXISTS):
                raise
            return error.code() is grpc.StatusCode.ALREADY_EXISTS
        return True

    async def add(name: str) -> None:
        async with slots:
            request = CreateAccountRequest(jid=f"{name}@localhost", password="secret")
            async with asyncio.timeout(LOG_IN):
                while not await created(request):
                    await asyncio.sleep(0.05)

    try:
        await asyncio.gather(*(add(name) for name in names))
    finally:
        await channel.close()


async def log_in(address: str, port: int, name: str, resource: str) -> RawClient:
    """In clear."""
    client = RawClient(address, port, "localhost")
    async with asyncio.timeout(LOG_IN):
        await client.connect()
        await client.open()
        await client.authenticate(name, "secret")
        await client.bind(resource)
        await client.send("<presence/>")
        while (await client.element(LOG_IN)).get("from") != client.jid:
            pass
    return client


class Flood:
    """Senders, and receivers that stop reading: every second one of these has XEP-0198."""

    def __init__(self, installation: Installation, senders: int, receivers: int) -> None:
        self._installation = installation
        self._senders = [f"sender{number}" for number in range(senders // RESOURCES)]
        self._receivers = [f"receiver{number}" for number in range(receivers)]
        self._clients: list[RawClient] = []
        self._deaf: list[RawClient] = []
        self._writing: list[asyncio.Task[None]] = []
        # Bytes that the sockets of the server have taken.
        self.taken = 0

    async def start(self, senders_at: str, receivers_at: str) -> None:
        """All log in, each at an address."""
        await add_accounts(self._installation, [*self._senders, *self._receivers])
        port, slots = self._installation.port, asyncio.Semaphore(AT_A_TIME)

        async def one(address: str, name: str, resource: str) -> RawClient:
            async with slots:
                return await log_in(address, port, name, resource)

        self._deaf = await asyncio.gather(*(one(receivers_at, name, "r") for name in self._receivers))
        for client in self._deaf[::2]:
            await client.send(f"<enable xmlns='{ns.SM}' resume='true'/>")
            await client.element()
        for client in self._deaf:
            client._writer.transport.pause_reading()  # type: ignore[attr-defined]
        wanted = [(name, str(number)) for name in self._senders for number in range(RESOURCES)]
        self._clients = await asyncio.gather(*(one(senders_at, *pair) for pair in wanted))

    async def run(self, seconds: float, seen: Callable[[], None]) -> None:
        """Writes; calls `seen` now and then."""
        for number, client in enumerate(self._clients):
            connection = client._writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            to = f"{self._receivers[number % len(self._receivers)]}@localhost"
            self._writing += [
                asyncio.create_task(self._write(client, to), name="writes"),
                asyncio.create_task(self._read(client), name="reads"),
            ]
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            await asyncio.sleep(0.09)
            seen()

    async def _write(self, client: RawClient, to: str) -> None:
        chunk = b"".join(
            f"<message to='{to}' type='chat' id='m{number}'><body>{BODY}</body></message>".encode()
            for number in range(AT_ONCE)
        )
        while not client._writer.is_closing():
            await client.send(chunk)
            self.taken += len(chunk)

    async def _read(self, client: RawClient) -> None:
        while await client._reader.read(65536):
            pass

    @property
    def lost(self) -> int:
        """Senders whose connection has ended."""
        return sum(client._reader.at_eof() for client in self._clients)

    async def stop(self) -> None:
        for task in self._writing:
            task.cancel()
        await asyncio.gather(*self._writing, return_exceptions=True)
        await asyncio.gather(*(client.abort() for client in (*self._clients, *self._deaf)), return_exceptions=True)
