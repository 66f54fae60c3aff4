"""What the router's stores must do: one suite over memory, SQLite, MariaDB, and routers that use different servers of
Galera at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.router.store import (
    AccountExists,
    AccountStore,
    DirectedChange,
    RosterItem,
    RosterStore,
    SessionRow,
    SessionTable,
)
from services.router.store_memory import (
    MemoryAccountStore,
    MemoryRosterStore,
    MemorySessionTable,
)
from services.router.store_sql import SqlAccountStore, SqlRosterStore
from services.router.store_sql_sessions import SqlSessionTable
from tests.contract.spread import Spread, databases
from tidings.kit.database_url import DatabaseUrl, parse
from tidings.kit.db import Database
from tidings.kit.migrations import migrate
from tidings.xmpp.jid import Jid
from tidings.xmpp.sasl import ScramKeys

KEYS = {"SHA-1": ScramKeys(b"salt", b"stored", b"server", 4096), "SHA-256": ScramKeys(b"s2", b"k2", b"v2", 4096)}
ROMEO = Jid.parse("romeo@example.org")
JULIET = Jid.parse("juliet@example.org")


@dataclass
class Stores:
    accounts: AccountStore
    rosters: RosterStore
    sessions: SessionTable


@pytest.fixture(params=["memory", "sqlite", "mysql", "galera"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stores]:
    if request.param == "memory":
        yield Stores(MemoryAccountStore(), MemoryRosterStore(), MemorySessionTable())
        return
    if request.param == "galera":
        async with databases(request.getfixturevalue("galera")) as opened:
            await asyncio.gather(*(migrate(one, "router", "services.router:migrations") for one in opened))
            accounts, rosters, table = (
                Spread([store(one) for one in opened]) for store in (SqlAccountStore, SqlRosterStore, SqlSessionTable)
            )
            yield Stores(accounts, rosters, table)
        return
    if request.param == "sqlite":
        url = DatabaseUrl("sqlite", path=tmp_path / "t.sqlite")
    else:
        url = parse(request.getfixturevalue("mariadb").create_database())
    database = Database(url)
    await database.start()
    await migrate(database, "router", "services.router:migrations")
    yield Stores(SqlAccountStore(database), SqlRosterStore(database), SqlSessionTable(database))
    await database.stop()


# --- accounts ---


async def test_an_account_is_made_once(stores: Stores) -> None:
    await stores.accounts.create("example.org", "romeo", KEYS)
    with pytest.raises(AccountExists):
        await stores.accounts.create("example.org", "romeo", KEYS)
    assert await stores.accounts.exists("example.org", "romeo")
    assert not await stores.accounts.exists("example.net", "romeo")


async def test_of_many_who_make_an_account_at_once_one_succeeds(stores: Stores) -> None:
    results = await asyncio.gather(
        *(stores.accounts.create("example.org", "romeo", KEYS) for _ in range(8)), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["AccountExists"] * 7 + ["NoneType"]


async def test_of_many_accounts_that_are_asked_for_at_once_each_has_its_own_answer(stores: Stores) -> None:
    """Where they are read together: across hosts, more than one statement takes, and the same one twice."""
    asked = [(f"example.{tld}", f"u{number % 70}") for number in range(140) for tld in ("org", "net")]
    there = {("example.org", f"u{number}") for number in range(0, 70, 2)}
    for host, local in sorted(there):
        await stores.accounts.create(host, local, KEYS)
        await stores.sessions.bind(Jid(local, host, "desk"), f"s-{local}", "r0")
    exist = await asyncio.gather(*(stores.accounts.exists(*one) for one in asked))
    assert exist == [one in there for one in asked]
    rows = await asyncio.gather(*(stores.sessions.of_account(Jid(local, host, "")) for host, local in asked))
    assert [[row.session for row in found] for found in rows] == [
        [f"s-{local}"] if (host, local) in there else [] for host, local in asked
    ]


async def test_keys_are_kept_by_hash_and_replaced_together(stores: Stores) -> None:
    await stores.accounts.create("example.org", "romeo", KEYS)
    assert await stores.accounts.keys("example.org", "romeo", "SHA-256") == KEYS["SHA-256"]
    assert await stores.accounts.keys("example.org", "romeo", "SHA-512") is None
    new = {"SHA-512": ScramKeys(b"s3", b"k3", b"v3", 9999)}
    await stores.accounts.set_keys("example.org", "romeo", new)
    assert await stores.accounts.keys("example.org", "romeo", "SHA-256") is None
    assert await stores.accounts.keys("example.org", "romeo", "SHA-512") == new["SHA-512"]


async def test_keys_of_nobody_are_not_made_by_setting_them(stores: Stores) -> None:
    await stores.accounts.set_keys("example.org", "nobody", KEYS)
    assert not await stores.accounts.exists("example.org", "nobody")
    assert await stores.accounts.keys("example.org", "nobody", "SHA-1") is None


async def test_names_are_compared_byte_by_byte(stores: Stores) -> None:
    """No collation of a database makes two users one."""
    for name in ("strasse", "stra\u00dfe", "e", "\u00e9", "a b"[0] + "\u0308", "\u00e4"):
        await stores.accounts.create("example.org", name, KEYS)
    assert len(await stores.accounts.page("example.org", "", 100)) == 6


async def test_the_longest_names_fit(stores: Stores) -> None:
    longest = "x" * 1023
    await stores.accounts.create("example.org", longest, KEYS)
    account = Jid(longest, "example.org", "")
    contact = f"{'y' * 1023}@{'z' * 1023}"
    await stores.rosters.put(account, RosterItem(contact, name="n" * 1023))
    assert (await stores.rosters.load(account)).items[contact].name == "n" * 1023


async def test_accounts_are_listed_by_pages_and_hosts(stores: Stores) -> None:
    for host in ("example.org", "example.net"):
        for number in range(5):
            await stores.accounts.create(host, f"u{number}", KEYS)
    first = await stores.accounts.page(None, "", 4)
    second = await stores.accounts.page(None, first[-1].jid, 100)
    jids = [row.jid for row in first + second]
    assert jids == sorted(jids)
    assert len(jids) == 10
    assert [row.jid for row in await stores.accounts.page("example.net", "", 2)] == [
        "u0@example.net",
        "u1@example.net",
    ]


async def test_a_deleted_account_is_gone_with_its_keys(stores: Stores) -> None:
    await stores.accounts.create("example.org", "romeo", KEYS)
    await stores.accounts.delete("example.org", "romeo")
    assert not await stores.accounts.exists("example.org", "romeo")
    await stores.accounts.create("example.org", "romeo", {"SHA-1": KEYS["SHA-1"]})
    assert await stores.accounts.keys("example.org", "romeo", "SHA-256") is None


async def test_everybody_gets_the_same_key_for_made_up_salts(stores: Stores) -> None:
    keys = await asyncio.gather(*(stores.accounts.shared_key("fake-salt-key") for _ in range(5)))
    assert len(set(keys)) == 1
    assert len(keys[0]) == 32


# --- rosters ---


async def test_an_empty_roster_is_empty(stores: Stores) -> None:
    roster = await stores.rosters.load(ROMEO)
    assert (roster.version, roster.items) == (0, {})


async def test_an_item_is_kept_with_all_that_it_says(stores: Stores) -> None:
    item = RosterItem("juliet@example.org", "Jülïet ♥", ("A", "B'\""), "both", True, b"<presence/>", True)
    assert await stores.rosters.put(ROMEO, item) == 1
    assert (await stores.rosters.load(ROMEO)).items == {"juliet@example.org": item}
    assert (await stores.rosters.load(JULIET)).items == {}


async def test_each_change_raises_the_version_and_can_be_asked_for(stores: Stores) -> None:
    await stores.rosters.put(ROMEO, RosterItem("a@example.org"))
    await stores.rosters.put(ROMEO, RosterItem("b@example.org"))
    await stores.rosters.put(ROMEO, RosterItem("a@example.org", name="A"))
    assert await stores.rosters.remove(ROMEO, "b@example.org") == 4
    assert await stores.rosters.changes(ROMEO, 1) == [(3, "a@example.org"), (4, "b@example.org")]
    assert await stores.rosters.changes(ROMEO, 4) == []
    assert await stores.rosters.changes(ROMEO, 5) is None, "a version that has never been"
    assert list((await stores.rosters.load(ROMEO)).items) == ["a@example.org"]


async def test_changes_at_once_do_not_undo_each_other(stores: Stores) -> None:
    versions = await asyncio.gather(*(stores.rosters.put(ROMEO, RosterItem(f"c{n}@example.org")) for n in range(12)))
    assert sorted(versions) == list(range(1, 13))
    assert len((await stores.rosters.load(ROMEO)).items) == 12


async def test_a_roster_is_deleted_whole(stores: Stores) -> None:
    await stores.rosters.put(ROMEO, RosterItem("a@example.org"))
    await stores.rosters.delete_all(ROMEO)
    assert (await stores.rosters.load(ROMEO)).items == {}


# --- sessions ---

DESK = Jid.parse("romeo@example.org/desk")


async def test_of_many_who_bind_one_full_jid_exactly_one_gets_it(stores: Stores) -> None:
    answers = await asyncio.gather(*(stores.sessions.bind(DESK, f"s{n}", f"r{n % 3}") for n in range(12)))
    (winner,) = (n for n, answer in enumerate(answers) if answer is None)
    assert {answer.session for answer in answers if answer is not None} == {f"s{winner}"}
    assert await stores.sessions.of_account(ROMEO) == [SessionRow(DESK, f"s{winner}", 1, f"r{winner % 3}")]


async def test_of_many_who_take_a_session_over_exactly_one_does(stores: Stores) -> None:
    await stores.sessions.bind(DESK, "s", "r0")
    row = SessionRow(DESK, "s", 1, "r0")
    moved = await asyncio.gather(*(stores.sessions.move(row, f"r{n}") for n in range(1, 9)))
    assert moved.count(True) == 1
    (now,) = await stores.sessions.of_account(ROMEO)
    assert (now.session, now.epoch, now.router) == ("s", 2, f"r{moved.index(True) + 1}")
    assert not await stores.sessions.move(row, "r9"), "who acts under an older epoch is refused"
    assert await stores.sessions.end(DESK, "s", 1) is None
    assert not await stores.sessions.replace(row, "other", "r9")


async def test_what_is_repeated_because_its_outcome_was_unknown_is_found_done(stores: Stores) -> None:
    for _ in range(2):
        assert await stores.sessions.bind(DESK, "s", "r0") is None
    (row,) = await stores.sessions.of_account(ROMEO)
    for _ in range(2):
        assert await stores.sessions.move(row, "r1")
    assert await stores.sessions.of_account(ROMEO) == [SessionRow(DESK, "s", 2, "r1")]
    (row,) = await stores.sessions.of_account(ROMEO)
    for _ in range(2):
        assert await stores.sessions.replace(row, "t", "r1")
    assert await stores.sessions.of_account(ROMEO) == [SessionRow(DESK, "t", 3, "r1")]


async def test_who_keeps_a_session_under_the_next_epoch_can_not_lose_it_by_the_old_one(stores: Stores) -> None:
    await stores.sessions.bind(DESK, "s", "r0")
    row = SessionRow(DESK, "s", 1, "r0")
    kept, taken = await asyncio.gather(stores.sessions.move(row, "r0"), stores.sessions.move(row, "r1"))
    assert kept is not taken
    assert not await stores.sessions.move(row, "r2")
    assert await stores.sessions.of_account(ROMEO) == [SessionRow(DESK, "s", 2, "r0" if kept else "r1")]


async def test_what_is_noted_under_an_older_epoch_is_not_written(stores: Stores) -> None:
    await stores.sessions.bind(DESK, "s", "r0")
    await stores.sessions.move(SessionRow(DESK, "s", 1, "r0"), "r1")
    await stores.sessions.set_available([(DESK, "s", 1, False)])
    assert [row.available for row in await stores.sessions.of_account(ROMEO)] == [True]
    await stores.sessions.set_available([(DESK, "s", 2, False)])
    assert [row.available for row in await stores.sessions.of_account(ROMEO)] == [False]


async def test_a_session_ends_once_and_its_row_says_whether_it_was_seen(stores: Stores) -> None:
    await stores.sessions.bind(DESK, "s", "r0")
    await stores.sessions.set_available([(DESK, "s", 1, False), (DESK, "another", 1, True)])
    ends = await asyncio.gather(*(stores.sessions.end(DESK, "s", 1) for _ in range(6)))
    assert [end for end in ends if end is not None] == [SessionRow(DESK, "s", 1, "r0", False)]
    assert await stores.sessions.of_account(ROMEO) == []


async def test_a_replaced_session_is_another_one_under_the_next_epoch(stores: Stores) -> None:
    await stores.sessions.bind(DESK, "s", "r0")
    await stores.sessions.set_available([(DESK, "s", 1, False)])
    (row,) = await stores.sessions.of_account(ROMEO)
    assert await stores.sessions.replace(row, "t", "r1")
    assert await stores.sessions.of_account(ROMEO) == [SessionRow(DESK, "t", 2, "r1", True)]
    assert await stores.sessions.end(DESK, "s", 1) is None


async def test_sessions_are_found_by_account_and_by_router(stores: Stores) -> None:
    phone = Jid.parse("romeo@example.org/phone")
    other = Jid.parse("juliet@example.net/♥")
    for number, (jid, router) in enumerate(((DESK, "r0"), (phone, "r1"), (other, "r1"))):
        assert await stores.sessions.bind(jid, f"s{number}", router) is None
    assert {row.jid for row in await stores.sessions.of_account(ROMEO)} == {DESK, phone}
    assert {row.jid for row in await stores.sessions.of_router("r1")} == {phone, other}
    assert await stores.sessions.ids_of_router("r1") == {"s1", "s2"}
    assert await stores.sessions.routers() == {"r0": 1, "r1": 2}


# --- directed presence ---

ROOM, NURSE = "room@muc.example.net/romeo", "nurse@example.org/♥"


async def test_the_end_of_a_session_tells_whom_it_sent_presence_directly(stores: Stores) -> None:
    await stores.sessions.bind(DESK, "s", "r0")
    phone = Jid.parse("romeo@example.org/phone")
    await stores.sessions.bind(phone, "t", "r0")
    await stores.sessions.set_directed(
        [DirectedChange(DESK, "s", 1, (ROOM, NURSE)), DirectedChange(phone, "t", 1, (ROOM,))]
    )
    for _ in range(2):  # repeated, as when nobody could tell what had become of it
        await stores.sessions.set_directed([DirectedChange(DESK, "s", 1, ("x@example.org", NURSE), (ROOM,))])
    assert await stores.sessions.end(DESK, "s", 1) == SessionRow(DESK, "s", 1, "r0", True, (NURSE, "x@example.org"))
    assert await stores.sessions.end(phone, "t", 1) == SessionRow(phone, "t", 1, "r0", True, (ROOM,))
    await stores.sessions.bind(DESK, "s", "r0")
    assert await stores.sessions.end(DESK, "s", 1) == SessionRow(DESK, "s", 1, "r0"), "nothing of it was left"


async def test_directed_presence_goes_along_and_is_noted_under_the_present_epoch_only(stores: Stores) -> None:
    await stores.sessions.bind(DESK, "s", "r0")
    await stores.sessions.set_directed([DirectedChange(DESK, "s", 1, (ROOM, NURSE))])
    assert await stores.sessions.move(SessionRow(DESK, "s", 1, "r0"), "r1")
    await stores.sessions.set_directed(
        [DirectedChange(DESK, "s", 1, ("old@example.org",)), DirectedChange(DESK, "other", 2, ("x@example.org",))]
    )
    row = await stores.sessions.bind(DESK, "t", "r2")
    assert row == SessionRow(DESK, "s", 2, "r1", True, (NURSE, ROOM)), "who is in the way is told whole"
    await stores.sessions.set_directed([DirectedChange(DESK, "s", 2, (ROOM,), None)])
    assert await stores.sessions.end(DESK, "s", 2) == SessionRow(DESK, "s", 2, "r1", True, (ROOM,))


async def test_a_session_in_the_place_of_another_one_has_sent_no_presence_directly(stores: Stores) -> None:
    await stores.sessions.bind(DESK, "s", "r0")
    await stores.sessions.set_directed([DirectedChange(DESK, "s", 1, (ROOM,))])
    row = await stores.sessions.bind(DESK, "t", "r1")
    assert row is not None
    for _ in range(2):
        assert await stores.sessions.replace(row, "t", "r1")
    await stores.sessions.set_directed([DirectedChange(DESK, "s", 1, (ROOM,))])
    assert await stores.sessions.end(DESK, "t", 2) == SessionRow(DESK, "t", 2, "r1")


async def test_what_a_router_notes_while_it_ends_a_session_is_told_or_not_written(stores: Stores) -> None:
    table: SessionTable = stores.sessions.end.__self__  # type: ignore[attr-defined] # one router's
    for _ in range(8):
        await table.bind(DESK, "s", "r0")
        noted = table.set_directed([DirectedChange(DESK, "s", 1, (ROOM,))])
        row, _ = await asyncio.gather(table.end(DESK, "s", 1), noted)
        assert row is not None
        await table.bind(DESK, "s", "r0")
        assert await table.end(DESK, "s", 1) == SessionRow(DESK, "s", 1, "r0"), "nothing of it was left"
