"""A database that does not answer (DESIGN 7): who waits for it, and for how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.kit import db
from tidings.kit.database_url import DatabaseUrl, parse
from tidings.kit.db import TRIES, Database, DatabaseAway
from tidings.testing.mariadb import MariaDB


async def silent(database: Database, gate: asyncio.Event) -> str:
    """One who asks while the database is silent: what becomes of it."""
    try:
        async with database.read():
            await gate.wait()
    except DatabaseAway:
        return "away"
    return "answered"


async def test_while_the_database_is_silent_one_waits_and_the_others_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "STATEMENT_TIMEOUT", 0.2)
    monkeypatch.setattr(db, "TRY_TIMEOUT", 0.2)
    database = Database(DatabaseUrl("sqlite", path=tmp_path / "t.sqlite"))
    await database.start()
    gate = asyncio.Event()
    assert await silent(database, gate) == "away"
    trying = asyncio.get_running_loop().create_task(silent(database, gate), name="the one who tries")
    await asyncio.sleep(0)
    started = time.monotonic()
    assert [await silent(database, gate) for _ in range(20)] == ["away"] * 20
    assert time.monotonic() - started < 0.15, "nobody has waited"
    assert await trying == "away"
    gate.set()
    assert await silent(database, gate) == "answered"
    assert await asyncio.gather(*(silent(database, gate) for _ in range(5))) == ["answered"] * 5
    await database.stop()


@asynccontextmanager
async def opened(url: DatabaseUrl) -> AsyncIterator[Database]:
    database = Database(url)
    await database.start()
    try:
        yield database
    finally:
        await database.stop()


# Full tables and disks, out of step with a Galera cluster, read-only, a lock that somebody else keeps, no rights.
@pytest.mark.parametrize("number", [1021, 1114, 1047, 1290, 1836, 1205, 1142, 1969])
async def test_what_the_server_can_not_do_now_is_away_and_nobody_dies_of_it(mariadb: MariaDB, number: int) -> None:
    async with opened(parse(mariadb.create_database())) as database:
        with pytest.raises(DatabaseAway, match=str(number)):
            async with database.write() as connection:
                await connection.execute(refusal(number))
        await database.ping()


async def test_a_password_that_is_no_longer_right_is_away_too(mariadb: MariaDB) -> None:
    url = parse(mariadb.create_database())
    async with opened(replace(url, password="an old one")) as database:
        with pytest.raises(DatabaseAway, match="Access denied"):
            await database.ping()


async def test_a_transaction_that_meets_others_is_tried_again_and_then_away(mariadb: MariaDB) -> None:
    async with opened(parse(mariadb.create_database())) as database:
        tried = 0

        async def meet_others(connection: AsyncConnection) -> str:
            nonlocal tried
            tried += 1
            if tried != TRIES + 3:
                await connection.execute(refusal(1213))
            return "done"

        with pytest.raises(DatabaseAway):
            await database.transaction(meet_others)
        assert tried == TRIES
        assert await database.transaction(meet_others) == "done"
        assert tried == TRIES + 3


async def test_a_statement_that_is_wrong_is_no_database_that_is_away(database_url: DatabaseUrl) -> None:
    async with opened(database_url) as database:
        with pytest.raises((OperationalError, ProgrammingError)):
            async with database.write() as connection:
                await connection.execute(sa.text("select * from nowhere"))


def refusal(number: int) -> sa.TextClause:
    """Makes the server answer with an error of that number."""
    return sa.text(f"signal sqlstate 'HY000' set mysql_errno = {number}, message_text = 'no'")


async def test_a_transaction_that_stands_still_does_not_hold_up_others_for_long(mariadb: MariaDB) -> None:
    """Its process was stopped in the midst, and holds locks that others need."""
    url = parse(mariadb.create_database())
    async with opened(url) as stopped, opened(url) as other:
        async with other.write() as connection:
            await connection.execute(sa.text("create table counters (name int primary key, count int)"))
            await connection.execute(sa.text("insert into counters values (1, 0)"))
        raised = sa.text("update counters set count = count + 1 where name = 1")

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(raised)

        with pytest.raises(DatabaseAway):
            async with stopped.write() as connection:
                await connection.execute(raised)
                started = time.monotonic()
                await other.transaction(work)
                assert time.monotonic() - started < db.IDLE_TIMEOUT + db.LOCK_TIMEOUT
        await stopped.transaction(work)
        async with other.read() as connection:
            assert (await connection.execute(sa.text("select count from counters"))).scalar() == 2


# Keeps the lock of SQLite for some ten milliseconds.
COUNTED = sa.text(
    "with recursive c (n) as (select 1 union all select n + 1 from c where n < 100000) select max(n) from c"
)


async def test_who_writes_little_gets_its_turn_beside_one_who_always_writes(tmp_path: Path) -> None:
    """SQLite's lock is not fair: a registry could not write for seconds that nodes live, while clients logged in."""
    url = DatabaseUrl("sqlite", path=tmp_path / "t.sqlite")
    async with opened(url) as busy, opened(url) as other:
        async with other.write() as connection:
            await connection.execute(sa.text("create table counters (count int)"))
        turns = 0

        async def always_write() -> None:
            nonlocal turns
            while True:
                async with busy.write() as connection:
                    await connection.execute(COUNTED)
                turns += 1

        writing = asyncio.get_running_loop().create_task(always_write(), name="the one who always writes")
        try:
            for _ in range(10):
                async with other.write() as connection:
                    await connection.execute(sa.text("insert into counters values (1)"))
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        assert turns < 100


async def test_a_lock_that_nobody_gives_back_is_a_database_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "CONNECT_TIMEOUT", 0.1)
    url = DatabaseUrl("sqlite", path=tmp_path / "t.sqlite")
    async with opened(url) as holds, opened(url) as other:
        await other.ping()
        async with holds.write():
            with pytest.raises(DatabaseAway, match="locked"):
                async with other.write():
                    raise AssertionError("two hold the lock")
        async with other.write() as connection:
            await connection.execute(sa.text("create table counters (count int)"))
        async with other.read() as connection:
            # Whoever reads waits for what it waits for.
            assert (await connection.execute(sa.text("pragma busy_timeout"))).scalar() == 5000


async def test_who_gives_up_waiting_for_the_lock_does_not_get_it_later(tmp_path: Path) -> None:
    """What asks for it is a thread, which goes on."""
    url = DatabaseUrl("sqlite", path=tmp_path / "t.sqlite")
    async with opened(url) as holds, opened(url) as other:
        await other.ping()
        for _ in range(20):
            async with holds.write():
                with pytest.raises(DatabaseAway):
                    async with other.write(timeout=0.005):
                        raise AssertionError("two hold the lock")
            async with holds.write(timeout=1.0):
                pass
            await other.ping()
