"""A node's way to the database that a test makes slow, or lets end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.kit.database_url import parse
from tidings.kit.db import Database, DatabaseAway

T = TypeVar("T")


async def at_once() -> None:
    """The database answers."""


async def away() -> None:
    """It does not."""
    raise DatabaseAway("a test says so")


class UnsureDatabase(Database):
    """One node's way to the database, which a test makes slow, or lets end: before a change, behind it, or before
    something is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(parse(f"sqlite:///{path}"))
        self.before: Callable[[], Awaitable[None]] = at_once
        self.behind: Callable[[], Awaitable[None]] = at_once
        self.reading: Callable[[], Awaitable[None]] = at_once
        self._connections: list[aiosqlite.Connection] = []

    async def start(self) -> None:
        await super().start()
        assert self._engine is not None
        event.listen(self._engine.sync_engine, "connect", self._connected)

    def _connected(self, connection: Any, _record: object) -> None:
        self._connections.append(connection.driver_connection)

    async def die(self) -> None:
        """As with its process: what was begun is rolled back, and nothing stays locked."""
        await self.stop()
        for connection in self._connections:
            with suppress(ValueError):  # it is closed
                # First: one with a statement that is not finished stays open, and what it has locked stays locked.
                await connection.rollback()
            await connection.close()

    @asynccontextmanager
    async def read(self, causal: bool = False) -> AsyncIterator[AsyncConnection]:
        await self.reading()
        async with super().read(causal) as connection:
            yield connection

    async def transaction(self, work: Callable[[AsyncConnection], Awaitable[T]], causal: bool = False) -> T:
        await self.before()
        result = await super().transaction(work, causal)
        await self.behind()
        return result
