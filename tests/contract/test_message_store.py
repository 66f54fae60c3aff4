"""What the store of messages must do: one suite over memory, SQLite and MariaDB."""

from __future__ import annotations

import asyncio

import pytest

from services.router.message_queue import MESSAGE_BYTES, Superseded
from services.router.messages import CLAIMED, ArchiveQuery, Preferences, UnknownId
from services.router.retention import DAY_MS, PORTION, Retention
from tests.contract.message_stores import (
    JULIET,
    NURSE,
    ROMEO,
    Stores,
    Told,
    archive,
    message,
    numbers,
    settled,
)
from tidings.kit.db import DatabaseAway
from tidings.xmpp.jid import Jid

HOUR = 3_600_000


# --- writing ---


async def test_who_claims_is_told_whether_others_were_given_it_when_it_came(stores: Stores) -> None:
    await bind(stores, "desk")
    await stores.store.keep(message(ROMEO, 1, holder="desk"))
    await stores.store.keep(message(ROMEO, 2))
    assert [kept.given for kept in await stores.store.pending(ROMEO, "desk", 10)] == [True, False]
    await stores.sessions.end(ROMEO.with_resource("desk"), "desk", 1)
    for _ in range(2):
        assert [kept.given for kept in await stores.store.pending(ROMEO, "phone", 10)] == [True, False]


async def test_what_is_acknowledged_is_not_offered_again_before_that_is_written(stores: Stores) -> None:
    for number in range(5):
        await stores.store.keep(message(ROMEO, number))
    kept = await stores.store.pending(ROMEO, "s", 2)
    stores.store.delivered(ROMEO, [one.id for one in kept])
    assert numbers(await stores.store.pending(ROMEO, "s", 2)) == [2, 3]


async def test_who_writes_is_told_when_it_is_kept_and_in_order(stores: Stores) -> None:
    told = Told()
    written = [message(account, n) for n in range(700) for account in (ROMEO, JULIET)]
    told.write(stores.store, *written)
    assert told.order == [], "nobody is told within his own call"
    await told.of(len(written))
    assert told.order == [one.id for one in written]
    assert told.errors == {}
    assert await archive(stores) == list(range(700))


async def test_all_that_is_written_is_read_back_and_odd_bytes_too(stores: Stores) -> None:
    stanza = "<message><body>é♥😀 %s \\' ? :x</body></message>".encode() + b"\0x" * 150_000
    peer = "ä@example.org/♥ ' \\"
    full = message(ROMEO, 2**40, peer=peer, at=2**41, from_jid="romeo@example.org/'")._replace(stanza=stanza)
    bare = message(ROMEO, 1, origin="", at=5)
    for one in (full, bare):
        await stores.store.keep(one)
    page = (await stores.store.page(ROMEO, ArchiveQuery())).messages
    assert [kept[1:8] for kept in page] == [
        (full.id, peer, "session", 2**40, full.from_jid, 2**41, stanza),
        (bare.id, bare.peer, "", 0, bare.from_jid, 5, bare.stanza),
    ]
    assert page == await stores.store.pending(ROMEO, "s", 10)


async def test_a_message_that_is_written_again_is_kept_once_and_as_it_was(stores: Stores) -> None:
    """XEP-0313 6.1.1: once, irrespective of how often it comes."""
    told = Told()
    told.write(stores.store, message(ROMEO, 1), message(ROMEO, 1), message(JULIET, 1))
    told.write(stores.other, message(ROMEO, 1))
    await told.of(4)
    await stores.store.keep(message(ROMEO, 1))
    stores.store.delivered(ROMEO, [message(ROMEO, 1).id])
    await settled(stores.store)
    await stores.other.keep(message(ROMEO, 1))
    assert await archive(stores) == [1]
    assert await archive(stores, JULIET) == [1]
    assert await stores.store.pending_count(ROMEO) == 0


