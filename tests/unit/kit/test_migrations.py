"""Migrations: ten at once, half-done ones, dead holders; on SQLite and on MariaDB."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest
import sqlalchemy as sa

from tidings.kit import db, migrations
from tidings.kit.database_url import DatabaseUrl
from tidings.kit.db import Database, DatabaseAway
from tidings.kit.migrations import MigrationError, migrate


async def tables(database: Database) -> set[str]:
    async with database.read() as connection:
        return set(await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names()))


async def test_ten_upgrades_at_once_all_succeed(database_url: DatabaseUrl) -> None:
    databases = [Database(database_url) for _ in range(10)]
    for one in databases:
        await one.start()
    await asyncio.gather(*(migrate(one, "router", "services.router:migrations") for one in databases))
    assert {"accounts", "rosters", "messages", "alembic_version_router"} <= await tables(databases[0])
    for one in databases:
        await one.stop()


async def test_an_upgrade_that_was_cut_off_half_way_is_finished(database: Database) -> None:
    """MySQL changes tables outside of transactions: some may be there already."""
    async with database.write() as connection:
        await connection.execute(sa.text("create table accounts (host varchar(10))"))
    await migrate(database, "router", "services.router:migrations")
    assert {"accounts", "messages"} <= await tables(database)


async def test_each_service_has_a_version_of_its_own(database: Database) -> None:
    await migrate(database, "registry", "services.registry:migrations")
    await migrate(database, "router", "services.router:migrations")
    assert {"alembic_version_registry", "alembic_version_router"} <= await tables(database)
    await migrate(database, "router", "services.router:migrations")


async def test_the_lease_of_a_dead_holder_is_taken_over(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "LEASE", 0.3)
    monkeypatch.setattr(migrations, "LOOK", 0.02)
    await migrations._make_lease_table(database)
    async with database.write() as connection:
        await connection.execute(migrations._leases.insert().values(service="router", holder="dead", beat=3))
    await migrate(database, "router", "services.router:migrations")
    assert "accounts" in await tables(database)
    async with database.read() as connection:
        assert (await connection.execute(sa.select(migrations._leases))).all() == []


async def test_tables_of_a_newer_release_are_left_as_they_are(database: Database) -> None:
    """Both run side by side while a cluster is brought up to date: nodes of the older one must be able to start."""
    await migrate(database, "router", "services.router:migrations")
    async with database.write() as connection:
        await connection.execute(sa.text("update alembic_version_router set version_num = 'r9999'"))
    await migrate(database, "router", "services.router:migrations")
    async with database.read() as connection:
        versions = (await connection.execute(sa.text("select version_num from alembic_version_router"))).all()
    assert len(versions) == 1
    assert versions[0][0] in ("r9999", b"r9999")


async def test_an_older_release_waits_until_a_newer_one_has_migrated(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOOK", 0.02)
    await migrations._make_lease_table(database)
    async with database.write() as connection:
        await connection.execute(migrations._leases.insert().values(service="router", holder="newer", beat=0))
        await connection.execute(sa.text("create table alembic_version_router (version_num varchar(32) not null)"))
    waiting = asyncio.get_running_loop().create_task(migrate(database, "router", "services.router:migrations"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    async with database.write() as connection:
        await connection.execute(sa.text("insert into alembic_version_router values ('r9999')"))
    await asyncio.wait_for(waiting, 5)
    assert "accounts" not in await tables(database)


async def test_who_may_not_make_tables_is_told_so_at_once(mariadb) -> None:  # type: ignore[no-untyped-def]
    from tidings.kit.database_url import parse

    url = parse(mariadb.create_database())
    mariadb._execute(f"revoke create on {url.database}.* from '{url.user}'@'%'")
    refused = Database(url)
    await refused.start()
    with pytest.raises(MigrationError, match="can't make tables in this database"):
        await migrate(refused, "router", "services.router:migrations")
    await refused.stop()


async def test_a_database_that_is_not_there_is_away() -> None:
    nowhere = Database(DatabaseUrl("mysql", (("127.0.0.1", 1),), "x", "x", "x"))
    await nowhere.start()
    with pytest.raises(DatabaseAway):
        await nowhere.ping()
    await nowhere.stop()


async def test_a_killed_database_is_away_and_comes_back(mariadb) -> None:  # type: ignore[no-untyped-def]
    from tidings.kit.database_url import parse

    database = Database(parse(mariadb.create_database()))
    await database.start()
    await database.ping()
    mariadb.kill()
    with pytest.raises(DatabaseAway):
        await database.ping()
    mariadb.start()
    await database.ping()
    await database.stop()


async def test_the_first_host_that_answers_is_used(mariadb) -> None:  # type: ignore[no-untyped-def]
    from dataclasses import replace

    from tidings.kit.database_url import parse

    url = parse(mariadb.create_database())
    database = Database(replace(url, hosts=(("127.0.0.1", 1), *url.hosts)))
    await database.start()
    await database.ping()
    await database.stop()


def test_who_opens_a_new_file_together_with_others_tries_until_it_can() -> None:
    """SQLite waits for every lock but for that of a journal whose mode another one changes at the same time."""

    class Cursor:
        refused = 2
        code = sqlite3.SQLITE_BUSY

        def execute(self, _statement: str) -> None:
            if self.refused:
                self.refused -= 1
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = self.code
                raise error

    cursor = Cursor()
    db._write_ahead(cursor)
    assert not cursor.refused
    cursor.refused, cursor.code = 1, sqlite3.SQLITE_CANTOPEN
    with pytest.raises(sqlite3.OperationalError):
        db._write_ahead(cursor)
