"""What a component sends is worked off in order for each account, and no account's database work holds up the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.router.component_links import Lanes
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.link import Lane
from tidings.kit.tasks import Tasks


class Work:
    """Deals with stanzas at once, but for those to an account that waits for the database."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.database = asyncio.Event()

    def step(self, envelope: Envelope) -> asyncio.Future[None] | None:
        if envelope.to_jid.startswith("away@"):
            return asyncio.ensure_future(self._store(envelope))
        self.done.append(envelope.id)
        return None

    async def _store(self, envelope: Envelope) -> None:
        await self.database.wait()
        self.done.append(envelope.id)


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    tasks = Tasks()
    yield tasks
    await tasks.stop()


async def test_an_account_that_waits_holds_up_none_of_the_others(tasks: Tasks) -> None:
    work, lanes = Work(), Lanes(tasks.spawn)
    lanes.run(work.step, Envelope(id="1", to_jid="away@h"))
    lanes.run(work.step, Envelope(id="2", to_jid="away@h/r"))
    others = [f"u{number}@h" for number in range(200)]
    for other in others:
        lanes.run(work.step, Envelope(id=other, to_jid=other))
    assert len(work.done) > 150, "but for those that share its lane"
    work.database.set()
    async with asyncio.timeout(5):
        while len(work.done) < 202:
            await asyncio.sleep(0.005)
    assert work.done.index("1") < work.done.index("2")


async def test_when_a_lane_is_long_no_more_is_read_until_it_is_empty(tasks: Tasks) -> None:
    work, lanes = Work(), Lanes(tasks.spawn)
    for number in range(Lane.HIGH + 1):
        await lanes.short()
        lanes.run(work.step, Envelope(id=str(number), to_jid="away@h"))
    reading = tasks.spawn(lanes.short(), "the next read")
    await asyncio.sleep(0)
    assert not reading.done()
    work.database.set()
    async with asyncio.timeout(5):
        await reading
    assert work.done == [str(number) for number in range(Lane.HIGH + 1)]
