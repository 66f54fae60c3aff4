"""What the store of messages promises of its database: failures, two routers, costs, and the layout before."""

from __future__ import annotations

import asyncio
import importlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router import messages_sql
from services.router import messages_statements as statements
from services.router.messages import ArchiveQuery, id_bytes, marked
from services.router.messages_memory import MemoryMessageStore
from services.router.messages_sql import GROUP, MAX_STANZA_BYTES, SqlMessageStore
from services.router.store_memory import MemorySessionTable
from services.router.store_sql_sessions import SqlSessionTable
from tests.contract.message_stores import (
    JULIET,
    ROMEO,
    Faulty,
    Stores,
    Told,
    archive,
    message,
    numbers,
    rows,
    settled,
)
from tidings.kit.database_url import DatabaseUrl, parse
from tidings.kit.db import DatabaseAway
from tidings.kit.migrations import migrate
from tidings.testing.mariadb import MariaDB
from tidings.xmpp.jid import Jid


@pytest.fixture
async def stores(database_url: DatabaseUrl) -> AsyncIterator[Stores]:
    databases = [Faulty(database_url), Faulty(database_url)]
    for database in databases:
        await database.start()
        await migrate(database, "router", "services.router:migrations")
    one, other = (SqlMessageStore(database) for database in databases)
    await one.start()
    await other.start()
    yield Stores(one, other, SqlSessionTable(databases[0]))
    for database in databases:
        database.away, database.answers, database.gate = False, True, None
    await one.stop()
    await other.stop()
    for database in databases:
        await database.stop()


# --- failures ---


async def test_a_commit_whose_answer_is_lost_is_repeated_without_harm(stores: Stores) -> None:
    database, _ = stores.databases()
    await stores.store.keep(message(ROMEO, 0))
    database.answers = False
    told = Told()
    told.write(stores.store, *(message(ROMEO, n) for n in range(1, 20)))
    stores.store.delivered(ROMEO, [message(ROMEO, 0).id])
    with pytest.raises(DatabaseAway):
        await stores.store.keep(message(ROMEO, 20))
    # Some are acknowledged while nobody knows whether they are there. They are.
    stores.store.delivered(ROMEO, [message(ROMEO, n).id for n in (3, 4)])
    database.answers = True
    assert await told.of(19) == [message(ROMEO, n).id for n in range(1, 20)]
    await settled(stores.store)
    assert await archive(stores) == list(range(21))
    assert numbers(await stores.store.pending(ROMEO, "s", 100)) == [n for n in range(1, 21) if n not in (3, 4)]


async def test_a_message_that_can_never_be_written_harms_itself_alone(stores: Stores) -> None:
    told = Told()
    # Half of a character: no text that a database takes.
    bad = message(ROMEO, 333, from_jid="x\udc00")
    told.write(stores.store, *(message(ROMEO, n) if n != 333 else bad for n in range(700)))
    with pytest.raises(UnicodeEncodeError):
        await stores.store.keep(message(JULIET, 1, from_jid="\udc00"))
    await told.of(700)
    assert list(told.errors) == [bad.id]
    assert await archive(stores) == [n for n in range(700) if n != 333]


