"""What the archive in the store of messages must do: one suite over memory, SQLite and MariaDB."""

from __future__ import annotations

import asyncio

import pytest

from services.router.messages import ArchiveQuery, UnknownId
from tests.contract.message_stores import (
    JULIET,
    NURSE,
    ROMEO,
    Stores,
    Told,
    archive,
    message,
    numbers,
)
from tidings.xmpp.jid import Jid

HOUR = 3_600_000


async def test_pages_go_forwards_and_backwards_and_say_when_they_are_the_last(stores: Stores) -> None:
    """XEP-0059 2.2, 2.3, 2.5; XEP-0313 4.3."""
    for n in range(7):
        await stores.store.keep(message(ROMEO, n, archived=n != 3))

    async def page(
        after: int | None = None, before: int | None = None, backwards: bool = False
    ) -> tuple[list[int], bool]:
        ids = [message(ROMEO, n).id if n is not None else None for n in (after, before)]
        found = await stores.store.page(
            ROMEO, ArchiveQuery(after=ids[0], before=ids[1], backwards=backwards, limit=3)
        )
        return numbers(found.messages), found.complete

    assert await page() == ([0, 1, 2], False)
    assert await page(after=2) == ([4, 5, 6], True)
    assert await page(after=3) == ([4, 5, 6], True), "it is not archived, but it has a place"
    assert await page(after=6) == ([], True)
    assert await page(backwards=True) == ([4, 5, 6], False)
    assert await page(before=4, backwards=True) == ([0, 1, 2], True)
    assert await page(before=5, backwards=True) == ([1, 2, 4], False)
    assert await page(before=5) == ([0, 1, 2], False)
    assert await page(after=1, before=5) == ([2, 4], True)
    assert await page(after=1, before=5, backwards=True) == ([2, 4], True)


@pytest.mark.parametrize("which", ["after", "before"])
async def test_an_id_that_names_no_message_of_the_account_is_unknown(stores: Stores, which: str) -> None:
    """XEP-0313 4.3.2."""
    await stores.store.keep(message(ROMEO, 1))
    await stores.store.keep(message(JULIET, 2))
    for id_ in (message(JULIET, 2).id, bytes(16)):
        query = ArchiveQuery(after=id_) if which == "after" else ArchiveQuery(before=id_)
        with pytest.raises(UnknownId):
            await stores.store.page(ROMEO, query)


async def test_an_archive_is_asked_for_what_was_said_with_somebody(stores: Stores) -> None:
    """XEP-0313 4.1.1: a bare JID stands for all its resources, a full one for itself; 'with' oneself is oneself."""
    peers = [
        "juliet@example.org/balcony", "juliet@example.org", "juliet@example.org0", "juliet@example.orga/x",
        "juliet@example.org/balcony2", "romeo@example.org/phone", "example.org/service",
    ]  # fmt: skip
    for n, peer in enumerate(peers):
        await stores.store.keep(message(ROMEO, n, peer=peer))

    async def with_(jid: str) -> list[int]:
        return await archive(stores, query=ArchiveQuery(with_=Jid.parse(jid)))

    assert await with_("juliet@example.org") == [0, 1, 4]
    assert await with_("juliet@example.org/balcony") == [0]
    assert await with_("romeo@example.org") == [5]
    assert await with_("example.org") == [6]
    assert await with_("nurse@example.org") == []


async def test_an_archive_is_asked_for_a_time(stores: Stores) -> None:
    """XEP-0313 4.1.2: both ends included."""
    for n in range(10):
        await stores.store.keep(message(ROMEO, n, at=n * 100 * HOUR))

    async def between(start: int | None, end: int | None, **more: object) -> list[int]:
        return await archive(stores, query=ArchiveQuery(start=start, end=end, **more))  # type: ignore[arg-type]

    assert await between(300 * HOUR, 500 * HOUR) == [3, 4, 5]
    assert await between(300 * HOUR + 1, 500 * HOUR - 1) == [4]
    assert await between(None, 100 * HOUR) == [0, 1]
    assert await between(800 * HOUR, None) == [8, 9]
    assert await between(901 * HOUR, None) == []
    assert await between(None, -1) == []
    assert await between(700 * HOUR, 200 * HOUR) == []
    assert await between(200 * HOUR, None, limit=2, backwards=True) == [8, 9]
    assert await between(200 * HOUR, 800 * HOUR, after=message(ROMEO, 4).id, before=message(ROMEO, 7).id) == [5, 6]
    assert (await stores.store.page(NURSE, ArchiveQuery(start=0, end=1))).messages == []


async def test_a_message_that_was_received_before_one_in_front_of_it_is_found_by_its_time(stores: Stores) -> None:
    """Clocks of routers differ, and messages wait for the database: positions are not quite in the order of times."""
    times = [1, 2, 3, 4, 10.5, 9.9, 10.2, 9.7, 11, 12, 20]
    for n, time in enumerate(times):
        await stores.store.keep(message(ROMEO, n, at=int(time * HOUR)))
    for start in times:
        for end in times:
            query = ArchiveQuery(start=int(start * HOUR), end=int(end * HOUR))
            assert await archive(stores, query=query) == [n for n, time in enumerate(times) if start <= time <= end]


async def test_who_pages_after_the_last_one_that_it_has_misses_nothing(stores: Stores) -> None:
    """Two routers write for one account, and a client reads meanwhile."""
    told = Told()
    seen: list[int] = []

    async def read() -> None:
        after = message(ROMEO, 0).id
        while len(seen) < 400:
            page = await stores.store.page(ROMEO, ArchiveQuery(after=after, limit=50))
            seen.extend(numbers(page.messages))
            after = page.messages[-1].id if page.messages else after
            await asyncio.sleep(0)

    await stores.store.keep(message(ROMEO, 0))
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        tasks.create_task(read(), name="reader")
        for n in range(1, 401):
            told.write(stores.store if n % 2 else stores.other, message(ROMEO, n))
            if n % 7 == 0:
                await asyncio.sleep(0.01)
    assert sorted(seen) == list(range(1, 401))
    for store in (0, 1):
        own = [n for n in seen if n % 2 == store]
        assert own == sorted(own), "each router's in the order of its writes"
