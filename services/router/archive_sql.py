"""The archive in the shared database: read by pages, swept by age, and the preferences of accounts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router.messages import ArchiveQuery, Kept, Page, Preferences, UnknownId, id_bytes, id_text
from services.router.messages_statements import peer_hash
from services.router.schema import archive_preferences, message_positions, messages
from services.router.several_accounts import of_several, rows_of
from tidings.kit.db import Database, insert_or_update
from tidings.kit.grouping import Grouping
from tidings.xmpp.jid import Jid

# Received times grow with positions, but not strictly: clocks of routers differ, and messages wait for the database.
# Milliseconds by which a message may have been received before one in front of it and still be found by its time.
SKEW = 3_600_000
# Accounts that are looked at together for messages to be removed.
SWEEP = 500

KEPT = (
    messages.c.position,
    messages.c.id,
    messages.c.peer,
    messages.c.origin,
    messages.c.origin_number,
    messages.c.from_jid,
    messages.c.received_unix_ms,
    messages.c.stanza,
)

_PREFERENCES = sa.select(archive_preferences).where(of_several(archive_preferences))

# Places of an account that are looked at together, for a time.
PROBES = 32
_PROBE = (
    "select * from (select {0} as probe, received_unix_ms from messages where host = :host and local = :local "
    "and position >= :place{0} order by position limit 1) as probe{0}"
)
_PROBED = sa.text(" union all ".join(map(_PROBE.format, range(PROBES)))).bindparams(
    sa.bindparam("host", type_=messages.c.host.type), sa.bindparam("local", type_=messages.c.local.type)
)


def of(table: sa.Table, account: Jid) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return table.c.host == account.domain, table.c.local == account.local


def kept(row: Any) -> Kept:
    known = id_bytes(row.id)
    assert known is not None, "all who write here write such ids"
    return Kept(
        row.position, known, row.peer or row.from_jid, row.origin or "", row.origin_number or 0, row.from_jid,
        row.received_unix_ms, row.stanza,
    )  # fmt: skip


class SqlArchive:
    """The part of `services.router.messages.MessageStore` that needs no queue."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # How far the present sweep of each host has come: a localpart.
        self._swept: dict[str, str] = {}
        self._preferences = Grouping(self._preferences_of)

    async def page(self, account: Jid, query: ArchiveQuery) -> Page:
        async with self._database.read(causal=True) as connection:
            low, high = await _between(connection, account, query)
            where = [*of(messages, account), messages.c.archived.is_(True)]
            if low is not None:
                where.append(messages.c.position > low)
            if high is not None:
                where.append(messages.c.position < high)
            if query.start is not None:
                where.append(messages.c.received_unix_ms >= query.start)
            if query.end is not None:
                where.append(messages.c.received_unix_ms <= query.end)
            if query.with_ is not None:
                where += [messages.c.peer_hash == peer_hash(str(query.with_)), _is_with(query.with_)]
            order = messages.c.position.desc() if query.backwards else messages.c.position
            rows = await connection.execute(sa.select(*KEPT).where(*where).order_by(order).limit(query.limit + 1))
            found = [kept(row) for row in rows]
        some = found[: query.limit]
        return Page(some[::-1] if query.backwards else some, len(found) <= query.limit)

    async def expire(self, host: str, before_unix_ms: int, limit: int) -> int:
        """Walks through the accounts, and goes on at the next call where it was when it had done enough."""
        removed = 0
        while True:
            accounts = await self._oldest(host)
            for local, received in accounts:
                if received is not None and received < before_unix_ms:
                    removed += await self._expire(Jid(local, host, ""), before_unix_ms, limit - removed)
                    if removed >= limit:
                        return removed
                self._swept[host] = local
            if len(accounts) < SWEEP:
                self._swept.pop(host, None)
                return removed

    async def _oldest(self, host: str) -> list[tuple[str, int | None]]:
        """The next accounts, and when the first message in their archives was received."""
        oldest = (
            sa.select(messages.c.received_unix_ms)
            .where(
                messages.c.host == message_positions.c.host,
                messages.c.local == message_positions.c.local,
                messages.c.archived.is_(True),
            )
            .order_by(messages.c.position)
            .limit(1)
            .scalar_subquery()
        )
        wanted = (
            sa.select(message_positions.c.local, oldest)
            .where(message_positions.c.host == host, message_positions.c.local > self._swept.setdefault(host, ""))
            .order_by(message_positions.c.local)
            .limit(SWEEP)
        )
        async with self._database.read() as connection:
            return [(local, received) for local, received in await connection.execute(wanted)]

    async def _expire(self, account: Jid, before_unix_ms: int, limit: int) -> int:
        archived = (*of(messages, account), messages.c.archived.is_(True))
        first = (
            sa.select(messages.c.position, messages.c.received_unix_ms)
            .where(*archived)
            .order_by(messages.c.position)
            .limit(limit)
        )

        async def work(connection: AsyncConnection) -> int:
            last = 0
            for position, received in await connection.execute(first):
                if received >= before_unix_ms:
                    break
                last = position
            old = (*archived, messages.c.position <= last)
            removed = await connection.execute(messages.delete().where(*old, messages.c.pending.is_(False)))
            left = await connection.execute(messages.update().where(*old).values(archived=False))
            return removed.rowcount + left.rowcount

        return await self._database.transaction(work)

    async def preferences(self, account: Jid) -> Preferences | None:
        return await self._preferences.do(account.bare)

    async def _preferences_of(self, accounts: Sequence[Jid]) -> list[Preferences | None]:
        found = {
            account: Preferences(row.standard, tuple(json.loads(row.always_jids)), tuple(json.loads(row.never_jids)))
            for account, row in await rows_of(self._database, _PREFERENCES, accounts)
        }
        return [found.get(account) for account in accounts]

    async def set_preferences(self, account: Jid, preferences: Preferences) -> None:
        values = {
            "host": account.domain,
            "local": account.local,
            "standard": preferences.default,
            "always_jids": json.dumps(preferences.always).encode(),
            "never_jids": json.dumps(preferences.never).encode(),
        }

        async def work(connection: AsyncConnection) -> None:
            update = ("standard", "always_jids", "never_jids")
            await connection.execute(insert_or_update(connection, archive_preferences, values, update))

        await self._database.transaction(work)


