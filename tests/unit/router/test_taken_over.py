"""Sessions that another router has taken over while it could not reach this one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import pytest

from services.router.sessions import Session
from services.router.store import SessionRow
from services.router.taken_over import STILL, TakenOver, taken
from tests.unit.router.memory_router import MemoryRouter, message, until
from tidings.kit.db import DatabaseAway
from tidings.xmpp.jid import Jid


class Bench:
    """A router, and what it has ended."""

    def __init__(self) -> None:
        self.router = MemoryRouter()
        self.cut = False
        self.dismissed: list[Session] = []
        table = self.router.stores.table
        self.taken_over = TakenOver(
            self.router.own, self.router.sessions, table, self.router.stores.messages, lambda: self.cut, self._dismiss,
            self.router.tasks.spawn,
        )  # fmt: skip

    async def _dismiss(self, session: Session) -> None:
        self.dismissed.append(session)
        self.router.sessions.remove(session)

    async def loses(self, session: Session) -> None:
        row = SessionRow(session.jid, session.id, session.epoch, self.router.own)
        assert await self.router.stores.table.move(row, "r2")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.router.stop()


async def test_a_session_whose_row_is_anothers_ends_and_no_other_one(bench: Bench) -> None:
    juliet, romeo = await bench.router.session("juliet"), await bench.router.session("romeo")
    await bench.loses(juliet)
    await bench.taken_over.look()
    assert bench.dismissed == [juliet]
    assert juliet.closed, "what is stored for it is told to whoever has it"
    assert not romeo.closed


async def test_one_that_is_just_being_given_is_left_to_that(bench: Bench) -> None:
    juliet = await bench.router.session("juliet")
    juliet.moving, juliet.frozen = True, deque()
    await bench.loses(juliet)
    await bench.taken_over.look()
    assert bench.dismissed == []
    # It was only about to be.
    juliet.frozen = None
    await bench.taken_over.look()
    assert bench.dismissed == [juliet]


async def test_one_that_comes_while_the_table_is_asked_is_not_missed_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    come: list[Session] = []

    async def older(router: str) -> set[str]:
        come.append(await bench.router.session("juliet"))
        return set()

    monkeypatch.setattr(bench.router.stores.table, "ids_of_router", older)
    await bench.taken_over.look()
    assert bench.dismissed == []
    assert bench.router.sessions.get(come[0].id) is come[0]


async def test_while_the_database_is_away_nobody_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    juliet = await bench.router.session("juliet")
    await bench.loses(juliet)

    async def away(router: str) -> set[str]:
        raise DatabaseAway("gone")

    monkeypatch.setattr(bench.router.stores.table, "ids_of_router", away)
    await bench.taken_over.look()
    assert bench.dismissed == []


async def test_it_is_looked_while_something_is_cut_off_and_once_behind_that(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.taken_over.LOOK", 0.001)
    looks: list[bool] = []

    async def look() -> bool:
        looks.append(bench.cut)
        bench.cut = len(looks) < 3
        return True

    passes: list[None] = []

    def is_cut() -> bool:
        passes.append(None)
        return bench.cut

    watching = bench.taken_over
    watching._is_cut = is_cut
    monkeypatch.setattr(watching, "look", look)
    bench.router.tasks.spawn(watching.run(), "watch")
    await until(lambda: len(passes) > 5)
    assert looks == []
    bench.cut = True
    await until(lambda: len(looks) == 4)
    seen = len(passes)
    await until(lambda: len(passes) > seen + 5)
    assert looks == [True, True, True, False]


# --- it stood still ---


async def test_what_comes_behind_a_standstill_waits_until_the_table_has_said_what_is_still_here(bench: Bench) -> None:
    juliet = await bench.router.session("juliet")
    await bench.loses(juliet)
    assert bench.taken_over.stood_still() is None
    bench.taken_over._beat -= STILL + 1.0
    looking, again = bench.taken_over.stood_still(), bench.taken_over.stood_still()
    assert looking is not None
    assert again is not None, "what comes next waits, too"
    await looking
    await again
    assert bench.dismissed == [juliet]
    assert bench.taken_over.stood_still() is None


async def test_a_database_that_is_away_holds_nothing_up_for_long(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.taken_over.ASK_TIMEOUT", 0.01)
    asked = asyncio.Event()

    async def silent(router: str) -> set[str]:
        await asked.wait()
        return set()

    monkeypatch.setattr(bench.router.stores.table, "ids_of_router", silent)
    await bench.router.session("juliet")
    bench.taken_over._beat -= STILL + 1.0
    looking = bench.taken_over.stood_still()
    assert looking is not None
    async with asyncio.timeout(5.0):
        await looking
    assert bench.dismissed == []
    asked.set()
    await until(lambda: len(bench.dismissed) == 1, timeout=5.0)


async def test_a_database_that_seems_to_be_away_behind_a_standstill_is_asked_until_it_answers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections have stood still too. Drills, LONG, seed 4: what the client had written to a router that hung for
    a minute, and had sent again to the next one, was dealt with when the first one woke."""
    juliet = await bench.router.session("juliet")
    await bench.loses(juliet)
    ids_of_router = bench.router.stores.table.ids_of_router
    answers = [False, False, True]

    async def at_first_silent(router: str) -> set[str]:
        if answers.pop(0):
            return await ids_of_router(router)
        raise DatabaseAway("it did not answer in time")

    monkeypatch.setattr(bench.router.stores.table, "ids_of_router", at_first_silent)
    bench.taken_over._beat -= 60.0
    looking = bench.taken_over.stood_still()
    assert looking is not None
    await looking
    assert bench.dismissed == [juliet]


