"""What the registry's store must do with a shared database: locks, and rows of a newer release."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa
from sqlalchemy import event

from services.registry.schema import cluster_changes, cluster_nodes
from services.registry.store_sql import SqlNodeStore
from tests.contract.test_node_store import N1, N2, anybody
from tidings.cluster.node import NodeState
from tidings.kit.database_url import parse
from tidings.kit.db import Database
from tidings.kit.migrations import migrate
from tidings.testing.mariadb import MariaDB

ROW = cluster_nodes.c.hostname == N1.hostname


@pytest.fixture
async def mysql(mariadb: MariaDB) -> AsyncIterator[Database]:
    """An empty database of MariaDB."""
    opened = Database(parse(mariadb.create_database()))
    await opened.start()
    yield opened
    await opened.stop()


async def up(database: Database) -> SqlNodeStore:
    """A store in which one node is up."""
    await migrate(database, "registry", "services.registry:migrations")
    store = SqlNodeStore(database)
    await store.join(N1, None, anybody)
    await store.beat(N1.hostname, "i1", NodeState.UP, 0, 0)
    return store


async def until_a_beat_waits(database: Database) -> None:
    waiting = sa.text("select count(*) from information_schema.processlist where info like 'UPDATE cluster_nodes%'")
    async with asyncio.timeout(5):
        while True:
            async with database.read() as connection:
                if (await connection.execute(waiting)).scalar_one():
                    return
            await asyncio.sleep(0.02)


async def test_a_suspicion_in_the_midst_of_a_beat_is_taken_back(mysql: Database) -> None:
    store = await up(mysql)
    async with mysql.write() as connection:
        await connection.execute(cluster_nodes.update().where(ROW).values(state="suspect"))
        beat = asyncio.create_task(store.beat(N1.hostname, "i1", NodeState.UP, 0, 0))
        await until_a_beat_waits(mysql)
    assert await beat
    changes = await store.changes(0)
    assert changes is not None
    assert [change.kind.value for change in changes] == ["joined", "back", "back"]
    assert (await store.nodes())[1][0].state is NodeState.UP


async def test_a_beat_locks_its_row_no_longer_than_its_statement_takes(mysql: Database) -> None:
    """Who is cut off in a transaction leaves the row locked, and nobody can declare them dead."""
    store = await up(mysql)
    host, port = mysql.url.hosts[0]
    looked: list[Any] = []
    with pymysql.connect(
        host=host, port=port, user=mysql.url.user, password=mysql.url.password, database=mysql.url.database
    ) as other:

        def executed(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement.startswith("UPDATE cluster_nodes"):
                with other.cursor() as cursor:
                    cursor.execute("select beat from cluster_nodes for update nowait")
                    looked.append(cursor.fetchone())
                other.rollback()

        assert mysql._at_once is not None
        event.listen(mysql._at_once.sync_engine, "after_cursor_execute", executed)
        assert await store.beat(N1.hostname, "i1", NodeState.UP, 0, 0)
    assert looked == [(2,)]


async def test_a_state_that_only_a_newer_release_knows_is_suspect(database: Database) -> None:
    store = await up(database)
    await store.join(N2, None, anybody)
    async with database.write() as connection:
        await connection.execute(cluster_nodes.update().where(ROW).values(state="dreaming"))
    states = {node.hostname: node.state for node in (await store.nodes())[1]}
    assert states == {N1.hostname: NodeState.SUSPECT, N2.hostname: NodeState.JOINING}


async def test_a_change_that_only_a_newer_release_knows_is_passed_over(database: Database) -> None:
    store = await up(database)
    async with database.write() as connection:
        await connection.execute(
            cluster_changes.update().where(cluster_changes.c.version == 2).values(kind="dreaming")
        )
    await store.join(replace(N2, incarnation="i3"), None, anybody)
    changes = await store.changes(0)
    assert changes is not None
    assert [(change.version, change.kind.value) for change in changes] == [(1, "joined"), (3, "joined")]
