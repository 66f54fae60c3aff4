"""The end of a session reaches everybody who saw it (RFC 6121 4.5.2), also when the database is away at that moment."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.router import endings
from services.router.modules import rfc6121_presence, rfc6121_roster
from services.router.sessions import Session
from services.router.store import Roster, RosterItem
from services.router.store_memory import MemoryRosterStore
from tests.unit.router.memory_router import HOST, MemoryRouter, Stores, presence, until
from tidings.kit.db import DatabaseAway
from tidings.xmpp.jid import Jid

ROMEO, JULIET = Jid.parse(f"romeo@{HOST}"), Jid.parse(f"juliet@{HOST}")


class RosterTable(MemoryRosterStore):
    """Counts what is read, and can be away."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.loads = 0

    async def load(self, account: Jid) -> Roster:
        if self.away:
            raise DatabaseAway("for this test")
        self.loads += 1
        return await super().load(account)


@pytest.fixture
async def table(monkeypatch: pytest.MonkeyPatch) -> RosterTable:
    monkeypatch.setattr(endings, "RETRY", 0.01)
    table = RosterTable()
    await table.put(ROMEO, RosterItem(str(JULIET), subscription="both"))
    await table.put(JULIET, RosterItem(str(ROMEO), subscription="both"))
    return table


@pytest.fixture
async def router(table: RosterTable) -> AsyncIterator[MemoryRouter]:
    stores = Stores()
    stores.rosters = table
    made = MemoryRouter(stores=stores, modules=(rfc6121_roster.MODULE, rfc6121_presence.MODULE))
    yield made
    await made.stop()


async def both(router: MemoryRouter) -> tuple[Session, Session]:
    """Two contacts who see each other."""
    romeo = await router.session("romeo", available=False)
    juliet = await router.session("juliet", available=False)
    for session in (romeo, juliet):
        await router.send(session, presence())
    router.link.written.clear()
    return romeo, juliet


def seen(router: MemoryRouter, session: Session) -> list[tuple[str, str]]:
    return [(envelope.from_jid, envelope.type) for envelope in router.link.of(session)]


async def test_the_end_reads_no_roster_again(router: MemoryRouter, table: RosterTable) -> None:
    romeo, juliet = await both(router)
    table.loads = 0
    await router.end(romeo)
    assert seen(router, juliet) == [(romeo.jid_text, "unavailable")]
    assert table.loads == 0
    await router.end(juliet)
    assert await router.rosters.of(JULIET, router.for_modules)
    assert table.loads == 1, "it is not kept for who is gone"


async def test_who_is_here_is_told_also_while_the_database_is_away(router: MemoryRouter, table: RosterTable) -> None:
    romeo, juliet = await both(router)
    table.away = True
    await router.end(romeo)
    assert seen(router, juliet) == [(romeo.jid_text, "unavailable")]
    assert router.routing.endings.owed == 0


async def test_what_could_not_be_told_is_told_once_when_the_database_is_back(
    router: MemoryRouter, table: RosterTable
) -> None:
    """Another router's session, for example, whose roster is not in memory here."""
    romeo, juliet = await both(router)
    router.rosters.forget(romeo.account)
    table.away = True
    await router.end(romeo)
    assert seen(router, juliet) == []
    assert router.routing.endings.owed == 1
    table.away = False
    await until(lambda: not router.routing.endings.owed)
    assert seen(router, juliet) == [(romeo.jid_text, "unavailable")]


async def test_a_session_that_has_come_in_its_place_is_not_told_gone(
    router: MemoryRouter, table: RosterTable
) -> None:
    romeo, juliet = await both(router)
    router.rosters.forget(romeo.account)
    table.away = True
    await router.end(romeo)
    again = await router.session("romeo")
    table.away = False
    await until(lambda: not router.routing.endings.owed)
    assert again.jid == romeo.jid
    assert seen(router, juliet) == []


# --- presence of a session at that moment ---


async def test_presence_that_waits_for_the_roster_is_not_broadcast_by_an_ended_session(
    router: MemoryRouter, table: RosterTable
) -> None:
    romeo = await router.session("romeo", available=False)
    juliet = await router.session("juliet")
    load = table.load

    async def ends_meanwhile(account: Jid) -> Roster:
        table.load = load  # type: ignore[method-assign]
        await router.end(romeo)
        return await load(account)

    table.load = ends_meanwhile  # type: ignore[method-assign]
    await router.send(romeo, presence())
    assert seen(router, juliet)[-1:] == [(romeo.jid_text, "unavailable")]


async def test_presence_that_meets_no_database_is_not_refused_and_told_when_that_is_back(
    router: MemoryRouter, table: RosterTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.modules.rfc6121_presence.RETRY", 0.01)
    romeo = await router.session("romeo", available=False)
    table.away = True
    await router.send(romeo, presence())
    assert router.link.of(romeo) == []
    assert romeo.presence is not None
    table.away = False
    await until(lambda: [envelope.type for envelope in router.link.of(romeo)] == [""])