async def test_what_the_database_refuses_is_told_to_who_wrote_it_and_not_to_the_log(
    mariadb: MariaDB, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    database = Faulty(parse(mariadb.create_database()))
    await database.start()
    await migrate(database, "router", "services.router:migrations")
    store = SqlMessageStore(database)
    await store.start()
    told = Told()
    told.write(store, message(ROMEO, 1), message(ROMEO, 2, from_jid="x" * 4000), message(ROMEO, 3))
    await told.of(3)
    assert list(told.errors) == [message(ROMEO, 2).id]
    assert await rows(database) == 2
    # Where it goes depends on whether a test before has set the logs up.
    logged = "".join(capfd.readouterr()) + caplog.text
    assert "message_refused" in logged
    for said in (logged, str(told.errors)):
        assert "<message" not in said
        assert b"<message".hex() not in said
    await store.stop()
    await database.stop()


async def test_a_message_that_no_packet_can_hold_is_refused_at_once_and_the_biggest_fits(stores: Stores) -> None:
    told = Told()
    told.write(stores.store, message(ROMEO, 1)._replace(stanza=bytes(MAX_STANZA_BYTES + 1)))
    assert list(told.errors) == [message(ROMEO, 1).id]
    told.write(stores.store, message(ROMEO, 2)._replace(stanza=bytes(MAX_STANZA_BYTES)), message(ROMEO, 3))
    await told.of(3)
    assert await archive(stores) == [2, 3]


async def test_a_store_that_stops_writes_what_waits(stores: Stores) -> None:
    told = Told()
    told.write(stores.store, *(message(ROMEO, n) for n in range(GROUP + 10)))
    stores.store.delivered(ROMEO, [message(ROMEO, 3).id])
    await stores.store.stop()  # type: ignore[attr-defined]
    assert len(told.order) == GROUP + 10
    assert told.errors == {}
    assert await stores.other.pending_count(ROMEO) == GROUP + 9
    told.write(stores.store, message(ROMEO, 9999))
    assert isinstance(told.errors[message(ROMEO, 9999).id], DatabaseAway)


async def test_a_store_that_stops_without_a_database_says_what_is_not_written(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages_sql, "STOP_TIMEOUT", 0.2)
    stores.set_away(True)
    told = Told()
    told.write(stores.store, message(ROMEO, 1), message(ROMEO, 2))
    await stores.store.stop()  # type: ignore[attr-defined]
    assert set(told.errors) == {message(ROMEO, 1).id, message(ROMEO, 2).id}
    assert all(isinstance(error, DatabaseAway) for error in told.errors.values())
    assert stores.store.waiting_bytes == 0


async def test_through_the_death_of_the_database_nothing_is_lost_and_nothing_kept_twice(mariadb: MariaDB) -> None:
    database = Faulty(parse(mariadb.create_database()))
    await database.start()
    await migrate(database, "router", "services.router:migrations")
    store = SqlMessageStore(database)
    await store.start()
    told = Told()
    for n in range(600):
        told.write(store, message(ROMEO, n, archived=False))
        if n == 300:
            await told.of(1)
            mariadb.kill()
        if n % 10 == 0:
            await asyncio.sleep(0.01)
    assert len(told.order) < 600
    stores = Stores(store, store, SqlSessionTable(database))
    # While it is away some are acknowledged; of those nobody knows whether they are there.
    store.delivered(ROMEO, [message(ROMEO, n).id for n in range(0, 600, 2)])
    mariadb.start()
    await told.of(600)
    assert told.errors == {}
    await settled(store)
    assert numbers(await stores.store.pending(ROMEO, "s", 1000)) == list(range(1, 600, 2))
    assert await rows(database) == 300
    await store.stop()
    await database.stop()


async def test_what_is_acknowledged_while_it_is_asked_for_is_not_offered_though_that_is_written_before_the_answer(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drills, seed 81: the answer had it, and was dealt with behind the commit of its mark."""
    database, _ = stores.databases()
    for number in range(2):
        await stores.store.keep(message(ROMEO, number))
    transaction = database.transaction

    async def late(work: Any, causal: bool = False) -> Any:
        monkeypatch.setattr(database, "transaction", transaction)
        answer = await transaction(work, causal=causal)
        stores.store.delivered(ROMEO, [message(ROMEO, 0).id])
        await marked(stores.store)
        return answer

    monkeypatch.setattr(database, "transaction", late)
    assert numbers(await stores.store.pending(ROMEO, "s", 10)) == [1]
    assert database.transaction == transaction
    assert numbers(await stores.store.pending(ROMEO, "s", 10)) == [1]


# --- two routers ---


async def test_nobody_reads_past_a_commit_that_is_delayed(stores: Stores) -> None:
    """A later position is never there before an earlier one: who pages after the last id that it has misses nothing."""
    slow, _ = stores.databases()
    await stores.store.keep(message(ROMEO, 0))
    slow.gate = asyncio.Event()
    told, later = Told(), Told()
    told.write(stores.store, message(ROMEO, 1))
    await asyncio.wait_for(slow.at_gate.wait(), 10)
    # It has its position, and is not committed.
    later.write(stores.other, message(ROMEO, 2))
    query = ArchiveQuery(after=message(ROMEO, 0).id)
    async with slow.read() as connection:
        for _ in range(20):
            found = await connection.execute(sa.text("select origin_number from messages order by position"))
            assert [number for (number,) in found] == [0]
            await asyncio.sleep(0.01)
    assert later.order == [], "it waits for its turn"
    slow.gate.set()
    await told.of(1)
    await later.of(1)
    assert await archive(stores, query=query) == [1, 2]


async def test_routers_that_write_for_the_same_accounts_do_not_stop_each_other(stores: Stores) -> None:
    accounts = [Jid.parse(f"user{n}@example.{'org' if n % 2 else 'net'}") for n in range(60)]
    shuffled = random.Random(7)
    told = [Told(), Told()]
    for _ in range(10):
        for one, store in zip(told, (stores.store, stores.other), strict=True):
            shuffled.shuffle(accounts)
            one.write(
                store, *(message(account, 1000 * len(one.order) + n, origin="") for n, account in enumerate(accounts))
            )
        await asyncio.sleep(0.01)
    for one in told:
        await one.of(600)
        assert one.errors == {}
    assert sum([len(await archive(stores, account)) for account in accounts]) == 1200


# --- what it costs ---


async def test_a_group_takes_as_many_statements_as_one_message(stores: Stores) -> None:
    database, _ = stores.databases()
    told = Told()
    accounts = [Jid.parse(f"user{n}@example.org") for n in range(200)]
    told.write(stores.store, *(message(accounts[n % 200], n) for n in range(500)))
    await told.of(500)
    database.statements.clear()
    told.write(stores.store, *(message(accounts[n % 200], n) for n in range(500, 1000)))
    stores.store.delivered(ROMEO, [message(accounts[n % 200], n).id for n in range(500)])
    await told.of(1000)
    await settled(stores.store)
    statements = [text for text in database.statements if not text.startswith("begin")]
    assert len(statements) <= 4 * messages_sql.WRITERS, [text[:60] for text in statements]


async def rows_read(database: Faulty, work: Callable[[], Awaitable[object]]) -> int:
    """How many rows or keys MariaDB reads for `work`."""

    async def so_far() -> int:
        async with database.read() as connection:
            found = await connection.execute(sa.text("show global status like 'Handler_read_%'"))
            return sum(int(value) for _, value in found)

    await so_far()
    before = await so_far()
    asked = await so_far() - before
    before = await so_far()
    await work()
    return await so_far() - before - asked


async def test_no_query_reads_through_the_archive(mariadb: MariaDB) -> None:
    database = Faulty(parse(mariadb.create_database()))
    await database.start()
    await migrate(database, "router", "services.router:migrations")
    store = SqlMessageStore(database)
    await store.start()
    told = Told()
    for account in (ROMEO, JULIET):
        told.write(
            store,
            *(
                message(account, n, peer=f"peer{n % 50}@example.org/x", pending=False, at=n * 60_000)
                for n in range(6000)
            ),
        )
    await told.of(12_000)
    async with database.write() as connection:
        await connection.execute(sa.text("analyze table messages, message_positions"))
    middle = message(ROMEO, 3000).id
    queries = [
        ArchiveQuery(limit=10),
        ArchiveQuery(limit=10, backwards=True),
        ArchiveQuery(limit=10, after=middle),
        ArchiveQuery(limit=10, before=middle, backwards=True),
        ArchiveQuery(limit=10, with_=Jid.parse("peer3@example.org")),
        ArchiveQuery(limit=10, with_=Jid.parse("peer3@example.org/x"), backwards=True),
        ArchiveQuery(limit=10, with_=Jid.parse("peer3@example.org"), after=middle),
        ArchiveQuery(limit=10, with_=Jid.parse("nobody@example.org")),
        ArchiveQuery(limit=10, start=5000 * 60_000),
        ArchiveQuery(limit=10, end=900 * 60_000, backwards=True),
        ArchiveQuery(limit=10, start=3000 * 60_000, end=3001 * 60_000),
        ArchiveQuery(limit=10, start=3000 * 60_000, with_=Jid.parse("nobody@example.org")),
    ]
    for query in queries:
        # A time is looked for in 32 places at once, and with an hour to spare, in which there are 60 messages here.
        assert await rows_read(database, partial(store.page, ROMEO, query)) < 1000, query
    assert await rows_read(database, partial(store.expire, "example.org", 0, 10)) < 100
    await store.pending(ROMEO, "s", 10)
    await store.keep(message(ROMEO, 7000))
    assert await rows_read(database, partial(store.pending, ROMEO, "s", 10)) < 100
    assert await rows_read(database, partial(store.pending_count, ROMEO)) < 100
    await store.stop()
    await database.stop()


@st.composite
def queries(draw: st.DrawFn) -> ArchiveQuery:
    known = st.none() | st.integers(0, 59).map(lambda n: message(ROMEO, n).id)
    time = st.none() | st.integers(-1, 31)
    return ArchiveQuery(
        with_=draw(st.sampled_from([None, "a@example.org", "a@example.org/2", "example.org"]).map(lambda t: t and Jid.parse(t))),
        start=draw(time), end=draw(time), after=draw(known), before=draw(known), backwards=draw(st.booleans()),
        limit=draw(st.integers(0, 70)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(queries(), min_size=1, max_size=10))
async def test_every_page_is_the_one_that_memory_gives(stores: Stores, asked: list[ArchiveQuery]) -> None:
    memory = MemoryMessageStore(MemorySessionTable())
    peers = ["a@example.org/1", "a@example.org/2", "a@example.org", "example.org", "b@example.org/a"]
    told = Told()
    for n in range(60):
        one = message(ROMEO, n, peer=peers[n % 5], at=1 + n // 2, archived=n % 11 != 5)
        told.write(memory, one)
        told.write(stores.store, one)
    await told.of(120)
    for query in asked:
        ours, theirs = await stores.store.page(ROMEO, query), await memory.page(ROMEO, query)
        assert (numbers(ours.messages), ours.complete) == (numbers(theirs.messages), theirs.complete), query


# --- the layout before ---

OLD_ID = "AAECAwQFBgcICQoLDA0ODw"


def run(connection: sa.Connection, *names: str) -> None:
    with Operations.context(MigrationContext.configure(connection)):
        for name in names:
            importlib.import_module(f"services.router.migrations.{name}").upgrade()


async def old_tables(connection: AsyncConnection) -> None:
    await connection.run_sync(run, "t0001_first", "t0002_sessions")
    for number in (1, 2):
        await connection.execute(old_row(number))
    await connection.execute(
        sa.text("insert into message_positions (host, local, last) values ('example.org', 'romeo', 2)")
    )


def old_row(number: int) -> sa.TextClause:
    """As the release before writes it."""
    return sa.text(
        "insert into messages (host, local, position, id, origin, origin_number, received_unix_ms, from_jid, stanza, "
        "pending, archived, origin_key) values "
        f"('example.org', 'romeo', {number}, '{OLD_ID[:-2]}{number}Q', 'o', {number}, 7, 'juliet@example.org/x', x'3c6d2f3e', "
        f"1, 0, '{number:032}')"
    )


async def test_messages_of_the_layout_before_wait_on(database_url: DatabaseUrl) -> None:
    database = Faulty(database_url)
    await database.start()
    async with database.write() as connection:
        await old_tables(connection)
        # It was cut off half-way, and runs again.
        await connection.run_sync(run, "t0003_archive")
        await connection.run_sync(run, "t0003_archive")
    await migrate(database, "router", "services.router:migrations")
    store = SqlMessageStore(database)
    await store.start()
    await store.keep(message(ROMEO, 3))
    async with database.write() as connection:
        # The release before is still there.
        await connection.execute(old_row(4))
    kept = await store.pending(ROMEO, "s", 10)
    assert [(one.number, one.position) for one in kept] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert kept[0][1:8] == (
        id_bytes(f"{OLD_ID[:-2]}1Q"),
        "juliet@example.org/x",
        "o",
        1,
        "juliet@example.org/x",
        7,
        b"<m/>",
    )
    store.delivered(ROMEO, [one.id for one in kept])
    await settled(store)
    assert await store.pending_count(ROMEO) == 0
    assert await rows(database) == 1
    await store.stop()
    await database.stop()


async def test_a_migration_that_was_cut_off_at_any_statement_is_finished(mariadb: MariaDB) -> None:
    """MySQL changes tables outside of transactions."""
    for cut in range(12):
        database = Faulty(parse(mariadb.create_database()))
        await database.start()
        done = 0

        def count(_c: object, _d: object, statement: str, *_: object, cut: int = cut) -> None:
            nonlocal done
            if statement.lstrip().lower().startswith(("alter", "create", "drop")):
                done += 1
                if done > cut:
                    raise ConnectionError("cut off")

        async with database.write() as connection:
            await old_tables(connection)
        assert database._engine is not None
        sa.event.listen(database._engine.sync_engine, "before_cursor_execute", count)
        finished = True
        try:
            async with database.write() as connection:
                await connection.run_sync(run, "t0003_archive")
        except DatabaseAway:
            finished = False
        sa.event.remove(database._engine.sync_engine, "before_cursor_execute", count)
        await migrate(database, "router", "services.router:migrations")
        store = SqlMessageStore(database)
        assert len(await store.pending(ROMEO, "s", 10)) == 2
        await database.stop()
        if finished:
            assert cut > 5, "there was something to be cut off"
            return
    raise AssertionError("it never ended")


@pytest.mark.parametrize("database_url", ["mysql"], indirect=True)
async def test_a_mark_is_not_lost_when_its_message_is_committed_between_its_two_statements(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another router: the first statement does not find it, and the second one does. (SQLite has one writer.)"""
    run, late = statements._run, [message(ROMEO, 1)]

    async def between(connection: Any, statement: str, parameters: Any = None) -> int:
        found = await run(connection, statement, parameters)
        if statement.startswith(statements._UPDATE) and late:
            await stores.other.keep(late.pop())
        return found

    monkeypatch.setattr(statements, "_run", between)
    stores.store.delivered(ROMEO, [message(ROMEO, 1).id])
    await settled(stores.store)
    assert not late
    assert list(stores.store.unmatched) == [message(ROMEO, 1).id], "it is tried again"
    stores.store.delivered(ROMEO, stores.store.unmatched)
    await settled(stores.store)
    assert await stores.store.pending_count(ROMEO) == 0


async def test_a_mark_whose_message_is_not_archived_is_written_once(stores: Stores) -> None:
    await stores.store.keep(message(ROMEO, 1, archived=False))
    stores.store.delivered(ROMEO, [message(ROMEO, 1).id])
    await settled(stores.store)
    assert not stores.store.unmatched
    assert await stores.store.pending_count(ROMEO) == 0
