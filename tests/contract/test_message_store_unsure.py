"""What a message store on a database does while its node does not know whether it is still in the cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services.router import messages_statements as statements
from services.router.messages_sql import SqlMessageStore
from tests.contract.message_stores import ROMEO, Faulty, Told, message, rows
from tidings.kit.database_url import DatabaseUrl
from tidings.kit.db import DatabaseAway
from tidings.kit.migrations import migrate


class Node:
    """Of which no registry has taken a beat for long."""

    def __init__(self) -> None:
        self.unsure = True
        self.is_a_member = False
        self.asked = 0

    async def is_in(self) -> bool:
        self.asked += 1
        self.unsure = not self.is_a_member
        return self.is_a_member


def stand_still(store: SqlMessageStore) -> None:
    """As if it had not run for a minute."""
    for writer in store._writers:
        writer._awake -= 60.0


async def test_a_router_that_has_stood_still_writes_nothing_until_it_knows_that_it_was_not_put_out(
    database_url: DatabaseUrl,
) -> None:
    """Others have dealt with what it had. Drills, LONG, seed 5: what a session had confirmed at the next router was
    written when the first one woke, and given again."""
    async with one_store(database_url) as (store, node, database):
        stand_still(store)
        with pytest.raises(DatabaseAway, match="member"):
            await store.keep(message(ROMEO, 1))
        told = Told()
        told.write(store, message(ROMEO, 2))
        asked = node.asked
        async with asyncio.timeout(20):
            while node.asked < asked + 2:
                await asyncio.sleep(0.01)
        assert (told.order, await rows(database), store.away) == ([], 0, True)
        node.is_a_member = True
        await told.of(1)
        assert (told.errors, await rows(database), store.away) == ({}, 1, False)


async def test_so_does_one_that_has_not_reached_the_database(database_url: DatabaseUrl) -> None:
    async with one_store(database_url) as (store, node, database):
        database.away = True
        with pytest.raises(DatabaseAway):
            await store.keep(message(ROMEO, 1))
        database.away = False
        with pytest.raises(DatabaseAway, match="member"):
            await store.keep(message(ROMEO, 1))
        node.is_a_member = True
        await store.keep(message(ROMEO, 1))
        assert await rows(database) == 1


async def test_without_registries_a_router_that_has_not_stood_still_writes_on(database_url: DatabaseUrl) -> None:
    """Nobody is there to put it out; and if that were wrong, it could not know."""
    async with one_store(database_url) as (store, node, database):
        await store.keep(message(ROMEO, 1))
        assert (await rows(database), node.asked) == (1, 0)


async def test_a_router_that_stands_still_in_the_midst_of_a_group_does_not_commit_it(
    database_url: DatabaseUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = statements.insert

    async def interrupted(*arguments: Any) -> None:
        await insert(*arguments)
        stand_still(store)

    async with one_store(database_url) as (store, _, database):
        monkeypatch.setattr(statements, "insert", interrupted)
        with pytest.raises(DatabaseAway, match="member"):
            await store.keep(message(ROMEO, 1))
        assert await rows(database) == 0


async def test_a_router_that_stops_writes_what_is_left_whoever_may_have_put_it_out(database_url: DatabaseUrl) -> None:
    async with one_store(database_url) as (store, _, database):
        stand_still(store)
        told = Told()
        told.write(store, message(ROMEO, 1))
        await store.stop()
        assert (told.errors, await rows(database)) == ({}, 1)


@asynccontextmanager
async def one_store(url: DatabaseUrl) -> AsyncIterator[tuple[SqlMessageStore, Node, Faulty]]:
    database, node = Faulty(url), Node()
    await database.start()
    await migrate(database, "router", "services.router:migrations")
    store = SqlMessageStore(database, node)
    await store.start()
    try:
        yield store, node, database
    finally:
        database.away = False
        await store.stop()
        await database.stop()
