"""Message stores to be tested: in memory, and as two routers have them on one SQLite or MariaDB."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router.messages import ArchiveQuery, Kept, Message, MessageStore, message_id
from services.router.messages_sql import SqlMessageStore
from services.router.store import SessionTable
from tidings.kit.database_url import DatabaseUrl
from tidings.kit.db import STATEMENT_TIMEOUT, Database, DatabaseAway
from tidings.xmpp.jid import Jid

KEY = bytes(32)
ROMEO = Jid.parse("romeo@example.org")
JULIET = Jid.parse("juliet@example.org")
NURSE = Jid.parse("nurse@example.net")
EVERYTHING = ArchiveQuery(limit=10_000)


class Faulty(Database):
    """A database between which and its user somebody stands."""

    def __init__(self, url: DatabaseUrl) -> None:
        super().__init__(url)
        self.away = False
        # Commits, and then does not answer.
        self.answers = True
        # What a commit waits for, and whether one does.
        self.gate: asyncio.Event | None = None
        self.at_gate = asyncio.Event()
        self.statements: list[str] = []

    async def start(self) -> None:
        await super().start()
        assert self._engine is not None
        event.listen(self._engine.sync_engine, "before_cursor_execute", self._noted)

    def _noted(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        self.statements.append(statement)

    @asynccontextmanager
    async def read(self, causal: bool = False) -> AsyncIterator[AsyncConnection]:
        if self.away:
            raise DatabaseAway("away")
        async with super().read(causal) as connection:
            yield connection

    @asynccontextmanager
    async def write(self, timeout: float = STATEMENT_TIMEOUT, causal: bool = False) -> AsyncIterator[AsyncConnection]:
        if self.away:
            raise DatabaseAway("away")
        async with super().write(timeout, causal) as connection:
            yield connection
            if self.gate is not None:
                self.at_gate.set()
                await self.gate.wait()
        if not self.answers:
            raise DatabaseAway("the answer was lost")


@dataclass
class Stores:
    store: MessageStore
    # Another router's.
    other: MessageStore
    sessions: SessionTable

    def databases(self) -> list[Faulty]:
        return [store._database for store in (self.store, self.other) if isinstance(store, SqlMessageStore)]  # type: ignore[misc]

    def set_away(self, away: bool) -> None:
        if not self.databases():
            self.store.away = away  # type: ignore[attr-defined]
        for database in self.databases():
            database.away = away


class Told:
    """Who waits for what is written, and what they were told, in order."""

    def __init__(self) -> None:
        self.order: list[bytes] = []
        self.errors: dict[bytes, Exception] = {}
        self._changed = asyncio.Event()

    def write(self, store: MessageStore, *messages: Message) -> None:
        for message in messages:
            store.write(message, lambda error, id_=message.id: self._done(id_, error))

    def _done(self, id_: bytes, error: Exception | None) -> None:
        self.order.append(id_)
        if error is not None:
            self.errors[id_] = error
        self._changed.set()

    async def of(self, number: int) -> list[bytes]:
        """Waits until so many were told."""
        async with asyncio.timeout(20):
            while len(self.order) < number:
                self._changed.clear()
                await self._changed.wait()
        return self.order


def message(
    account: Jid, number: int, *, peer: str = "juliet@example.org/balcony", at: int = 0, pending: bool = True,
    archived: bool = True, holder: str = "", origin: str = "session", from_jid: str | None = None,
) -> Message:  # fmt: skip
    return Message(
        account, message_id(KEY, str(account), origin, number + 1), peer, origin, number if origin else 0,
        peer if from_jid is None else from_jid, at or 1_000_000 + number, f"<message id='{number}'/>".encode(), pending,
        archived, holder,
    )  # fmt: skip


def numbers(messages: list[Kept]) -> list[int]:
    return [kept.number for kept in messages]


async def archive(stores: Stores, account: Jid = ROMEO, query: ArchiveQuery = EVERYTHING) -> list[int]:
    return numbers((await stores.store.page(account, query)).messages)


async def settled(store: MessageStore) -> None:
    """Waits until nothing waits to be written."""
    async with asyncio.timeout(20):
        while store.waiting_bytes:
            await asyncio.sleep(0.01)


async def rows(database: Database) -> int:
    async with database.read() as connection:
        return int((await connection.execute(sa.text("select count(*) from messages"))).scalar_one())
