"""Who talks in a drill: devices of every kind, and accounts that nobody is at until the end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from tests.drills.client import Client
from tests.drills.conversation import Habits
from tests.drills.history import History
from tests.drills.lives import account_of

ALL = Habits()
MESSAGES_ONLY = Habits(resends="messages")
PLAIN = Habits(managed=False, resends_after_failure=False)
# Of those who vanish for good the server waits so long, in seconds.
SHORT = 5

SINGLES = 12
PAIRS = 2
OFFLINE = 3
MORTALS = 2
# Messages a second, and requests.
RATE = 120.0
ASK_EVERY = 20


class Population:
    """The clients of one life."""

    def __init__(self, history: History, addresses: Sequence[str], port: int, random: Random, managed: bool) -> None:
        self._history = history
        self._addresses = list(addresses)
        self._port = port
        self._random = random
        self._managed = managed
        kinds = [ALL, ALL, MESSAGES_ONLY, PLAIN] if managed else [PLAIN]
        first = kinds[0]
        # Accounts with one device; with two of equal priority; those that are killed with their node for good.
        self.singles = [self._client(f"u{n}", "r", kinds[n % len(kinds)], n) for n in range(SINGLES)]
        self.pairs = [
            (self._client(f"d{n}", "1", first, n), self._client(f"d{n}", "2", kinds[-n % len(kinds)], n + 1))
            for n in range(PAIRS)
        ]
        self.mortals = [self._client(f"v{n}", "r", replace(first, resumption=SHORT), n) for n in range(MORTALS)]
        # Sees the presence of others, and one that nothing is sent to by its bare JID.
        self.watchers = [self._client(f"w{n}", "r", first, n) for n in range(2)]
        self.negative = self._client("n0", "r", replace(first, priority=-1), 0)
        self.offline = [f"o{n}@localhost" for n in range(OFFLINE)]
        self.readers: list[Client] = []
        self._talking: asyncio.Task[None] | None = None

    def _client(self, name: str, resource: str, habits: Habits, at: int) -> Client:
        seed = Random(self._random.getrandbits(64))
        client = Client(self._history, name, resource, self._addresses, self._port, seed, habits)
        client.at = at % len(self._addresses)
        return client

    @property
    def clients(self) -> list[Client]:
        two = [client for pair in self.pairs for client in pair]
        return [*self.singles, *two, *self.mortals, *self.watchers, self.negative, *self.readers]

    @property
    def accounts(self) -> list[str]:
        return [*dict.fromkeys(client.account for client in self.clients), *self.offline]

    def working(self) -> list[Client]:
        return [client for client in self.clients if client.works]

    # --- life ---

    async def start(self) -> None:
        """Everybody comes in, and the watchers get to see the others."""
        for client in self.clients:
            client.start()
        await asyncio.gather(*(client.ready() for client in self.clients))
        for watcher in self.watchers:
            for client in (*self.mortals, *self.singles[:6]):
                watcher.subscribe(client.account)

    def talk(self) -> None:
        self._talking = asyncio.create_task(self._talk(), name="talk")

    async def _talk(self) -> None:
        loop = asyncio.get_running_loop()
        began, turn = loop.time(), 0
        while True:
            turn += 1
            await asyncio.sleep(max(0.0, began + turn / RATE - loop.time()))
            if client := self._writer():
                if turn % ASK_EVERY == 0:
                    client.ask(self._asked(client))
                else:
                    client.send(self._to(client), self._type())

    def _writer(self) -> Client | None:
        working = [client for client in self.working() if client not in self.readers]
        return self._random.choice(working) if working else None

    def _asked(self, client: Client) -> str:
        others = [other.jid for other in self.clients if other is not client]
        return self._random.choice(["localhost", *self._random.sample(others, 3)])

    def _to(self, client: Client) -> str:
        """A full JID, a bare one, or that of an account where nobody is."""
        draw = self._random.random()
        if draw < 0.08:
            return self._random.choice(self.offline)
        others = [other for other in self.clients if other.account != client.account]
        other = self._random.choice(others)
        return other.jid if draw < 0.6 else other.account

    def _type(self) -> str:
        return self._random.choices(["chat", "normal", "headline"], [85, 12, 3])[0]

    def burst(self, least: int) -> None:
        """Everybody writes at once to those who are there: that much is under way at least."""
        working = self.working()
        receivers = [client for client in self.clients if client is not self.negative]
        for _ in range(1 + least // max(1, len(working))):
            for client in working:
                other = self._random.choice([one for one in receivers if one.account != client.account])
                client.send(self._random.choice([other.jid, other.account]))

    def in_flight(self) -> int:
        return sum(client.in_flight() for client in self.clients)

    async def hush(self) -> None:
        if self._talking is not None:
            self._talking.cancel()
            await asyncio.gather(self._talking, return_exceptions=True)

    async def return_all(self, timeout: float) -> list[str]:
        """Everybody comes back; who did not in time."""
        for client in self.clients:
            client.call_back()
            client.read(True)
        late = []
        async with asyncio.timeout(timeout + 5):
            deadline = asyncio.get_running_loop().time() + timeout
            for client in self.clients:
                while not client.works and asyncio.get_running_loop().time() < deadline:
                    await asyncio.sleep(0.02)
                if not client.works:
                    late.append(client.jid)
        return late

    def read_stored(self) -> None:
        """A fresh session for each account that nobody is at, or only with a negative priority."""
        for number, account in enumerate((*self.offline, account_of(self.negative.jid))):
            reader = self._client(account.partition("@")[0], "reader", ALL if self._managed else PLAIN, number)
            self.readers.append(reader)
            reader.start()

    async def stop(self) -> None:
        await self.hush()
        await asyncio.gather(*(client.stop() for client in self.clients))
