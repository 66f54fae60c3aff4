"""The statements of one commit of the message store: a group of messages, and marks of delivery.

Five for a whole group, and no work of SQLAlchemy for each row: for MySQL the values are put into the text of a
statement as numbers and hexadecimal literals, which need no escaping and are no dearer to parse than quoted bytes;
for SQLite they are the driver's tuples. Measured with MariaDB, stanzas of 300 bytes to 200 accounts: of this process
12.5 µs for a row, all included, 2.7 µs for a mark, and 1.1 ms for a group, whatever its size; of the server 19, 8 and
500 µs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router.messages import Message, id_text

# An account's messages, in the order in which they are to be committed, by host and localpart.
_Accounts = dict[tuple[str, str], list[Message]]

# Names whose literals are kept. Of the longest ones that is 40 MB.
CACHED = 2048

_RAISE = "insert into message_positions (host, local, last)"
_LAST = "select last from message_positions where"
_INSERT = (
    "insert into messages (host, local, position, id, peer, peer_hash, origin, origin_number, from_jid, "
    "received_unix_ms, stanza, pending, archived, holder)"
)
_UPDATE = "update messages set pending = 0 where archived = 1 and"
_DELETE = "delete from messages where archived = 0 and"
# Not what has come since: it has not got its mark.
_FIND = "select id from messages where not (archived = 1 and pending = 1) and"


def peer_hash(peer: str) -> int:
    """By what the messages with a peer, whatever its resource, are found: 31 bits, to be compared further."""
    return zlib.crc32(peer.partition("/")[0].encode()) & 0x7FFFFFFF


async def insert(connection: AsyncConnection, messages: Sequence[Message]) -> None:
    """Gives positions and inserts. The accounts' counters stay locked until the commit, so the order of positions is
    that of commits; everybody locks them in one order, so nobody waits in a circle. An id that is there already is
    left as it is."""
    accounts: _Accounts = {}
    for message in messages:
        account = message.account
        accounts.setdefault((account.domain, account.local), []).append(message)
    ordered = dict(sorted(accounts.items()))
    if connection.dialect.name == "mysql":
        await _insert_mysql(connection, ordered)
    else:
        await _insert_sqlite(connection, ordered)


async def mark(connection: AsyncConnection, ids: Sequence[bytes]) -> set[bytes]:
    """Takes the mark of being pending off; removes those that are not archived. Returns the ids without a row."""
    by_text = {id_text(id_): id_ for id_ in ids}
    texts = sorted(by_text)
    these = "','".join(texts)
    if connection.dialect.name == "mysql":
        update, delete, parameters = f"{_UPDATE} id in ('{these}')", f"{_DELETE} id in ('{these}')", None
    else:
        update, delete = f"{_UPDATE} id = ?", f"{_DELETE} id = ?"
        parameters = [(text,) for text in texts]
    # Rows that were not pending count too: most groups find all of theirs archived, and that is all.
    updated = await _run(connection, update, parameters)
    if updated == len(texts):
        return set()
    rows = await _execute(connection, f"{_FIND} id in ('{these}')", None)
    # MySQL gives names as bytes, for it is to compare them so.
    found = {text.decode() if isinstance(text, bytes) else text for (text,) in rows}
    if len(found) > updated:
        await _run(connection, delete, parameters)
    return {by_text[text] for text in texts if text not in found}


async def _execute(connection: AsyncConnection, statement: str, parameters: Any) -> sa.CursorResult[Any]:
    # Without parameters the driver is not to look for its own signs in a text that may be a megabyte.
    options = {"no_parameters": True} if parameters is None else {}
    return await connection.exec_driver_sql(statement, parameters, execution_options=options)


async def _run(connection: AsyncConnection, statement: str, parameters: Any = None) -> int:
    """The number of rows that it found."""
    return (await _execute(connection, statement, parameters)).rowcount


async def _positions(connection: AsyncConnection, these: str, parameters: Any = None) -> list[int]:
    """The last positions of accounts, in their order: names are ordered by bytes in the tables, as they are here."""
    found = await _execute(connection, f"{_LAST} {these} order by host, local", parameters)
    return [row[0] for row in found]


def _by_host(accounts: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Localparts by host: databases look a list of names up by their key, but not a list of pairs."""
    return [(host, [local for _, local in pairs]) for host, pairs in groupby(accounts, itemgetter(0))]


# --- MySQL ---


# Most are of those who are talking now.
@lru_cache(maxsize=CACHED)
def _hex(text: str) -> str:
    return f"x'{text.encode().hex()}'"


@lru_cache(maxsize=CACHED)
def _peer(jid: str) -> str:
    return f"{_hex(jid)},{peer_hash(jid)}"


async def _insert_mysql(connection: AsyncConnection, accounts: _Accounts) -> None:
    keys = [(_hex(host), _hex(local)) for host, local in accounts]
    counts = (f"({host},{local},{len(own)})" for (host, local), own in zip(keys, accounts.values(), strict=True))
    raise_ = f"{_RAISE} values {','.join(counts)} on duplicate key update last = last + values(last)"
    if connection.dialect.insert_returning:
        # MariaDB tells them in the order of the values: a way to the server less, while the counters are locked.
        last = [row[0] for row in await _execute(connection, f"{raise_} returning last", None)]
    else:
        await _run(connection, raise_)
        these = " or ".join(f"host = {host} and local in ({','.join(locals_)})" for host, locals_ in _by_host(keys))
        last = await _positions(connection, these)
    rows: list[str] = []
    for (host, local), own, reached in zip(keys, accounts.values(), last, strict=True):
        for position, message in enumerate(own, reached - len(own) + 1):
            origin = f"{_hex(message.origin)},{message.number}" if message.origin else "null,null"
            rows.append(
                f"({host},{local},{position},'{id_text(message.id)}',{_peer(message.peer)},{origin},"
                f"{_hex(message.from_jid)},{message.received_unix_ms},x'{message.stanza.hex()}',"
                f"{message.pending:d},{message.archived:d},{_hex(message.holder)})"
            )
    # No `insert ignore`, which takes what does not fit and changes it. No position is ever there already, because of
    # the lock: what is there is an id.
    await _run(connection, f"{_INSERT} values {','.join(rows)} on duplicate key update id = id")


# --- SQLite ---


async def _insert_sqlite(connection: AsyncConnection, accounts: _Accounts) -> None:
    await _run(
        connection,
        f"{_RAISE} values (?, ?, ?) on conflict (host, local) do update set last = last + excluded.last",
        [(*account, len(own)) for account, own in accounts.items()],
    )
    hosts = _by_host(accounts)
    these = " or ".join(f"host = ? and local in ({','.join('?' * len(locals_))})" for _, locals_ in hosts)
    last = await _positions(connection, these, tuple(part for host, locals_ in hosts for part in (host, *locals_)))
    rows = [
        (
            *account, position, id_text(message.id), message.peer, peer_hash(message.peer), message.origin or None,
            message.number if message.origin else None, message.from_jid, message.received_unix_ms, message.stanza,
            message.pending, message.archived, message.holder,
        )
        for (account, own), reached in zip(accounts.items(), last, strict=True)
        for position, message in enumerate(own, reached - len(own) + 1)
    ]  # fmt: skip
    await _run(connection, f"{_INSERT} values ({','.join('?' * len(rows[0]))}) on conflict (id) do nothing", rows)
