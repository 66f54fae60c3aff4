"""Several hosts of one database: which of them a process uses, when one refuses, hangs, or comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from tidings.kit import database_hosts
from tidings.kit.database_url import DatabaseUrl, parse
from tidings.kit.db import Database, DatabaseAway
from tidings.testing.mariadb import MariaDB


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that would take seconds take fractions of them."""
    monkeypatch.setattr(database_hosts, "LOOK", 0.05)
    monkeypatch.setattr(database_hosts, "CHOOSE_TIMEOUT", 0.5)
    monkeypatch.setattr(database_hosts, "ANSWER_TIMEOUT", 0.5)
    monkeypatch.setattr(database_hosts, "RETURN_LOOK", 0.2)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    server = MariaDB(tmp_path_factory.mktemp("second"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def url(mariadb: MariaDB, second: MariaDB) -> DatabaseUrl:
    """A database of the same name at two servers."""
    url = parse(mariadb.create_database())
    second._execute(
        f"create database {url.database}",
        f"create user '{url.user}'@'%' identified by '{url.password}'",
        f"grant all on {url.database}.* to '{url.user}'@'%'",
    )
    return replace(url, hosts=(*url.hosts, ("127.0.0.1", second.port)))


@asynccontextmanager
async def opened(url: DatabaseUrl) -> AsyncIterator[Database]:
    database = Database(url)
    await database.start()
    try:
        yield database
    finally:
        await database.stop()


async def port(database: Database) -> int:
    """The server that it uses."""
    async with database.read() as connection:
        return int((await connection.execute(sa.text("select @@port"))).scalar_one())


async def until(database: Database, wanted: int) -> None:
    async with asyncio.timeout(10):
        while await port(database) != wanted:
            await asyncio.sleep(0.02)


async def test_a_killed_host_is_left_with_all_connections_and_used_again_when_it_is_back(
    url: DatabaseUrl, mariadb: MariaDB, second: MariaDB
) -> None:
    async with opened(url) as database:
        assert set(await asyncio.gather(*(port(database) for _ in range(6)))) == {mariadb.port}
        mariadb.kill()
        try:
            await asyncio.sleep(0.05)
            # Its end has been read from every idle connection: nobody needs to fail to find it out.
            assert set(await asyncio.gather(*(port(database) for _ in range(6)))) == {second.port}
        finally:
            mariadb.start()
        await until(database, mariadb.port)
        assert set(await asyncio.gather(*(port(database) for _ in range(6)))) == {mariadb.port}


async def test_a_host_that_hangs_is_left_and_who_waits_for_it_is_told(
    url: DatabaseUrl, mariadb: MariaDB, second: MariaDB
) -> None:
    async def wait(database: Database) -> None:
        async with database.write() as connection:
            await connection.execute(sa.text("select sleep(30)"))

    async with opened(url) as database:
        waiting = asyncio.create_task(wait(database))
        assert await port(database) == mariadb.port
        mariadb.hang()
        started = time.monotonic()
        try:
            with pytest.raises(DatabaseAway):
                await waiting
            assert time.monotonic() - started < 4, "long before a statement takes too long"
            assert await port(database) == second.port
        finally:
            mariadb.go_on()
        await until(database, mariadb.port)


async def test_who_connects_to_a_host_that_hangs_gets_to_the_next_one(
    url: DatabaseUrl, mariadb: MariaDB, second: MariaDB
) -> None:
    async with opened(url) as database:
        await database.ping()
        async with database.read():
            mariadb.hang()
            try:
                assert await port(database) == second.port
            finally:
                mariadb.go_on()


async def test_who_gives_up_soon_does_not_keep_a_process_at_a_host_that_hangs(
    url: DatabaseUrl, mariadb: MariaDB, second: MariaDB
) -> None:
    """All connections are in use or being made, and whoever makes one is cut off before it is clear that none comes."""
    database = Database(url, connections=2)
    await database.start()
    held = asyncio.Event()

    async def hold() -> None:
        async with database.write() as connection:
            held.set()
            await connection.execute(sa.text("select sleep(30)"))

    holding = asyncio.create_task(hold())
    await held.wait()
    mariadb.hang()
    try:
        async with asyncio.timeout(5):
            while True:
                try:
                    async with asyncio.timeout(0.6):
                        assert await port(database) == second.port
                        break
                except (TimeoutError, DatabaseAway):
                    pass
            with pytest.raises(DatabaseAway):
                await holding
    finally:
        mariadb.go_on()
        await database.stop()


async def test_a_transaction_that_waits_for_a_lock_does_not_move_its_process(
    url: DatabaseUrl, mariadb: MariaDB
) -> None:
    async with opened(url) as database:
        async with database.write() as connection:
            await connection.execute(sa.text("create table t (id int primary key)"))
            await connection.execute(sa.text("insert into t values (1)"))
        async with database.write() as holder:
            await holder.execute(sa.text("select * from t for update"))
            with pytest.raises(DatabaseAway):
                async with database.write(timeout=1.0) as waiter:
                    await waiter.execute(sa.text("select * from t for update"))
        assert await port(database) == mariadb.port


async def test_going_back_does_not_cut_off_what_is_under_way(
    url: DatabaseUrl, mariadb: MariaDB, second: MariaDB
) -> None:
    async with opened(url) as database:
        mariadb.kill()
        try:
            assert await port(database) == second.port
        finally:
            mariadb.start()
        async with database.write() as connection:
            assert (await connection.execute(sa.text("select @@port"))).scalar_one() == second.port
            await until(database, mariadb.port)
            assert (await connection.execute(sa.text("select @@port"))).scalar_one() == second.port


@asynccontextmanager
async def mute() -> AsyncIterator[tuple[tuple[str, int], list[Any]]]:
    """A server that takes connections and says nothing; where it is, and the connections."""
    taken: list[Any] = []

    async def take(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname(), taken
    finally:
        server.close()
        for writer in taken:
            writer.transport.abort()


async def test_who_waits_while_no_host_serves_is_told_after_one_search(url: DatabaseUrl) -> None:
    async with mute() as (host, taken), opened(replace(url, hosts=(host, host))) as database:
        started = time.monotonic()
        asked = await asyncio.gather(*(port(database) for _ in range(12)), return_exceptions=True)
        assert {type(answer) for answer in asked} == {DatabaseAway}
        assert time.monotonic() - started < 1.5
        assert len(taken) < 6


async def test_what_all_hosts_refuse_is_said_in_their_words(url: DatabaseUrl) -> None:
    async with opened(replace(url, password="an old one")) as database:
        with pytest.raises(DatabaseAway, match="Access denied"):
            await database.ping()


async def test_a_causal_read_costs_nothing_where_nothing_is_replicated(url: DatabaseUrl) -> None:
    statements: list[str] = []
    async with opened(url) as database:
        await database.ping()
        assert database._engine is not None
        event.listen(database._engine.sync_engine, "after_cursor_execute", lambda *call: statements.append(call[2]))
        async with database.read(causal=True) as connection:
            await connection.execute(sa.text("select 1"))
    assert statements == ["select 1"]