async def _between(connection: AsyncConnection, account: Jid, query: ArchiveQuery) -> tuple[int | None, int | None]:
    """The positions between which the page is: what is asked for by id exactly, by time with room to spare."""
    low: list[int] = []
    high: list[int] = []
    if query.after is not None:
        low.append(await _position(connection, account, query.after))
    if query.before is not None:
        high.append(await _position(connection, account, query.before))
    if query.start is not None:
        low.append(await _before(connection, account, query.start - SKEW))
    if query.end is not None:
        high.append(await _before(connection, account, query.end + SKEW + 1) + 1)
    return max(low, default=None), min(high, default=None)


async def _position(connection: AsyncConnection, account: Jid, id: bytes) -> int:
    wanted = sa.select(messages.c.position).where(*of(messages, account), messages.c.id == id_text(id))
    position = (await connection.execute(wanted)).scalar()
    if position is None:
        raise UnknownId
    return int(position)


async def _before(connection: AsyncConnection, account: Jid, unix_ms: int) -> int:
    """The last position up to which messages were received before a time.

    It is found in the primary key, as a name in a telephone book: four statements for a million messages.
    An index by time would be written with every message, for a few queries.
    """
    wanted = sa.select(message_positions.c.last).where(*of(message_positions, account))
    low, high = 0, ((await connection.execute(wanted)).scalar() or 0) + 1
    while high - low > 1:
        step = -(-(high - low) // (PROBES + 1))
        places = [min(low + step * (number + 1), high - 1) for number in range(PROBES)]
        parameters: dict[str, object] = {f"place{number}": place for number, place in enumerate(places)}
        parameters |= {"host": account.domain, "local": account.local}
        received = dict(map(tuple, await connection.execute(_PROBED, parameters)))
        for number, place in enumerate(places):
            if received.get(number, unix_ms) >= unix_ms:
                high = place
                break
            low = place
    return low


def _is_with(with_: Jid) -> sa.ColumnElement[bool]:
    """The hash stands for a bare JID, and for a few others."""
    text = str(with_)
    if with_.resource:
        return messages.c.peer == text
    # '0' comes next after '/'.
    return sa.or_(messages.c.peer == text, sa.and_(messages.c.peer > f"{text}/", messages.c.peer < f"{text}0"))
