"""A message is acknowledged when it is safe, whichever router stores it, and whatever becomes of that one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from services.router.messages_memory import MemoryMessageStore
from services.router.modules import rfc6121_presence, rfc6121_roster, xep_0160_offline
from services.router.sessions import Session
from services.router.store import SessionRow
from tests.unit.router.memory_router import HOST, Link, MemoryRouter, Stores, message, together, until, view
from tests.unit.router.test_passing import Holder as HolderElsewhere
from tidings.cluster.node import NodeState
from tidings.cluster.strategies.home import Home
from tidings.cluster.strategies.online_users import OnlineUsers
from tidings.cluster.strategy import Factory
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.module import Stanza
from tidings.xmpp.jid import Jid

MODULES = (rfc6121_roster.MODULE, rfc6121_presence.MODULE, xep_0160_offline.MODULE)
JULIET = Jid.parse(f"juliet@{HOST}")
BOTH = view(1, a=NodeState.UP, b=NodeState.UP)


class Two:
    """Two routers: juliet has a session at one, romeo at the other."""

    def __init__(self, strategy: Factory) -> None:
        self.stores = Stores()
        self.routers: dict[str, MemoryRouter] = {}
        for name in ("a", "b"):
            MemoryRouter(name, self.routers, self.stores, strategy, MODULES)
        self.see(BOTH)

    def see(self, shown: ClusterView) -> None:
        for router in self.routers.values():
            router.see(shown)

    async def start(self) -> tuple[Session, Session]:
        await self.stores.accounts.create(JULIET.domain, JULIET.local, {})
        keeper = self.routers["a"].routing.strategy.keeper(str(JULIET)) or "b"
        self.there = self.routers[keeper]
        self.here = next(router for router in self.routers.values() if router is not self.there)
        juliet = await self.there.session("juliet")
        # Who knows of whom is told by notes, a tick later.
        await until(lambda: not self.there.links.sent or len(self.there.forwarder) == 0)
        romeo = await self.here.session("romeo")
        romeo.inbound.enable()
        return romeo, juliet

    @property
    def store(self) -> MemoryMessageStore:
        assert isinstance(self.stores.messages, MemoryMessageStore)
        return self.stores.messages


@pytest.fixture(params=[Home, OnlineUsers], ids=["home", "online-users"])
async def two(request: pytest.FixtureRequest) -> AsyncIterator[Two]:
    made = Two(request.param)
    yield made
    for router in made.routers.values():
        await router.stop()


async def test_a_message_that_another_router_stores_is_safe_when_that_one_says_so(two: Two) -> None:
    romeo, juliet = await two.start()
    two.store.away = True
    await two.here.send(romeo, message("1", str(JULIET)))
    await until(lambda: two.there.link.bodies(juliet) == ["1"])
    assert romeo.inbound.h == 0, "delivered, and not acknowledged"
    two.store.away = False
    await until(lambda: romeo.inbound.h == 1)
    assert await two.store.pending_count(JULIET) == 1


async def test_what_a_router_had_taken_and_not_stored_when_it_died_is_stored_by_another(two: Two) -> None:
    romeo, juliet = await two.start()
    two.store.away = True
    for id_ in ("1", "2"):
        await two.here.send(romeo, message(id_, str(JULIET)))
    await until(lambda: two.there.link.bodies(juliet) == ["1", "2"])
    # With the router dies what it was to write.
    two.store._queue = type(two.store._queue)()
    await two.stores.table.end(juliet.jid, juliet.id, juliet.epoch)
    two.store.away = False
    two.here.see(view(2, **{two.here.own: NodeState.UP}))
    two.here.links.dies(two.there.own)
    assert romeo.inbound.h == 0
    await until(lambda: romeo.inbound.h == 2)
    kept = await two.store.pending(JULIET, "next", 10)
    assert [one.number for one in kept] == [1, 2]


async def test_what_comes_behind_it_does_not_overtake_what_is_sent_another_way(two: Two) -> None:
    romeo, juliet = await two.start()
    two.store.away = True
    await two.here.send(romeo, message("1", str(JULIET)))
    await until(lambda: two.there.link.bodies(juliet) == ["1"])
    two.store._queue = type(two.store._queue)()
    await two.stores.table.end(juliet.jid, juliet.id, juliet.epoch)
    two.here.see(view(2, **{two.here.own: NodeState.UP}))
    phone = await two.here.session("juliet", "phone")
    two.here.links.dies(two.there.own)
    await two.here.send(romeo, message("2", str(JULIET)))
    await until(lambda: two.here.link.bodies(phone) == ["1", "2"])
    two.store.away = False
    await until(lambda: romeo.inbound.h == 2)


async def two_devices(stores: Stores, *routers: MemoryRouter) -> tuple[Session, Session, Session]:
    """Romeo at the first router, Juliet's desk at the second, her phone at the third; nothing is written from here on."""
    await stores.accounts.create(JULIET.domain, JULIET.local, {})
    at_first, at_second, at_third = routers[:3]
    romeo = await at_first.session("romeo")
    desk, phone = await at_second.session("juliet", "desk"), await at_third.session("juliet", "phone")
    await until(lambda: not any(len(router.forwarder) for router in routers))
    stores.messages.away = True  # type: ignore[attr-defined]
    return romeo, desk, phone


