"""The router's messages in the shared database, written in groups: a commit costs the same for one row or 500."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router.schema import message_positions, messages
from services.router.store import KeptMessage
from tidings.kit.db import Database, DatabaseAway
from tidings.kit.tasks import Tasks
from tidings.xmpp.jid import Jid

# Rows of one commit, and rows that may wait for one; whoever brings more waits with them.
GROUP = 500
MAX_WAITING = 10_000


class SqlMessageStore:
    """Satisfies `services.router.store.MessageStore`. Between `start` and `stop` messages can be kept."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[None]]] = asyncio.Queue(MAX_WAITING)
        self._tasks = Tasks()

    async def start(self) -> None:
        self._tasks.spawn(self._write_groups(), "message store: group commit")

    async def stop(self) -> None:
        """Writes what waits, then ends."""
        try:
            async with asyncio.timeout(5.0):
                await self._waiting.join()
        except TimeoutError:
            pass  # the database is away; who waits for a commit is told so
        await self._tasks.stop()
        while not self._waiting.empty():
            self._waiting.get_nowait()[1].set_exception(DatabaseAway("the router stops"))

    async def keep(
        self,
        account: Jid,
        *,
        id_: str,
        from_jid: str,
        received_unix_ms: int,
        stanza: bytes,
        origin: str,
        number: int,
    ) -> None:
        key = f"{account}\0{origin}\0{number}".encode()
        row = {
            "host": account.domain, "local": account.local, "id": id_, "from_jid": from_jid,
            "received_unix_ms": received_unix_ms, "stanza": stanza, "pending": True, "archived": False,
            "origin": origin or None, "origin_number": number if origin else None,
            "origin_key": hashlib.blake2b(key, digest_size=32).digest() if origin else None,
        }  # fmt: skip
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._waiting.put((row, committed))
        await committed

    async def _write_groups(self) -> None:
        while True:
            group = [await self._waiting.get()]
            while len(group) < GROUP and not self._waiting.empty():
                group.append(self._waiting.get_nowait())
            await self._write_group(group)
            for _ in group:
                self._waiting.task_done()

    async def _write_group(
        self, group: list[tuple[dict[str, Any], asyncio.Future[None]]], again: bool = False
    ) -> None:
        """Commits a group; one that is refused is tried in halves, so that a bad row harms itself alone."""
        try:
            await self._database.transaction(lambda connection: _insert(connection, [row for row, _ in group]))
        except IntegrityError as error:
            if len(group) > 1:
                middle = len(group) // 2
                await self._write_group(group[:middle])
                await self._write_group(group[middle:])
                return
            # Either it is there already, or another router made the account's counter at the same moment.
            if not again:
                await self._write_group(group, again=True)
                return
            _settle(group, None if group[0][0]["origin_key"] is not None else error)
        except Exception as error:
            _settle(group, error)
        else:
            _settle(group, None)

    async def pending_count(self, account: Jid) -> int:
        wanted = sa.select(sa.func.count()).select_from(messages).where(*_pending(account))
        async with self._database.read() as connection:
            return int((await connection.execute(wanted)).scalar_one())

    async def take(self, account: Jid, limit: int, give: Callable[[list[KeptMessage]], bool]) -> int:
        wanted = (
            sa.select(
                messages.c.position,
                messages.c.id,
                messages.c.from_jid,
                messages.c.received_unix_ms,
                messages.c.stanza,
            )
            .where(*_pending(account))
            .order_by(messages.c.position)
            .limit(limit)
        )

        async def work(connection: AsyncConnection) -> int:
            # Who takes at the same moment waits here for our commit, and then finds what is left. (Locks of Galera
            # are one server's own; all routers use the same one while it answers.)
            first = [KeptMessage(*row) for row in await connection.execute(wanted.with_for_update())]
            if not first:
                return 0
            here = (*_of(account), messages.c.position.in_([kept.position for kept in first]))
            await connection.execute(messages.delete().where(*here, messages.c.archived.is_(False)))
            await connection.execute(messages.update().where(*here).values(pending=False))
            if not give(first):
                raise _NotTaken
            return len(first)

        async with self._database.read() as connection:
            some = sa.select(messages.c.position).where(*_pending(account)).limit(1)
            if (await connection.execute(some)).first() is None:
                return 0  # as for most who come: they need no transaction
        try:
            return await self._database.transaction(work)
        except _NotTaken:
            return 0

    async def delete_all(self, account: Jid) -> None:
        async def work(connection: AsyncConnection) -> None:
            await connection.execute(messages.delete().where(*_of(account)))
            # The positions stay: an account of the same name later goes on behind them.

        await self._database.transaction(work)


class _NotTaken(Exception):
    """Rolls back what was not given to anybody."""


def _of(account: Jid) -> tuple[sa.ColumnElement[bool], ...]:
    return messages.c.host == account.domain, messages.c.local == account.local


def _pending(account: Jid) -> tuple[sa.ColumnElement[bool], ...]:
    return *_of(account), messages.c.pending.is_(True)


async def _insert(connection: AsyncConnection, rows: list[dict[str, Any]]) -> None:
    """Gives positions and inserts; the accounts' counters are locked till the commit, so order is commit order."""
    by_account: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_account[row["host"], row["local"]].append(row)
    for (host, local), own in sorted(by_account.items()):
        here = sa.and_(message_positions.c.host == host, message_positions.c.local == local)
        raised = await connection.execute(
            message_positions.update().where(here).values(last=message_positions.c.last + len(own))
        )
        if raised.rowcount:
            last = int((await connection.execute(sa.select(message_positions.c.last).where(here))).scalar_one())
        else:
            last = len(own)
            await connection.execute(message_positions.insert().values(host=host, local=local, last=last))
        for position, row in enumerate(own, last - len(own) + 1):
            row["position"] = position
    await connection.execute(messages.insert(), rows)


def _settle(group: list[tuple[dict[str, Any], asyncio.Future[None]]], error: Exception | None) -> None:
    for _, committed in group:
        if not committed.done():
            if error is None:
                committed.set_result(None)
            else:
                committed.set_exception(error)