async def test_what_is_committed_at_the_moment_of_waking_is_safe_when_that_is_known(bench: Bench) -> None:
    """The answer of the database may be the first thing that is dealt with: the session it was for may have gone."""
    router, offers = bench.router, bench.router.safety.offers
    offers.is_looking, offers.looked = bench.taken_over.notice, bench.taken_over.looked
    offered: list[Jid] = []

    async def offer(account: Jid) -> None:
        offered.append(account)

    offers.offer = offer
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    romeo.inbound.enable()
    await bench.loses(juliet)
    bench.taken_over._beat -= STILL + 1.0
    at: list[bool] = []
    router.safety.on_safe = lambda _session: at.append(bool(offered))
    await router.send(romeo, message("1", juliet.jid_text))
    await until(lambda: at)
    assert (at, offered) == ([True], [juliet.jid.bare])


# --- another router says so ---


async def test_who_has_taken_a_session_over_is_answered_when_all_is_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    juliet = await bench.router.session("juliet")
    waits = asyncio.Event()

    async def written(_store: object, _timeout: float) -> bool:
        await waits.wait()
        return True

    monkeypatch.setattr("services.router.taken_over.written", written)
    handler = bench.taken_over.noted(juliet.jid.bare, taken(juliet.epoch + 1, juliet.id))
    answering = asyncio.ensure_future(handler)
    await until(lambda: bench.dismissed == [juliet])
    assert not answering.done()
    waits.set()
    assert await answering == b""


async def test_a_note_of_an_epoch_that_is_over_ends_nothing(bench: Bench) -> None:
    """It has come back here since."""
    juliet = await bench.router.session("juliet")
    juliet.epoch = 5
    assert await bench.taken_over.noted(juliet.jid.bare, taken(5, juliet.id)) == b""
    assert bench.dismissed == []


# --- before a session whose connector is out of reach gets something ---


async def test_nothing_is_taken_for_a_session_that_another_router_may_have_before_the_table_has_said_whose_it_is(
    bench: Bench,
) -> None:
    router = bench.router
    router.routing.check = bench.taken_over.check
    router.routing.cut = {router.link}  # type: ignore[assignment]
    romeo, juliet, nurse = [await router.session(name) for name in ("romeo", "juliet", "nurse")]
    await bench.loses(juliet)
    await router.stores.accounts.create(juliet.jid.domain, "juliet", {})
    await router.send(romeo, message("1", nurse.jid_text))
    await router.send(romeo, message("2", juliet.jid_text))
    await until(lambda: router.link.bodies(nurse) == ["1"] and bench.dismissed == [juliet])
    assert router.link.bodies(juliet) == []
    router.routing.cut = ()
    asked = router.stores.table.asked
    await router.send(romeo, message("3", nurse.jid_text))
    assert router.link.bodies(nurse) == ["1", "3"]
    assert router.stores.table.asked == asked, "a connector in reach says what becomes of its sessions"
