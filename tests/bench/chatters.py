"""Users in pairs, each on another node than its partner, who write to each other at a fixed rate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tidings.testing.client import Closed, RawClient, Tree

BODY = "abcdefghij" * 10
# Seconds for a log-in, and how many at a time.
LOG_IN = 30.0
AT_A_TIME = 8
# Seconds between two tries to get in, and for what is under way to arrive.
RETRY = 0.3
ARRIVE = 20.0
LONG = 3600.0


class User:
    """One user with one session. When its stream ends, the user logs in again, at the next address if it must."""

    def __init__(
        self, number: int, addresses: Sequence[str], port: int, arrived: Callable[[User, Tree], None]
    ) -> None:
        self.number = number
        self.name = f"u{number}"
        self.jid = f"{self.name}@localhost/b"
        self._addresses = addresses
        # Which of them it is at.
        self._at = 0
        self._port = port
        self._arrived = arrived
        self.client: RawClient | None = None
        # How often it logged in.
        self.log_ins = 0

    async def log_in(self) -> None:
        """Logs in at the present address. Raises Closed, OSError, AssertionError, TimeoutError."""
        client = RawClient(self._addresses[self._at % len(self._addresses)], self._port, "localhost")
        try:
            async with asyncio.timeout(LOG_IN):
                await client.connect()
                await client.open()
                await client.authenticate(self.name, "secret")
                await client.bind("b")
                await client.send("<presence/>")
                while (tree := await client.element()).get("from") != client.jid:
                    self._arrived(self, tree)
        except BaseException:
            await client.abort()
            raise
        self.client = client
        self.log_ins += 1

    async def live(self) -> None:
        """Reads until cancelled, and logs in again where the stream ends."""
        while True:
            if self.client is None:
                try:
                    await self.log_in()
                except (Closed, OSError, AssertionError, TimeoutError):
                    self._at += 1
                    await asyncio.sleep(RETRY)
                continue
            try:
                while True:
                    self._arrived(self, await self.client.element(LONG))
            except (Closed, OSError, TimeoutError):
                client, self.client = self.client, None
                await client.abort()


class Chatters:
    """All of them: user 2k writes to 2k+1 and back. `users` is even, and users go to nodes in turn."""

    def __init__(self, users: int, addresses: Sequence[str], port: int, spare: str = "") -> None:
        """`spare`: where those go whose node is gone."""
        self.users = [
            User(number, [addresses[number % len(addresses)], spare or addresses[0]], port, self._arrived)
            for number in range(users)
        ]
        self._missing: set[str] = set()
        # By stanza: in which of its sessions its receiver got it last.
        self._got: dict[str, int] = {}
        self._living: list[asyncio.Task[None]] = []
        # Stanzas that were written; that came twice to one session, or to two; that came back as errors.
        self.sent = 0
        self.doubles = 0
        self.to_next_session = 0
        self.errors = 0

    @property
    def missing(self) -> int:
        """Stanzas that have not arrived."""
        return len(self._missing)

    @property
    def log_ins(self) -> int:
        return sum(user.log_ins for user in self.users)

    def _arrived(self, user: User, tree: Tree) -> None:
        number = tree.get("id", "")
        if tree.tag != "{jabber:client}message":
            return
        if tree.get("type") == "error":
            self.errors += 1
        elif number in self._got:
            self.doubles += self._got[number] == user.log_ins
            self.to_next_session += self._got[number] != user.log_ins
        self._missing.discard(number)
        self._got[number] = user.log_ins

    async def log_in(self) -> None:
        gate = asyncio.Semaphore(AT_A_TIME)

        async def one(user: User) -> None:
            async with gate:
                await user.log_in()

        await asyncio.gather(*(one(user) for user in self.users))
        self._living = [asyncio.create_task(user.live(), name=user.name) for user in self.users]

    async def log_out(self) -> None:
        for task in self._living:
            task.cancel()
        await asyncio.gather(*self._living, return_exceptions=True)
        await asyncio.gather(*(user.client.close() for user in self.users if user.client is not None))

    async def write(self, stanzas: int, rate: float) -> None:
        """Writes so many, at `rate` a second in all; a user who is not online lets its turn pass."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        for turn in range(stanzas):
            await asyncio.sleep(max(0.0, began + turn / rate - loop.time()))
            user = self.users[turn % len(self.users)]
            if user.client is None:
                continue
            partner = self.users[user.number ^ 1]
            self.sent += 1
            self._missing.add(str(self.sent))
            await user.client.send(
                f"<message to='{partner.jid}' type='chat' id='{self.sent}'><body>{BODY}</body></message>"
            )

    async def arrival(self) -> None:
        """Waits, within bounds, until all that was written has arrived."""
        try:
            async with asyncio.timeout(ARRIVE):
                while self._missing:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            print(f"  {self.missing} stanzas did not arrive", flush=True)
