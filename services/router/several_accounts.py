"""Rows of several accounts, read together: whoever asks for one waits for those who ask beside him (Grouping)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa

from tidings.kit.db import Database
from tidings.xmpp.jid import Jid


def of_several(table: sa.Table) -> sa.ColumnElement[bool]:
    """The rows of accounts of one host: a condition for the statements of `rows_of`. Made once: to put it together
    takes longer than to look one row up."""
    names = sa.bindparam("locals", expanding=True, type_=table.c.local.type)
    return sa.and_(table.c.host == sa.bindparam("host", type_=table.c.host.type), table.c.local.in_(names))


async def rows_of(database: Database, statement: sa.Select[Any], accounts: Iterable[Jid]) -> list[tuple[Jid, Any]]:
    """Each row that a statement finds, with its account. Raises DatabaseAway."""
    async with database.read(causal=True) as connection:
        return [
            (Jid(row.local, row.host, ""), row)
            for parameters in _by_host(accounts)
            for row in await connection.execute(statement, parameters)
        ]


def _by_host(accounts: Iterable[Jid]) -> Iterator[dict[str, object]]:
    names: dict[str, set[str]] = {}
    for account in accounts:
        names.setdefault(account.domain, set()).add(account.local)
    for host, locals_ in names.items():
        yield {"host": host, "locals": sorted(locals_)}