async def test_messages_without_origin_are_never_taken_for_each_other(stores: Stores) -> None:
    for _ in range(2):
        await stores.store.keep(message(ROMEO, 1, origin=""))
    assert await stores.store.pending_count(ROMEO) == 2


async def test_names_of_accounts_are_compared_byte_by_byte(stores: Stores) -> None:
    accounts = [
        Jid(local, "example.org", "") for local in ("strasse", "stra\u00dfe", "e", "\u00e9", "a\u0308", "\u00e4")
    ]
    told = Told()
    told.write(stores.store, *(message(account, n) for n, account in enumerate(accounts)))
    await told.of(len(accounts))
    assert [await archive(stores, account) for account in accounts] == [[n] for n in range(len(accounts))]


async def test_what_waits_is_counted_until_it_is_kept(stores: Stores) -> None:
    assert (stores.store.waiting_bytes, stores.store.oldest_waiting) == (0, 0.0)
    told = Told()
    one = message(ROMEO, 1)
    told.write(stores.store, one)
    since = stores.store.oldest_waiting
    assert since > 0
    told.write(stores.store, message(ROMEO, 2))
    assert stores.store.oldest_waiting == since
    assert stores.store.waiting_bytes == 2 * (len(one.stanza) + MESSAGE_BYTES)
    await told.of(2)
    assert (stores.store.waiting_bytes, stores.store.oldest_waiting) == (0, 0.0)
    stores.store.delivered(ROMEO, [one.id, one.id])
    assert stores.store.waiting_bytes == 50
    await settled(stores.store)


async def test_it_says_for_which_accounts_messages_that_wait_for_them_are_being_written(stores: Stores) -> None:
    told = Told()
    told.write(stores.store, message(ROMEO, 1), message(JULIET, 2)._replace(pending=False))
    assert [stores.store.is_writing_for(account) for account in (ROMEO, JULIET)] == [True, False]
    await told.of(2)
    assert not stores.store.is_writing_for(ROMEO)


# --- marks of delivery ---


