"""Who owns which full JID, in the shared database."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router.schema import sessions
from services.router.store import SessionRow
from tidings.kit.db import Database
from tidings.xmpp.jid import Jid


class SqlSessionTable:
    """Satisfies `services.router.store.SessionTable`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def bind(self, jid: Jid, session: str, router: str) -> SessionRow | None:
        values = {
            "host": jid.domain, "local": jid.local, "resource_hash": _hash(jid), "resource": jid.resource,
            "session": session, "epoch": 1, "router": router, "available": True,
        }  # fmt: skip
        try:
            async with self._database.write() as connection:
                await connection.execute(sessions.insert().values(values))
            return None
        except IntegrityError:
            pass
        async with self._database.read() as connection:
            row = (await connection.execute(sa.select(sessions).where(*_is(jid)))).first()
        # It may have gone meanwhile: then again.
        return _row(row) if row is not None else await self.bind(jid, session, router)

    async def replace(self, row: SessionRow, session: str, router: str) -> bool:
        return await self._change(row, session=session, epoch=row.epoch + 1, router=router, available=True)

    async def move(self, row: SessionRow, router: str) -> bool:
        return await self._change(row, epoch=row.epoch + 1, router=router)

    async def _change(self, row: SessionRow, **values: Any) -> bool:
        async def work(connection: AsyncConnection) -> bool:
            here = (
                *_is(row.jid),
                sessions.c.session == row.session,
                sessions.c.epoch == row.epoch,
                sessions.c.router == row.router,
            )
            return bool((await connection.execute(sessions.update().where(*here).values(**values))).rowcount)

        return await self._database.transaction(work)

    async def end(self, jid: Jid, session: str, epoch: int) -> SessionRow | None:
        async def work(connection: AsyncConnection) -> SessionRow | None:
            here = (*_is(jid), sessions.c.session == session, sessions.c.epoch == epoch)
            row = (await connection.execute(sa.select(sessions).where(*here))).first()
            if row is None:
                return None
            removed = await connection.execute(sessions.delete().where(*here))
            return _row(row) if removed.rowcount else None

        return await self._database.transaction(work)

    async def set_available(self, changes: Sequence[tuple[Jid, str, bool]]) -> None:
        async def work(connection: AsyncConnection) -> None:
            for jid, session, available in changes:
                here = (*_is(jid), sessions.c.session == session)
                await connection.execute(sessions.update().where(*here).values(available=available))

        await self._database.transaction(work)

    async def of_account(self, account: Jid) -> list[SessionRow]:
        return await self._rows(sessions.c.host == account.domain, sessions.c.local == account.local)

    async def of_router(self, router: str) -> list[SessionRow]:
        return await self._rows(sessions.c.router == router)

    async def routers(self) -> list[str]:
        async with self._database.read() as connection:
            found = await connection.execute(sa.select(sessions.c.router).distinct())
            return sorted(router for (router,) in found)

    async def _rows(self, *where: sa.ColumnElement[bool]) -> list[SessionRow]:
        async with self._database.read() as connection:
            return [_row(row) for row in await connection.execute(sa.select(sessions).where(*where))]


def _hash(jid: Jid) -> bytes:
    return hashlib.blake2b(jid.resource.encode(), digest_size=16).digest()


def _is(jid: Jid) -> tuple[sa.ColumnElement[bool], ...]:
    return sessions.c.host == jid.domain, sessions.c.local == jid.local, sessions.c.resource_hash == _hash(jid)


def _row(row: Any) -> SessionRow:
    jid = Jid(row.local, row.host, row.resource)
    return SessionRow(jid, row.session, row.epoch, row.router, bool(row.available))
