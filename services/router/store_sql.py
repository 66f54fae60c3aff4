"""The router's accounts and rosters in the shared database. Messages: messages_sql.py."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router.schema import (
    account_keys,
    accounts,
    roster_items,
    rosters,
    router_values,
)
from services.router.several_accounts import of_several, rows_of
from services.router.store import AccountExists, AccountRow, Roster, RosterItem
from tidings.kit.db import Database, insert_or_update
from tidings.kit.grouping import Grouping
from tidings.xmpp.jid import Jid
from tidings.xmpp.sasl import ScramKeys

_EXISTING = sa.select(accounts.c.local, accounts.c.host).where(of_several(accounts))


def of(table: sa.Table, host: str, local: str) -> sa.ColumnElement[bool]:
    """The rows of one account."""
    return sa.and_(table.c.host == host, table.c.local == local)


class SqlAccountStore:
    """Satisfies `services.router.store.AccountStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._exist = Grouping(self._existing)

    async def create(self, host: str, local: str, keys: Mapping[str, ScramKeys]) -> None:
        async def work(connection: AsyncConnection) -> None:
            now = int(time.time() * 1000)
            await connection.execute(accounts.insert().values(host=host, local=local, created_unix_ms=now))
            await connection.execute(account_keys.insert(), _key_rows(host, local, keys))

        try:
            await self._database.transaction(work, causal=True)
        except IntegrityError:
            raise AccountExists(f"{local}@{host}") from None

    async def keys(self, host: str, local: str, hash_name: str) -> ScramKeys | None:
        wanted = sa.select(
            account_keys.c.salt,
            account_keys.c.stored_key,
            account_keys.c.server_key,
            account_keys.c.iterations,
        ).where(of(account_keys, host, local), account_keys.c.hash == hash_name)
        async with self._database.read(causal=True) as connection:
            row = (await connection.execute(wanted)).first()
        return ScramKeys(*row) if row is not None else None

    async def set_keys(self, host: str, local: str, keys: Mapping[str, ScramKeys]) -> None:
        async def work(connection: AsyncConnection) -> None:
            present = sa.select(accounts.c.local).where(of(accounts, host, local)).with_for_update()
            if (await connection.execute(present)).first() is None:
                return
            await connection.execute(account_keys.delete().where(of(account_keys, host, local)))
            await connection.execute(account_keys.insert(), _key_rows(host, local, keys))

        await self._database.transaction(work, causal=True)

    async def delete(self, host: str, local: str) -> None:
        async def work(connection: AsyncConnection) -> None:
            await connection.execute(account_keys.delete().where(of(account_keys, host, local)))
            await connection.execute(accounts.delete().where(of(accounts, host, local)))

        await self._database.transaction(work, causal=True)

    async def exists(self, host: str, local: str) -> bool:
        return await self._exist.do(Jid(local, host, ""))

    async def _existing(self, wanted: Sequence[Jid]) -> list[bool]:
        found = {account for account, _ in await rows_of(self._database, _EXISTING, wanted)}
        return [account in found for account in wanted]

    async def page(self, host: str | None, after: str, limit: int) -> list[AccountRow]:
        jid = accounts.c.local.concat("@").concat(accounts.c.host).label("jid")
        wanted = sa.select(accounts.c.local, accounts.c.host, accounts.c.created_unix_ms).order_by(jid).limit(limit)
        if host is not None:
            wanted = wanted.where(accounts.c.host == host)
        if after:
            wanted = wanted.where(jid > after)
        async with self._database.read(causal=True) as connection:
            rows = await connection.execute(wanted)
            return [AccountRow(f"{row.local}@{row.host}", row.created_unix_ms) for row in rows]

    async def shared_key(self, name: str) -> bytes:
        wanted = sa.select(router_values.c.content).where(router_values.c.name == name)
        async with self._database.read(causal=True) as connection:
            found = (await connection.execute(wanted)).scalar()
        if found is not None:
            return bytes(found)
        made = router_values.insert().values(name=name, content=secrets.token_bytes(32))
        try:
            await self._database.transaction(lambda connection: connection.execute(made))
        except IntegrityError:
            pass  # another router was first, and its key counts
        return await self.shared_key(name)


def _key_rows(host: str, local: str, keys: Mapping[str, ScramKeys]) -> list[dict[str, Any]]:
    return [{"host": host, "local": local, "hash": name, **value._asdict()} for name, value in keys.items()]


class SqlRosterStore:
    """Satisfies `services.router.store.RosterStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self, account: Jid) -> Roster:
        host, local = account.domain, account.local
        async with self._database.read(causal=True) as connection:
            version = (
                await connection.execute(sa.select(rosters.c.version).where(of(rosters, host, local)))
            ).scalar()
            rows = await connection.execute(
                sa.select(roster_items).where(of(roster_items, host, local), roster_items.c.removed.is_(False))
            )
            return Roster(version or 0, {row.contact: _item(row) for row in rows})

    async def put(self, account: Jid, item: RosterItem) -> int:
        return await self._change(
            account, item.contact,
            removed=False, name=item.name.encode(), contact_groups=json.dumps(item.groups).encode(),
            subscription=item.subscription, ask=item.ask, pending_in=item.pending_in, approved=item.approved,
        )  # fmt: skip

    async def remove(self, account: Jid, contact: str) -> int:
        return await self._change(
            account, contact, removed=True, name=b"", contact_groups=b"[]", subscription="none", ask=False,
            pending_in=b"", approved=False,
        )  # fmt: skip

    async def _change(self, account: Jid, contact: str, **values: Any) -> int:
        host, local = account.domain, account.local

        async def work(connection: AsyncConnection) -> int:
            # The roster's row first: whoever changes the same roster waits for it.
            raised = await connection.execute(
                rosters.update().where(of(rosters, host, local)).values(version=rosters.c.version + 1)
            )
            if raised.rowcount:
                wanted = sa.select(rosters.c.version).where(of(rosters, host, local))
                version = int((await connection.execute(wanted)).scalar_one())
            else:
                version = 1
                await connection.execute(rosters.insert().values(host=host, local=local, version=version))
            row = {
                "host": host, "local": local, "contact_hash": _hash(contact), "contact": contact,
                "version": version, **values,
            }  # fmt: skip
            await connection.execute(insert_or_update(connection, roster_items, row, ["version", *values]))
            return version

        try:
            return await self._database.transaction(work, causal=True)
        except IntegrityError:
            # Two made the same roster's first item at once; now there is one.
            return await self._database.transaction(work, causal=True)

    async def changes(self, account: Jid, since: int) -> list[tuple[int, str]] | None:
        host, local = account.domain, account.local
        async with self._database.read(causal=True) as connection:
            version = (
                await connection.execute(sa.select(rosters.c.version).where(of(rosters, host, local)))
            ).scalar()
            if since > (version or 0):
                return None
            rows = await connection.execute(
                sa.select(roster_items.c.version, roster_items.c.contact)
                .where(of(roster_items, host, local), roster_items.c.version > since)
                .order_by(roster_items.c.version)
            )
            return [(row.version, row.contact) for row in rows]

    async def delete_all(self, account: Jid) -> None:
        async def work(connection: AsyncConnection) -> None:
            for table in (roster_items, rosters):
                await connection.execute(table.delete().where(of(table, account.domain, account.local)))

        await self._database.transaction(work, causal=True)


def _hash(contact: str) -> bytes:
    return hashlib.blake2b(contact.encode(), digest_size=16).digest()


def _item(row: Any) -> RosterItem:
    return RosterItem(
        contact=row.contact, name=bytes(row.name).decode(), groups=tuple(json.loads(row.contact_groups)),
        subscription=row.subscription, ask=row.ask, pending_in=bytes(row.pending_in), approved=row.approved,
    )  # fmt: skip
