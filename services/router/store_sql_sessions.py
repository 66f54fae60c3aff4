"""Who owns which full JID, in the shared database."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router.schema import directed_presence, sessions
from services.router.several_accounts import of_several, rows_of
from services.router.store import DirectedChange, SessionRow
from tidings.kit.db import Database
from tidings.kit.grouping import Grouping
from tidings.xmpp.jid import Jid

_INSERT = sessions.insert()
_INSERT_DIRECTED = directed_presence.insert()
_OF_SEVERAL = sa.select(sessions).where(of_several(sessions))
_WHOLE = sa.select(sessions, directed_presence.c.receiver).outerjoin(
    directed_presence,
    sa.and_(*(directed_presence.c[name] == sessions.c[name] for name in ("host", "local", "session"))),
)


class SqlSessionTable:
    """Satisfies `services.router.store.SessionTable`. Binds and ends that come together are written together, and
    accounts that are asked for together are read together: where many are away, each message for them asks."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._binds = Grouping(self._insert)
        self._ends = Grouping(self._delete)
        self._accounts = Grouping(self._of_accounts)

    async def bind(self, jid: Jid, session: str, router: str) -> SessionRow | None:
        values = {
            "host": jid.domain, "local": jid.local, "resource_hash": _hash(jid.resource), "resource": jid.resource,
            "session": session, "epoch": 1, "router": router, "available": True,
        }  # fmt: skip

        if await self._binds.do(values):
            return None
        async with self._database.read(causal=True) as connection:
            present = _whole((await connection.execute(_WHOLE.where(*_is(jid)))).all())
        if present is None:
            return await self.bind(jid, session, router)  # it has gone meanwhile: again
        return present if present.session != session else None

    async def _insert(self, rows: Sequence[dict[str, Any]]) -> list[bool]:
        """Which of them found no other row in their place."""

        async def work(connection: AsyncConnection) -> list[bool]:
            entered = []
            for values in rows:
                try:
                    await connection.execute(_INSERT, values)
                    entered.append(True)
                except IntegrityError:
                    entered.append(False)  # this statement's own: the others stand
            return entered

        return await self._database.transaction(work, causal=True)

    async def replace(self, row: SessionRow, session: str, router: str) -> bool:
        return await self._change(row, SessionRow(row.jid, session, row.epoch + 1, router), available=True)

    async def move(self, row: SessionRow, router: str) -> bool:
        return await self._change(row, SessionRow(row.jid, row.session, row.epoch + 1, router))

    async def _change(self, row: SessionRow, changed: SessionRow, **values: Any) -> bool:
        async def work(connection: AsyncConnection) -> bool:
            to = {"session": changed.session, "epoch": changed.epoch, "router": changed.router, **values}
            if (await connection.execute(sessions.update().where(*_is_still(row)).values(**to))).rowcount:
                if changed.session != row.session:
                    await connection.execute(directed_presence.delete().where(*_directed_by(row.jid, row.session)))
                return True
            return (
                await connection.execute(sa.select(sessions.c.epoch).where(*_is_still(changed)))
            ).first() is not None

        return await self._database.transaction(work, causal=True)

    async def end(self, jid: Jid, session: str, epoch: int) -> SessionRow | None:
        return await self._ends.do((jid, session, epoch))

    async def _delete(self, ended: Sequence[tuple[Jid, str, int]]) -> list[SessionRow | None]:
        async def work(connection: AsyncConnection) -> list[SessionRow | None]:
            return [await _delete_one(connection, *one) for one in ended]

        return await self._database.transaction(work, causal=True)

    async def set_directed(self, changes: Sequence[DirectedChange]) -> None:
        async def work(connection: AsyncConnection) -> None:
            for change in changes:
                await _change_directed(connection, change)

        await self._database.transaction(work, causal=True)

    async def set_available(self, changes: Sequence[tuple[Jid, str, int, bool]]) -> None:
        async def work(connection: AsyncConnection) -> None:
            for jid, session, epoch, available in changes:
                here = (*_is(jid), sessions.c.session == session, sessions.c.epoch == epoch)
                await connection.execute(sessions.update().where(*here).values(available=available))

        await self._database.transaction(work, causal=True)

    async def of_account(self, account: Jid) -> list[SessionRow]:
        return await self._accounts.do(account)

    async def _of_accounts(self, accounts: Sequence[Jid]) -> list[list[SessionRow]]:
        found: dict[Jid, list[SessionRow]] = {account.bare: [] for account in accounts}
        for account, row in await rows_of(self._database, _OF_SEVERAL, accounts):
            found[account].append(_row(row))
        return [found[account.bare] for account in accounts]

    async def of_router(self, router: str) -> list[SessionRow]:
        async with self._database.read(causal=True) as connection:
            rows = await connection.execute(sa.select(sessions).where(sessions.c.router == router))
            return [_row(row) for row in rows]

    async def ids_of_router(self, router: str) -> set[str]:
        async with self._database.read(causal=True) as connection:
            ids = await connection.execute(sa.select(sessions.c.session).where(sessions.c.router == router))
            return set(ids.scalars())

    async def routers(self) -> dict[str, int]:
        counts = sa.select(sessions.c.router, sa.func.count().label("total")).group_by(sessions.c.router)
        async with self._database.read(causal=True) as connection:
            return {row.router: row.total for row in await connection.execute(counts)}


