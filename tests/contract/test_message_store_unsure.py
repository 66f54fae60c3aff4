"""What a message store on a database does while its node does not know whether it is still in the cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.router.messages_sql import SqlMessageStore
from tests.contract.message_stores import ROMEO, Faulty, Told, message, rows
from tidings.kit.database_url import DatabaseUrl
from tidings.kit.db import DatabaseAway
from tidings.kit.migrations import migrate


class Unsure:
    """A node that may have been put out: `still` says when it is, look by look, and then goes on with the last word."""

    def __init__(self, *still: bool) -> None:
        self._still = list(still)
        self.is_a_member = False
        self.asked = 0

    @property
    def unsure(self) -> bool:
        return self._still.pop(0) if len(self._still) > 1 else self._still[0]

    async def is_in(self) -> bool:
        self.asked += 1
        if self.is_a_member:
            self._still = [False]
        return self.is_a_member


async def test_a_router_that_may_have_been_put_out_writes_nothing_until_it_knows(database_url: DatabaseUrl) -> None:
    """It stood still, and others have dealt with what it had. Drills, LONG, seed 5: what a session had confirmed at the
    next router was written when the first one woke, and given again."""
    async with one_store(database_url, Unsure(True)) as (store, member, database):
        with pytest.raises(DatabaseAway, match="member"):
            await store.keep(message(ROMEO, 1))
        told = Told()
        told.write(store, message(ROMEO, 2))
        asked = member.asked
        async with asyncio.timeout(20):
            while member.asked < asked + 2:
                await asyncio.sleep(0.01)
        assert (told.order, await rows(database), store.away) == ([], 0, True)
        member.is_a_member = True
        await told.of(1)
        assert (told.errors, await rows(database), store.away) == ({}, 1, False)


async def test_a_router_that_stands_still_in_the_midst_of_a_group_does_not_commit_it(
    database_url: DatabaseUrl,
) -> None:
    async with one_store(database_url, Unsure(False, True, False)) as (store, _, database):
        with pytest.raises(DatabaseAway, match="member"):
            await store.keep(message(ROMEO, 1))
        assert await rows(database) == 0


async def test_a_router_that_stops_writes_what_is_left_whoever_may_have_put_it_out(database_url: DatabaseUrl) -> None:
    async with one_store(database_url, Unsure(True)) as (store, _, database):
        told = Told()
        told.write(store, message(ROMEO, 1))
        await store.stop()
        assert (told.errors, await rows(database)) == ({}, 1)


@asynccontextmanager
async def one_store(url: DatabaseUrl, member: Unsure) -> AsyncIterator[tuple[SqlMessageStore, Unsure, Faulty]]:
    database = Faulty(url)
    await database.start()
    await migrate(database, "router", "services.router:migrations")
    store = SqlMessageStore(database, member)
    await store.start()
    try:
        yield store, member, database
    finally:
        await store.stop()
        await database.stop()
