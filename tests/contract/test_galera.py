"""What `Database` promises over Galera (DESIGN 10): servers that are behind, not ready, or first with another commit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pymysql
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.contract.spread import databases
from tidings.kit import database_hosts
from tidings.kit.db import Database, DatabaseAway
from tidings.kit.migrations import migrate
from tidings.testing.galera import Galera, GaleraNode

ISOLATE = "set global wsrep_provider_options = 'gmcast.isolate={}'"


@pytest.fixture
async def servers(galera: Galera) -> AsyncIterator[list[Database]]:
    """One database, opened at each of three servers, with a table of one row."""
    async with databases(galera) as opened:
        async with opened[0].write() as connection:
            await connection.execute(sa.text("create table counters (id int primary key, value int not null)"))
            await connection.execute(sa.text("insert into counters values (1, 0)"))
        yield opened


async def value(database: Database, causal: bool = False) -> int:
    async with database.read(causal=causal) as connection:
        return int((await connection.execute(sa.text("select value from counters"))).scalar_one())


async def put(database: Database, number: int) -> None:
    await database.transaction(
        lambda connection: connection.execute(sa.text(f"update counters set value = {number}"))
    )


async def port(database: Database) -> int:
    """The server that it uses."""
    async with database.read() as connection:
        return int((await connection.execute(sa.text("select @@port"))).scalar_one())


def administer(node: GaleraNode) -> pymysql.Connection:  # type: ignore[type-arg]
    return pymysql.connect(unix_socket=str(node._socket), user="root")


async def test_a_causal_read_waits_for_a_server_that_is_behind(galera: Galera, servers: list[Database]) -> None:
    first, second, _ = servers
    assert await value(second, causal=True) == 0
    with administer(galera.nodes[1]) as administrator, administrator.cursor() as cursor:
        cursor.execute("flush tables with read lock")  # it applies nothing that others commit
        await put(first, 1)
        assert await value(second) == 0, "an older state"
        reading = asyncio.create_task(value(second, causal=True))
        done, _ = await asyncio.wait([reading], timeout=0.3)
        assert not done
        cursor.execute("unlock tables")
    assert await asyncio.wait_for(reading, 5) == 1


async def test_the_first_statement_of_a_causal_transaction_waits_whatever_it_is(servers: list[Database]) -> None:
    first, second, third = servers
    for number in range(1, 40):
        await put(first, number)
        async with second.write(causal=True) as connection:
            changed = await connection.execute(
                sa.text(f"update counters set value = {-number} where value = {number}")
            )
        assert changed.rowcount == 1
        async with third.write(causal=True) as connection:
            locked = await connection.execute(sa.text("select value from counters for update"))
            assert locked.scalar_one() == -number


async def test_what_fails_certification_is_tried_again_and_nothing_is_counted_twice(servers: list[Database]) -> None:
    attempts = 0

    async def work(connection: AsyncConnection) -> None:
        nonlocal attempts
        attempts += 1
        await connection.execute(sa.text("update counters set value = value + 1"))

    async def count(database: Database) -> int:
        done = 0
        for _ in range(20):
            try:
                await database.transaction(work)
                done += 1
            except DatabaseAway:
                pass  # it met others each time
        return done

    done = sum(await asyncio.gather(*map(count, servers)))
    assert await value(servers[0], causal=True) == done
    assert attempts > done > 30


async def test_a_server_outside_of_the_primary_component_is_left_for_the_next_one(
    galera: Galera, servers: list[Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It still takes connections, and answers each statement with error 1047."""
    monkeypatch.setattr(database_hosts, "RETURN_LOOK", 0.5)
    first = servers[0]
    node, next_one = galera.nodes[:2]
    assert await port(first) == node.port
    with administer(node) as administrator, administrator.cursor() as cursor:
        cursor.execute(ISOLATE.format(1))
        started = time.monotonic()
        while node.status("wsrep_ready") == "ON":
            await asyncio.sleep(0.05)

        async def work(connection: AsyncConnection) -> int:
            await connection.execute(sa.text("update counters set value = 7"))
            return int((await connection.execute(sa.text("select @@port"))).scalar_one())

        assert await first.transaction(work) == next_one.port, "tried again whole, and nobody was told"
        assert await asyncio.gather(*(port(first) for _ in range(6))) == [next_one.port] * 6
        assert time.monotonic() - started < 10
        cursor.execute(ISOLATE.format(0))
    await asyncio.to_thread(node.wait_synced, 3)
    async with asyncio.timeout(20):
        while await port(first) != node.port:
            await asyncio.sleep(0.05)
    assert await value(first, causal=True) == 7


async def test_nodes_that_start_at_once_on_different_servers_make_the_tables_once(galera: Galera) -> None:
    """CREATE and ALTER are ordered among all servers; the lease is a row, for locks are one server's own."""
    async with databases(galera) as opened:
        for service in ("registry", "router"):
            await asyncio.gather(
                *(migrate(database, service, f"services.{service}:migrations") for database in opened * 3)
            )
        for database in opened:
            async with database.read(causal=True) as connection:
                there = set(await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names()))
                assert {"accounts", "messages", "sessions", "cluster_nodes"} <= there
                assert (await connection.execute(sa.text("select * from migration_leases"))).all() == []


async def test_every_table_has_a_primary_key(galera: Galera) -> None:
    """Rows without one can't be certified."""
    async with databases(galera) as opened:
        for service in ("registry", "router"):
            await migrate(opened[0], service, f"services.{service}:migrations")
        async with opened[0].read() as connection:
            without = await connection.execute(
                sa.text(
                    "select table_name from information_schema.tables t where table_schema = database() and not exists"
                    " (select * from information_schema.table_constraints c where c.table_schema = t.table_schema and"
                    " c.table_name = t.table_name and c.constraint_type = 'PRIMARY KEY')"
                )
            )
            assert without.all() == []


@pytest.mark.whole
async def test_a_node_that_was_killed_or_lost_its_disk_comes_back_with_all_data(
    galera: Galera, servers: list[Database]
) -> None:
    node = galera.nodes[2]
    for number, disk in ((1, "kept"), (2, "lost")):
        node.kill()
        if disk == "lost":
            node.lose()
        await put(servers[0], number)
        started = time.monotonic()
        await asyncio.to_thread(node.start)
        print(f"\na killed node, its disk {disk}: in sync {time.monotonic() - started:.1f} s after its start")
        with administer(node) as administrator, administrator.cursor() as cursor:
            cursor.execute(f"select value from {servers[0].url.database}.counters")
            assert cursor.fetchall() == ((number,),)


@pytest.mark.whole
async def test_a_cluster_whose_nodes_were_all_killed_at_once_is_there_again_when_they_are_started(
    galera: Galera, servers: list[Database]
) -> None:
    await put(servers[0], 5)
    for node in galera.nodes:
        node.kill()
    with pytest.raises(DatabaseAway):
        await value(servers[0])
    started = time.monotonic()
    await asyncio.to_thread(galera.heal)
    print(f"\nall nodes killed: in sync {time.monotonic() - started:.1f} s after their start")
    for database in servers:
        assert await value(database, causal=True) == 5