async def test_what_is_delivered_before_another_router_has_written_it_waits_no_longer_either(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session was handed over meanwhile, and its client has confirmed it there."""
    monkeypatch.setattr("services.router.message_writer.EARLY", 0.05)
    late = [message(ROMEO, n, archived=n > 0) for n in range(3)]
    stores.other.delivered(ROMEO, [one.id for one in late])
    await settled(stores.other)
    for one in late:
        await stores.store.keep(one)
    async with asyncio.timeout(5.0):
        while await stores.store.pending_count(ROMEO):
            await asyncio.sleep(0.01)
    assert await archive(stores) == [1, 2]


async def test_what_is_delivered_waits_no_longer_and_what_is_not_archived_is_gone(stores: Stores) -> None:
    for n in range(4):
        await stores.store.keep(message(ROMEO, n, archived=n % 2 == 0))
    stores.store.delivered(ROMEO, [message(ROMEO, n).id for n in (0, 1, 99)])
    await settled(stores.store)
    assert numbers(await stores.store.pending(ROMEO, "s", 10)) == [2, 3]
    assert await archive(stores) == [0, 2]
    with pytest.raises(UnknownId):
        await stores.store.page(ROMEO, ArchiveQuery(after=message(ROMEO, 1).id))


async def test_any_router_may_take_the_mark_off(stores: Stores) -> None:
    await stores.store.keep(message(ROMEO, 1, archived=False))
    stores.other.delivered(ROMEO, [message(ROMEO, 1).id])
    await settled(stores.other)
    assert await stores.store.pending_count(ROMEO) == 0


async def test_a_message_that_is_acknowledged_while_it_waits_is_written_as_such_or_not_at_all(stores: Stores) -> None:
    stores.set_away(True)
    told = Told()
    told.write(stores.store, *(message(ROMEO, n, archived=n != 2) for n in (1, 2, 3)))
    stores.store.delivered(ROMEO, [message(ROMEO, n).id for n in (1, 2)])
    assert told.order == [message(ROMEO, 2).id], "at once"
    stores.set_away(False)
    assert sorted(await told.of(3)) == sorted(message(ROMEO, n).id for n in (1, 2, 3))
    assert await archive(stores) == [1, 3]
    assert numbers(await stores.store.pending(ROMEO, "s", 10)) == [3]


async def test_a_mark_is_not_lost_on_a_message_that_is_written_again_at_that_moment(stores: Stores) -> None:
    for n, archived in enumerate((True, False)):
        await stores.other.keep(message(ROMEO, n, archived=archived))
        stores.store.write(message(ROMEO, n, archived=archived), lambda _error: None)
        stores.store.delivered(ROMEO, [message(ROMEO, n).id])
    await settled(stores.store)
    assert await stores.store.pending_count(ROMEO) == 0


async def test_a_mark_that_comes_right_after_its_message_is_never_lost(stores: Stores) -> None:
    told = Told()
    for n in range(300):
        told.write(stores.store, message(ROMEO, n, archived=n % 3 == 0))
        if n % 2:
            await asyncio.sleep(0)
        stores.store.delivered(ROMEO, [message(ROMEO, n).id])
    await told.of(300)
    await settled(stores.store)
    assert await stores.store.pending_count(ROMEO) == 0
    assert sorted(await archive(stores)) == list(range(0, 300, 3))


async def test_what_was_acknowledged_before_it_was_written_here_waits_for_nobody(stores: Stores) -> None:
    """A router had given it to a session, and died before it was stored; the session has confirmed it at another one,
    and then it is sent there again."""
    stores.store.delivered(ROMEO, [message(ROMEO, n).id for n in (1, 2)])
    await settled(stores.store)
    told = Told()
    told.write(stores.store, *(message(ROMEO, n, archived=n != 2) for n in (1, 2, 3)))
    await told.of(3)
    assert await archive(stores) == [1, 3]
    assert numbers(await stores.store.pending(ROMEO, "s", 10)) == [3]


# --- while the database is away ---


async def test_while_the_database_is_away_messages_wait_in_order_and_without_an_error(stores: Stores) -> None:
    await stores.store.keep(message(ROMEO, 0, archived=False))
    stores.set_away(True)
    told = Told()
    told.write(stores.store, *(message(ROMEO, n) for n in range(1, 50)))
    stores.store.delivered(ROMEO, [message(ROMEO, 0).id])
    with pytest.raises(DatabaseAway):
        await stores.store.keep(message(ROMEO, 100))
    told.write(stores.store, *(message(ROMEO, n) for n in range(50, 60)))
    assert told.order == []
    assert stores.store.oldest_waiting > 0
    stores.set_away(False)
    await told.of(59)
    assert told.order == [message(ROMEO, n).id for n in range(1, 60)]
    await settled(stores.store)
    assert await archive(stores) == list(range(1, 60)), "who was told that it is not kept may send it again"
    assert await stores.store.pending_count(ROMEO) == 59


async def test_what_others_have_dealt_with_is_not_written_and_the_rest_is(stores: Stores) -> None:
    stores.set_away(True)
    told = Told()
    own, others = [
        [message(ROMEO, number, origin=origin) for number in (1, 2)] for origin in ("session", "another's")
    ]
    told.write(stores.store, own[0], others[0], own[1], others[1])
    stores.store.supersede(lambda origin: origin == "another's")
    assert told.order == [one.id for one in others]
    assert all(isinstance(error, Superseded) for error in told.errors.values())
    stores.set_away(False)
    await told.of(4)
    assert len(told.errors) == 2
    await settled(stores.store)
    assert sorted(kept.id for kept in await stores.other.pending(ROMEO, "s", 10)) == sorted(one.id for one in own)


async def test_who_keeps_a_message_that_others_have_dealt_with_is_cancelled(stores: Stores) -> None:
    keeping = asyncio.ensure_future(stores.store.keep(message(ROMEO, 1)))
    await asyncio.sleep(0)
    stores.store.supersede(lambda _origin: True)
    with pytest.raises(asyncio.CancelledError):
        await keeping


async def test_while_the_database_is_away_who_asks_is_told_so(stores: Stores) -> None:
    stores.set_away(True)
    with pytest.raises(DatabaseAway):
        await stores.store.pending(ROMEO, "s", 1)
    with pytest.raises(DatabaseAway):
        await stores.store.pending_count(ROMEO)
    with pytest.raises(DatabaseAway):
        await stores.store.page(ROMEO, ArchiveQuery())
    with pytest.raises(DatabaseAway):
        await stores.store.preferences(ROMEO)


# --- what is pending ---


async def bind(stores: Stores, name: str, account: Jid = ROMEO) -> None:
    assert await stores.sessions.bind(account.with_resource(name), name, "router") is None


async def test_of_two_sessions_that_come_at_once_each_message_goes_to_one(stores: Stores) -> None:
    for session in ("desk", "phone"):
        await bind(stores, session)
    told = Told()
    told.write(stores.store, *(message(ROMEO, n) for n in range(40)))
    await told.of(40)
    rounds = [
        await asyncio.gather(stores.store.pending(ROMEO, "desk", 10), stores.other.pending(ROMEO, "phone", 10))
        for _ in range(2)
    ]
    (desk, phone), again = rounds
    given = numbers(desk) + numbers(phone)
    assert len(given) == len(set(given)) == 20
    assert numbers(desk) == sorted(numbers(desk))
    assert [[kept.number for kept in more] for more in again] == [numbers(desk), numbers(phone)], "its own again"


async def test_messages_are_given_by_pages_and_in_order(stores: Stores) -> None:
    for n in range(5):
        await stores.store.keep(message(ROMEO, n))
    await stores.store.keep(message(JULIET, 9))
    first = await stores.store.pending(ROMEO, "s", 2)
    second = await stores.store.pending(ROMEO, "s", 10, after=first[-1].position)
    assert (numbers(first), numbers(second)) == ([0, 1], [2, 3, 4])
    positions = [kept.position for kept in first + second]
    assert positions == sorted(set(positions))
    assert await stores.store.pending(ROMEO, "s", 10, after=positions[-1]) == []
    assert await stores.store.pending(NURSE, "s", 10) == []


async def test_a_claim_is_void_when_its_session_has_gone(stores: Stores) -> None:
    await bind(stores, "desk")
    await bind(stores, "phone")
    await stores.store.keep(message(ROMEO, 1))
    assert numbers(await stores.store.pending(ROMEO, "desk", 10)) == [1]
    assert await stores.store.pending(ROMEO, "phone", 10) == []
    assert await stores.store.pending_count(ROMEO) == 1, "it waits all the same"
    await stores.sessions.end(ROMEO.with_resource("desk"), "desk", 1)
    assert numbers(await stores.store.pending(ROMEO, "phone", 10)) == [1]


async def test_what_a_session_was_given_as_it_was_written_is_held_by_it(stores: Stores) -> None:
    await bind(stores, "desk")
    # A session of that id, but of somebody else.
    await bind(stores, "tablet", JULIET)
    for n, holder in enumerate(("desk", "tablet", "")):
        await stores.store.keep(message(ROMEO, n, holder=holder))
    assert numbers(await stores.store.pending(ROMEO, "phone", 10)) == [1, 2]
    assert numbers(await stores.store.pending(ROMEO, "desk", 10)) == [0, 1, 2], "the phone is no living session"


async def test_a_session_may_ask_for_what_it_holds_alone(stores: Stores) -> None:
    """For one that does not want what is stored for its account (RFC 6121 8.5.3.1: a full JID is a full JID)."""
    await bind(stores, "desk")
    for n, holder in enumerate(("", "desk", CLAIMED + "desk", "phone", "desk")):
        await stores.store.keep(message(ROMEO, n, holder=holder))
    held = await stores.store.pending(ROMEO, "desk", 2, alone=True)
    assert numbers(held) == [1, 2]
    assert numbers(await stores.store.pending(ROMEO, "desk", 10, held[-1].position, alone=True)) == [4]
    assert numbers(await stores.store.pending(ROMEO, "tablet", 10)) == [0, 3], "the others it has not claimed"


async def test_messages_are_found_however_many_were_settled_before(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.messages_sql.SETTLE_STEP", 3)
    for n in range(30):
        await stores.store.keep(message(ROMEO, n, archived=n % 4 == 0))
        if n % 10 == 9:
            stores.store.delivered(ROMEO, [message(ROMEO, m).id for m in range(n - 9, n) if m % 7])
            await settled(stores.store)
        left = [m for m in range(n + 1) if m > n // 10 * 10 - 1 + 10 * (n % 10 == 9) or m % 7 == 0 or m % 10 == 9]
        assert numbers(await stores.store.pending(ROMEO, "s", 100)) == left
        assert numbers(await stores.other.pending(ROMEO, "s", 100, after=0)) == left
        assert await stores.store.pending_count(ROMEO) == len(left)
    stores.store.delivered(ROMEO, [message(ROMEO, m).id for m in range(30)])
    await settled(stores.store)
    assert await stores.store.pending(ROMEO, "s", 100) == []
    await stores.other.keep(message(ROMEO, 99))
    assert numbers(await stores.store.pending(ROMEO, "s", 100)) == [99]


# --- retention ---


async def test_what_is_old_leaves_the_archive_oldest_first_and_what_waits_waits_on(stores: Stores) -> None:
    """XEP-0313 3: no holes."""
    told = Told()
    other_host = Jid.parse("romeo@example.net")
    for account in (ROMEO, JULIET, other_host):
        told.write(stores.store, *(message(account, n, at=n * HOUR, pending=n == 2) for n in range(10)))
    await told.of(30)
    assert await stores.store.expire("example.org", 5 * HOUR, 3) == 3
    left = await archive(stores, ROMEO) + await archive(stores, JULIET)
    assert len(left) == 17
    assert await stores.store.expire("example.org", 5 * HOUR, 100) == 7
    for account in (ROMEO, JULIET):
        assert await archive(stores, account) == [5, 6, 7, 8, 9]
        assert numbers(await stores.store.pending(account, "s", 10)) == [2]
    assert await archive(stores, other_host) == list(range(10))
    assert await stores.store.expire("example.org", 5 * HOUR, 100) == 0
    stores.store.delivered(ROMEO, [message(ROMEO, 2).id])
    await settled(stores.store)
    with pytest.raises(UnknownId):
        await stores.store.page(ROMEO, ArchiveQuery(after=message(ROMEO, 2).id))


async def test_retention_sweeps_each_host_by_its_own_days(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.router.retention.PORTION_PAUSE", 0.0)
    told = Told()
    many = PORTION + 50
    for account in (ROMEO, NURSE):
        told.write(
            stores.store, *(message(account, n, at=n * DAY_MS // many, pending=False) for n in range(2 * many))
        )
    await told.of(4 * many)
    days = {"example.org": 1, "example.net": 0}
    retention = Retention(stores.store, list(days), days.__getitem__, lambda: 2 * DAY_MS)
    sweeping = asyncio.create_task(retention.run(), name="retention")
    async with asyncio.timeout(20):
        while await archive(stores, ROMEO) != list(range(many, 2 * many)):
            await asyncio.sleep(0.02)
    sweeping.cancel()
    assert len(await archive(stores, NURSE)) == 2 * many


async def test_who_claims_gets_what_a_session_holds_that_is_known_to_be_over(stores: Stores) -> None:
    """Its row goes a moment later."""
    await bind(stores, "desk")
    await stores.store.keep(message(ROMEO, 1, holder="desk"))
    assert await stores.store.pending(ROMEO, "phone", 10) == []
    assert numbers(await stores.store.pending(ROMEO, "phone", 10, over=["desk"])) == [1]
    assert numbers(await stores.store.pending(ROMEO, "phone", 10)) == [1], "it is the phone's now"


# --- preferences, and the end of an account ---


async def test_an_account_has_no_preferences_until_it_sets_some(stores: Stores) -> None:
    """XEP-0441 2.1."""
    assert await stores.store.preferences(ROMEO) is None
    some = Preferences("roster", ("juliet@example.org", "é@example.org/♥"), ())
    await stores.store.set_preferences(ROMEO, some)
    assert await stores.other.preferences(ROMEO) == some
    await stores.other.set_preferences(ROMEO, Preferences("never", (), ("nurse@example.org",)))
    assert await stores.store.preferences(ROMEO) == Preferences("never", (), ("nurse@example.org",))
    assert await stores.store.preferences(JULIET) is None


async def test_preferences_of_many_accounts_that_are_asked_for_at_once_are_each_their_own(stores: Stores) -> None:
    some = {ROMEO: Preferences("never", ("a@example.org",), ()), JULIET: Preferences("roster", (), ())}
    for account, preferences in some.items():
        await stores.store.set_preferences(account, preferences)
    asked = [ROMEO, Jid("nurse", "example.org", ""), JULIET, ROMEO, Jid(ROMEO.local, "example.net", "")]
    found = await asyncio.gather(*(stores.store.preferences(account) for account in asked))
    assert found == [some.get(account) for account in asked]


async def test_accounts_that_are_written_together_each_go_on_behind_their_own_last_message(stores: Stores) -> None:
    """Were one given the positions of another, its messages would meet those that are there, and be lost."""
    accounts = [Jid(f"{name}{n}", host, "") for host in ("b.example", "a.example") for n in range(9) for name in "xa"]
    told = Told()
    wanted: dict[Jid, list[int]] = {account: [] for account in accounts}
    for turn in range(3):
        written = []
        for place, account in enumerate(accounts):
            # No two have as many, and those who have more are others each time.
            some = range(100 * turn, 100 * turn + 1 + (place * (turn + 5)) % 19)
            wanted[account] += some
            written += [message(account, number) for number in some]
        told.write(stores.store, *written[::2], *written[1::2])
        await told.of(sum(map(len, wanted.values())))
    assert told.errors == {}
    for account in accounts:
        kept = await stores.store.pending(account, "s", 1000)
        assert sorted(one.number for one in kept) == wanted[account]
        positions = [one.position for one in kept]
        assert positions == sorted(set(positions))


async def test_nothing_is_left_of_a_removed_account_and_positions_go_on(stores: Stores) -> None:
    told = Told()
    for n in range(3):
        await stores.store.keep(message(ROMEO, n))
    await stores.store.keep(message(JULIET, 1))
    (*_, last) = await stores.store.pending(ROMEO, "s", 10)
    await stores.store.set_preferences(ROMEO, Preferences("always", (), ()))
    told.write(stores.store, message(ROMEO, 7), message(JULIET, 7))
    await stores.store.delete_all(ROMEO)
    await told.of(2)
    assert told.errors == {}
    assert await archive(stores) == []
    assert await stores.store.pending_count(ROMEO) == 0
    assert await stores.store.preferences(ROMEO) is None
    assert await archive(stores, JULIET) == [1, 7]
    await stores.store.keep(message(ROMEO, 8))
    (kept,) = await stores.store.pending(ROMEO, "s", 10)
    assert kept.position > last.position
    assert kept.id == message(ROMEO, 8).id
