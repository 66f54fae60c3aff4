"""One life of a cluster: it is started, talked to, broken at random moments, healed, and judged by what its clients saw."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.drills.checker import Verdict, check
from tests.drills.cluster import Cluster
from tests.drills.history import Event, Fault, History
from tests.drills.population import Population
from tidings.api.router.v1.account_pb2 import CreateAccountRequest
from tidings.api.router.v1.account_pb2_grpc import AccountServiceStub

# A fault counts when so many messages are unacknowledged at that moment; so often is it tried to have them.
UNACKNOWLEDGED = 50
TRIES = 40
# Seconds: until everybody is back, and until all has arrived.
RETURN = 20.0
SETTLE = 12.0
LOOK = 0.5


@dataclass
class Count:
    """One fault: how many messages were unacknowledged at that moment, and how long clients went without service."""

    what: str
    at: float
    unacknowledged: int
    pauses: list[float] = field(default_factory=list)

    @property
    def counts(self) -> bool:
        return self.unacknowledged >= UNACKNOWLEDGED


class Drill:
    """What faults and scenarios see of a life."""

    def __init__(self, cluster: Cluster, random: Random, managed: bool, durable: bool, long: bool) -> None:
        self.cluster = cluster
        self.random = random
        self.managed = managed
        self.long = long
        self._durable = durable
        self.history = History()
        self.population: Population = None  # type: ignore[assignment]
        self.counts: list[Count] = []
        # The history as it was judged, without how the clients were switched off afterwards.
        self.judged: list[Event] = []
        # What no rule of the checker covers.
        self.complaints: list[str] = []

    # --- for faults ---

    def node(self, *but: int) -> int:
        return self.random.choice([node for node in range(self.cluster.nodes) if node not in but])

    def minute(self, short: float) -> float:
        """How long something lasts: a minute in long drills."""
        return 60.0 if self.long else short

    async def pause(self, least: float, most: float) -> None:
        await asyncio.sleep(self.random.uniform(least, most))

    async def until(self, true: Callable[[], object], timeout: float) -> bool:
        """Whether it came true in time."""
        deadline = self.history.now() + timeout
        while not true():
            if self.history.now() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    @asynccontextmanager
    async def broken(self, what: str, strike: Callable[[], None]) -> AsyncIterator[None]:
        """Strikes when enough is under way; at the end of the block all is whole again."""
        for _ in range(TRIES):
            self.population.burst(2 * UNACKNOWLEDGED)
            # What was written is somewhere on its way: at a random moment.
            await self.pause(0.0, 0.02)
            if self.population.in_flight() >= UNACKNOWLEDGED:
                break
        struck = self.history.now()
        self.counts.append(Count(what, struck, self.population.in_flight()))
        strike()
        try:
            yield
        finally:
            self.history.record(Fault(struck, "", what, self.history.now()))

    # --- life ---

    async def start(self) -> None:
        installation = self.cluster.installation
        addresses, port = installation.client_addresses, installation.port
        self.population = Population(self.history, addresses, port, self.random, self.managed)
        await self._add_accounts()
        await self.population.start()
        self.population.talk()

    async def _add_accounts(self) -> None:
        """By one channel: where others compute, a handshake for each takes longer than it may."""
        channel = self.cluster.installation.dial(self.cluster.installation.router_address)
        accounts: Any = AccountServiceStub(channel)
        try:
            for jid in self.population.accounts:
                request = CreateAccountRequest(jid=jid, password="secret")
                await accounts.CreateAccount(request, timeout=20, wait_for_ready=True)
        finally:
            await channel.close()

    async def settle(self, within: float = SETTLE) -> Verdict:
        """All is healed, all come back, and what is under way arrives, within so many seconds; the verdict."""
        await self.cluster.serve()
        late = await self.population.return_all(RETURN)
        if late:
            self.complaints.append(f"did not come back within {RETURN:.0f} s: {', '.join(late)}")
        await self.population.hush()
        self.population.read_stored()
        deadline = self.history.now() + within
        while self.history.now() < deadline:
            await asyncio.sleep(LOOK)
            if not self.population.in_flight() and not check(self._seen(), self._durable, patient=False).findings:
                break
        for client in self.population.clients:
            self.complaints += client.complaints
            if client.waiting():
                # Nothing is lost, for nothing was promised: but somebody is deaf.
                self.complaints.append(f"{client.jid}: {client.waiting()} messages are still not acknowledged")
        self._measure()
        self.judged = self._seen()
        return check(self.judged, self._durable)

    def _seen(self) -> list[Event]:
        """The history until now: the checker takes the last event's time for the present."""
        now = self.history.now()
        return [*self.history, Fault(now, "", "the end", now)]

    def _measure(self) -> None:
        """To each fault the longest pause of each client that began between it and the next one."""
        for number, count in enumerate(self.counts):
            until = self.counts[number + 1].at if number + 1 < len(self.counts) else self.history.now()
            for client in self.population.clients:
                if hit := [seconds for at, seconds in client.pauses if count.at - 0.5 <= at < until]:
                    count.pauses.append(max(hit))

    async def stop(self) -> None:
        if self.population is not None:
            await self.population.stop()