@pytest.mark.parametrize("hung", [False, True], ids=["it had it", "it hung"])
@pytest.mark.parametrize(
    ("taker", "away"), [("d", False), ("a", False), ("d", True)], ids=["", "here", "database away"]
)
async def test_what_comes_back_from_a_dead_router_reaches_who_has_taken_over_its_sessions_first(
    taker: str, away: bool, hung: bool
) -> None:
    """Also when another session of the account has it: what comes behind it would be there first."""
    stores = Stores()
    async with together("abcd", stores, OnlineUsers, MODULES) as (a, b, c, d):
        romeo, desk, phone = await two_devices(stores, a, b, c, d)
        if hung:
            a.links.hung["b"] = []
        await a.send(romeo, message("1", str(JULIET)))
        await until(lambda: c.link.bodies(phone) == ["1"] and (hung or b.link.bodies(desk) == ["1"]))
        for router in (a, c, d):
            router.see(view(2, **dict.fromkeys("acd", NodeState.UP)))
        if away:

            async def nobody(_account: Jid) -> list[SessionRow]:
                raise DatabaseAway("for this test")

            stores.table.of_account = nobody  # type: ignore[method-assign]
        a.links.dies("b")
        await a.send(romeo, message("2", str(JULIET)))
        if not away:
            assert c.link.bodies(phone) == ["1"], "it is asked who has the desk's session"
            (row,) = (row for row in await stores.table.of_account(JULIET) if row.router == "b")
            assert await stores.table.move(row, taker)
            there = {"a": a, "d": d}[taker]
            taken = there.takes_over(desk)
            await until(lambda: there.link.bodies(taken) == ["1", "2"])
        await until(lambda: c.link.bodies(phone) == ["1", "2"])


@pytest.mark.parametrize("hung", [False, True], ids=["it had it", "it hung"])
async def test_what_somebody_alive_has_is_not_stored_when_it_comes_back_and_those_sessions_end(hung: bool) -> None:
    """It would be offered to the account's next session, though one has had it and may have confirmed it."""
    stores = Stores()
    async with together("abc", stores, OnlineUsers, MODULES) as (a, b, c):
        romeo, desk, phone = await two_devices(stores, a, b, c)
        if hung:
            a.links.hung["b"] = []
        await a.send(romeo, message("1", str(JULIET)))
        await until(lambda: c.link.bodies(phone) == ["1"] and (hung or b.link.bodies(desk) == ["1"]))
        for router in (a, c):
            router.see(view(2, **dict.fromkeys("ac", NodeState.UP)))
        a.links.dies("b")
        for row in await stores.table.of_account(JULIET):
            await stores.table.end(row.jid, row.session, row.epoch)
        written: list[str] = []

        def kept(stanza: Stanza) -> bool:
            written.append(stanza.envelope.id)
            return True

        a.hooks.undelivered.insert(0, kept)
        await until(lambda: not len(a.forwarder))
        assert written == []