async def _delete_one(connection: AsyncConnection, jid: Jid, session: str, epoch: int) -> SessionRow | None:
    here = (*_is(jid), sessions.c.session == session, sessions.c.epoch == epoch)
    # Locked: what its router writes just now of directed presence comes before, or finds no row.
    row = _whole((await connection.execute(_WHOLE.where(*here).with_for_update())).all())
    if row is None or not (await connection.execute(sessions.delete().where(*here))).rowcount:
        return None
    if row.directed:
        await connection.execute(directed_presence.delete().where(*_directed_by(jid, session)))
    return row


async def _change_directed(connection: AsyncConnection, change: DirectedChange) -> None:
    jid, session, epoch, added, removed = change
    here = (*_is(jid), sessions.c.session == session, sessions.c.epoch == epoch)
    if (await connection.execute(sa.select(sessions.c.epoch).where(*here).with_for_update())).first() is None:
        return
    hashes = None if removed is None else [_hash(receiver) for receiver in (*removed, *added)]
    old = () if hashes is None else (directed_presence.c.receiver_hash.in_(hashes),)
    await connection.execute(directed_presence.delete().where(*_directed_by(jid, session), *old))
    if added:
        of = {"host": jid.domain, "local": jid.local, "session": session}
        rows = [{**of, "receiver_hash": _hash(receiver), "receiver": receiver} for receiver in added]
        await connection.execute(_INSERT_DIRECTED, rows)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _is(jid: Jid) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        sessions.c.host == jid.domain,
        sessions.c.local == jid.local,
        sessions.c.resource_hash == _hash(jid.resource),
    )


def _directed_by(jid: Jid, session: str) -> tuple[sa.ColumnElement[bool], ...]:
    table = directed_presence.c
    return table.host == jid.domain, table.local == jid.local, table.session == session


def _is_still(row: SessionRow) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        *_is(row.jid),
        sessions.c.session == row.session,
        sessions.c.epoch == row.epoch,
        sessions.c.router == row.router,
    )


def _row(row: Any) -> SessionRow:
    jid = Jid(row.local, row.host, row.resource)
    return SessionRow(jid, row.session, row.epoch, row.router, bool(row.available))


def _whole(rows: Sequence[Any]) -> SessionRow | None:
    """One session's row, joined with those whom it sent presence directly."""
    if not rows:
        return None
    return replace(_row(rows[0]), directed=tuple(sorted(row.receiver for row in rows if row.receiver is not None)))
