"""The stores that contract suites run over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.router.messages_memory import MemoryMessageStore
from services.router.messages_sql import SqlMessageStore
from services.router.store_memory import MemorySessionTable
from services.router.store_sql_sessions import SqlSessionTable
from tests.contract.message_stores import (
    Faulty,
    Stores,
)
from tidings.kit.database_url import DatabaseUrl, parse
from tidings.kit.migrations import migrate


@pytest.fixture(params=["memory", "sqlite", "mysql"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stores]:
    if request.param == "memory":
        sessions = MemorySessionTable()
        store = MemoryMessageStore(sessions)
        yield Stores(store, store, sessions)
        return
    if request.param == "sqlite":
        url = DatabaseUrl("sqlite", path=tmp_path / "t.sqlite")
    else:
        url = parse(request.getfixturevalue("mariadb").create_database())
    databases = [Faulty(url), Faulty(url)]
    for database in databases:
        await database.start()
        await migrate(database, "router", "services.router:migrations")
    one, other = (SqlMessageStore(database) for database in databases)
    await one.start()
    await other.start()
    yield Stores(one, other, SqlSessionTable(databases[0]))
    await one.stop()
    await other.stop()
    for database in databases:
        await database.stop()