async def test_what_was_for_a_session_alone_comes_back_before_what_was_for_its_account() -> None:
    """Drills, seed 56: the strategy knew of another session's router only, which refused it; what came behind it was
    given to the new session meanwhile, and it was read back seconds later."""
    stores = Stores()
    async with together("abcd", stores, OnlineUsers, MODULES) as (a, b, c, d):
        romeo, desk, phone = await two_devices(stores, a, b, c, d)
        await a.send(romeo, message("1", desk.jid_text))
        await a.send(romeo, message("2", str(JULIET)))
        await until(lambda: b.link.bodies(desk) == ["1", "2"] and c.link.bodies(phone) == ["2"])
        for router in (a, c, d):
            router.see(view(2, **dict.fromkeys("acd", NodeState.UP)))
        (row,) = (row for row in await stores.table.of_account(JULIET) if row.router == "b")
        assert await stores.table.move(row, "d")
        taken = d.takes_over(desk)
        a.links.dies("b")
        await until(lambda: len(d.link.bodies(taken)) == 2)
        assert d.link.bodies(taken) == ["1", "2"]
        assert c.link.bodies(phone) == ["2"]


# --- where a copy at another process makes it safe ---


class Holder(Link):
    """The link of a connector that has copies: it has at once what is sent to it."""

    local = False

    def when_copied(self, then: Callable[[], None]) -> None:
        then()

    def progress(self, session: Session) -> None:
        """Its copy may be shortened."""


@pytest.mark.parametrize("withheld", [False, True])
async def test_what_is_withheld_from_a_client_is_not_in_its_copy_and_not_safe_with_that(withheld: bool) -> None:
    """A message behind an answer that says too much (see Deliveries) waits in this router's memory alone."""
    router = MemoryRouter(durability="memory")
    router.link = Holder()
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    romeo.inbound.enable()
    juliet.holder = router.link  # type: ignore[assignment]
    store = router.stores.messages
    assert isinstance(store, MemoryMessageStore)
    store.away = True
    if withheld:
        assert router.safety.accept(juliet, message("of her own", f"o@{HOST}"))
        await router.send(romeo, message("an answer", juliet.jid_text, "error"))
    handled = romeo.inbound.h
    await router.send(romeo, message("1", juliet.jid_text))
    assert router.link.bodies(juliet) == ([] if withheld else ["1"])
    assert romeo.inbound.h == handled + (not withheld)
    store.away = False
    await until(lambda: romeo.inbound.h == handled + 1)
    await router.stop()


# --- memory: what two have (and no third one an older copy) ---


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_with_an_older_copy_about_a_message_is_safe_when_it_is_written(when: str, forgotten: bool) -> None:
    """The link of a connector that has a copy of the session has ended: if this router was put out and does not know
    yet, that one brings its copy to the next router. What is stored nowhere is safe when that copy counts no more."""
    router = MemoryRouter(durability="memory")
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    romeo.inbound.enable()
    juliet.inbound.enable()
    holder: Any = HolderElsewhere()
    juliet.holder = holder
    store = router.stores.messages
    assert isinstance(store, MemoryMessageStore)
    store.away = True
    await router.send(romeo, message("0", juliet.jid_text))
    assert romeo.inbound.h == 0
    holder.answer()
    assert romeo.inbound.h == 1, "two have it, and the database need not"
    older: Any = object()
    if when == "before":
        juliet.old_copies = frozenset((older,))
    await router.send(romeo, message("1", juliet.jid_text))
    juliet.old_copies = frozenset((older,))
    holder.answer()
    assert romeo.inbound.h == 1
    await router.send(romeo, message("2", juliet.jid_text, "headline"))
    holder.answer()
    assert romeo.inbound.h == 1
    if forgotten:
        juliet.are_forgotten((older,))
        assert romeo.inbound.h == 1, "who has the good copy may be another one by now: it must have all"
        holder.answer()
        assert romeo.inbound.h == 3, "nobody has an older one"
    store.away = False
    await until(lambda: romeo.inbound.h >= 2)
    assert romeo.inbound.h == (3 if forgotten else 2), "a headline is stored nowhere"
    await router.end(juliet)
    assert romeo.inbound.h == 3
    await router.stop()


async def test_what_waits_for_a_copy_of_a_session_that_ends_meanwhile_waits_no_longer() -> None:
    router = MemoryRouter()
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    romeo.inbound.enable()
    juliet.inbound.enable()
    holder: Any = HolderElsewhere()
    juliet.holder, juliet.old_copies = holder, frozenset((holder,))
    await router.send(romeo, message("1", juliet.jid_text, "headline"))
    router.sessions.remove(juliet)
    assert romeo.inbound.h == 0
    holder.answer()
    assert romeo.inbound.h == 1
    await router.stop()
