"""Stanzas for sessions that are arriving at a router: its row in the table is ahead of the session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from services.router.modules import rfc6121_presence, rfc6121_roster, xep_0160_offline
from services.router.store import SessionRow
from tests.unit.router.memory_router import HOST, MemoryRouter, Stores, iq, message, together, until, view
from tests.unit.router.nodes import at_home
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.node import NodeState
from tidings.cluster.strategies.broadcast import Broadcast
from tidings.cluster.strategies.online_users import OnlineUsers
from tidings.cluster.strategy import Factory
from tidings.kit.db import DatabaseAway
from tidings.kit.module import IQ, PRESENCE, ModuleSpec
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid

JULIET = f"juliet@{HOST}"
MODULES = (rfc6121_roster.MODULE, rfc6121_presence.MODULE, xep_0160_offline.MODULE)


@asynccontextmanager
async def two(
    strategy: Factory, modules: Sequence[ModuleSpec] = ()
) -> AsyncIterator[tuple[MemoryRouter, MemoryRouter]]:
    """Routers a and b, which see each other."""
    routers: dict[str, MemoryRouter] = {}
    stores = Stores()
    a, b = (MemoryRouter(name, routers, stores, strategy, modules) for name in "ab")
    for router in (a, b):
        router.see(view(1, a=NodeState.UP, b=NodeState.UP))
    yield a, b
    for router in (a, b):
        await router.stop()


async def test_a_copy_waits_until_all_sessions_of_its_account_that_are_on_their_way_have_come_or_have_not() -> None:
    async with two(Broadcast) as (a, b):
        romeo = await a.session("romeo")
        with b.sessions.arriving(JULIET):
            with b.sessions.arriving(JULIET):
                await a.send(romeo, iq("get", "q", f"{JULIET}/r", "{x}y"))
                await until(lambda: len(b.forwarder) > 0 or bool(a.link.of(romeo)))
            # Refused there, though it came later.
            await a.send(romeo, iq("get", "other", f"nurse@{HOST}/r", "{x}y"))
            await until(lambda: bool(a.link.of(romeo)))
            assert [envelope.id for envelope in a.link.of(romeo)] == ["other"], "one did not come, the other may"
            juliet = await b.session("juliet")
        await until(lambda: [envelope.kind for envelope in b.link.of(juliet)] == [IQ])


async def test_what_is_for_a_full_jid_does_not_go_past_what_the_table_has_sent_and_that_is_stored() -> None:
    """A session is bound, and has sent no presence: what is for its account is stored, what is for it alone is held.
    The sender's router does not know of it yet; the table says where it is."""
    async with two(OnlineUsers, MODULES) as (a, b):
        await a.stores.accounts.create(HOST, "juliet", {})
        romeo = await a.session("romeo")
        juliet = await b.session("juliet", available=False)
        a.routing.strategy.view_changed(view(2, a=NodeState.UP, b=NodeState.UP))
        b.routing.deliveries.first_presence.settle(juliet)
        b.routing.deliveries.first_presence.told(juliet)
        for number in range(1, 7):
            one = message(str(number), JULIET if number % 2 else f"{JULIET}/r")
            one.from_jid = romeo.jid_text
            assert a.safety.accept(romeo, one)
            romeo.lane.run(a.routing.from_session, romeo, one)
        stored_before = []

        async def pending() -> int:
            return await a.stores.messages.pending_count(Jid("juliet", HOST, ""))

        seen = 0
        async with asyncio.timeout(5.0):
            while seen < 3:
                await asyncio.sleep(0)
                if juliet.held is not None and len(juliet.held) > seen:
                    seen = len(juliet.held)
                    stored_before.append(await pending())
        assert stored_before == [1, 3, 5], "all that goes before what comes there is stored by then"


async def test_what_goes_elsewhere_waits_for_what_is_still_being_written_for_its_account_here() -> None:
    """Drills, seed 81: a router stood still in the midst of a commit; when it woke the account's next session was at
    another one, which stored what was passed on to it before the commit was done."""
    async with together("ab", Stores(), modules=MODULES) as (a, b):
        name = at_home("juliet", ab="a")
        await a.stores.accounts.create(HOST, name, {})
        romeo, before = await a.session(at_home("romeo", ab="a")), await a.session(name)
        a.stores.messages.away = True
        await a.send(romeo, message("1", before.jid_text))
        assert [envelope.id for envelope in a.link.of(before)] == ["1"]
        await a.end(before)
        juliet = await b.session(name)
        sending = asyncio.create_task(a.send(romeo, message("2", juliet.jid_text)))
        for _ in range(50):
            await asyncio.sleep(0)
        assert b.link.of(juliet) == []
        a.stores.messages.away = False
        await until(lambda: len(b.link.of(juliet)) == 2)
        first, second = b.link.of(juliet)
        assert (b"id='1'" in first.stanza, b"id='2'" in second.stanza) == (True, True)
        await sending


async def test_what_waits_for_a_router_that_dies_goes_behind_what_that_had_taken() -> None:
    """Drills, seed 129: the first one was taken for had then, for its receiver had got the second one."""
    async with together("abc", Stores(), strategy=OnlineUsers, modules=MODULES) as (a, b, c):
        await a.stores.accounts.create(HOST, "juliet", {})
        looks: list[tuple[str, ...]] = []
        a.safety.is_unsafe_elsewhere = lambda flow: looks.append(flow) or bool(a.links.unsafe.get("b"))  # type: ignore[func-returns-value]
        romeo, before = await a.session("romeo"), await b.session("juliet")
        await until(lambda: a.routing.strategy.locate(JULIET, "").nodes == ("b",))
        b.stores.messages.away = True
        await a.send(romeo, message("1", JULIET))
        await until(lambda: b.link.bodies(before) == ["1"])
        await b.end(before)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(c.routing.strategy, "session_opened", lambda *_: None)  # a has not heard of it
            juliet = await c.session("juliet")
        await a.send(romeo, message("2", juliet.jid_text))
        await until(lambda: len(looks) > 1)
        assert c.link.bodies(juliet) == []
        b.stores.messages.supersede(lambda _origin: True)  # it dies before that is written
        b.stores.messages.away = False
        a.links.dies("b")
        await until(lambda: len(c.link.bodies(juliet)) == 2)
        assert c.link.bodies(juliet) == ["1", "2"]


async def test_what_comes_from_a_router_that_has_lost_a_session_waits_for_what_that_had_for_it() -> None:
    async with two(Broadcast) as (a, b):
        romeo, juliet = await a.session("romeo"), await b.session("juliet")
        nurse = await b.session("nurse")
        with b.routing.unsettled(JULIET, "a"):
            await a.send(romeo, message("1", JULIET))
            await a.send(romeo, message("2", juliet.jid_text))
            await b.send(nurse, message("3", JULIET))
            await a.send(romeo, message("4", nurse.jid_text))
            await until(lambda: b.link.bodies(juliet) == ["3"] and b.link.bodies(nurse) == ["4"])
            assert b.routing.is_unsettled(JULIET, "a")
        await until(lambda: b.link.bodies(juliet) == ["3", "1", "2"])
        assert not b.routing.is_unsettled(JULIET, "a")


async def test_an_error_waits_for_the_database_that_says_where_its_receiver_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody can be told that an answer did not arrive."""
    monkeypatch.setattr("services.router.account_delivery.RETRY", 0.01)
    async with two(OnlineUsers) as (a, b):
        romeo, nurse = await b.session("romeo"), await a.session("nurse")
        a.routing.strategy.view_changed(view(2, a=NodeState.UP, b=NodeState.UP))
        asked: list[str] = []
        rows = a.stores.table.of_account

        async def away(account: Jid) -> list[SessionRow]:
            asked.append(str(account))
            if len(asked) < 4:
                raise DatabaseAway("gone")
            return await rows(account)

        monkeypatch.setattr(a.stores.table, "of_account", away)
        refused = message("1", f"capulet@{HOST}")
        refused.from_jid = romeo.jid_text
        a.routing.answers.refuse(refused, StanzaError("service-unavailable"))
        await until(lambda: [envelope.type for envelope in b.link.of(romeo)] == ["error"])
        assert len(asked) == 4
        asked.clear()
        await a.send(nurse, message("2", f"tybalt@{HOST}"))
        await until(lambda: [envelope.type for envelope in a.link.of(nurse)] == ["error"])
        assert len(asked) == 1, "who has sent a message is told at once"


@pytest.mark.parametrize("replaced", [True, False])
async def test_a_goodbye_that_comes_late_is_not_taken_for_that_of_the_next_session_of_its_name(
    replaced: bool,
) -> None:
    """Drills, seed 44: the router of who saw the session had died too; it was told by the next session of the full JID
    that this one is there, and then, by another router, that the one before is not."""
    stores = Stores()
    async with together("abc", stores, Broadcast, MODULES) as (a, b, c):
        romeo = await b.session("romeo")
        juliet = await (c if replaced else a).session("juliet", "desk")
        await until(lambda: not any(len(router.forwarder) for router in (a, b, c)))
        origin = "the one before" if replaced else juliet.id
        a.links.hung["b"] = []
        goodbye = Envelope(
            kind=PRESENCE, type="unavailable", origin=origin, from_jid=juliet.jid_text, to_jid=f"romeo@{HOST}",
            stanza=b"<presence type='unavailable'/>",
        )  # fmt: skip
        assert a.routing.route(goodbye) is None
        (flow,) = a.forwarder._flows.values()
        await until(lambda: flow.outstanding == 1)
        (row,) = (row for row in await stores.table.of_account(romeo.jid.bare) if row.router == "b")
        assert await stores.table.move(row, "c")
        taken = c.takes_over(romeo)
        for router in (a, c):
            router.see(view(2, **dict.fromkeys("ac", NodeState.UP)))
        a.links.dies("b")
        await until(lambda: not len(a.forwarder) and not len(c.forwarder))
        assert [envelope.type for envelope in c.link.of(taken)] == ([] if replaced else ["unavailable"])


@pytest.mark.parametrize("replaced", [True, False])
async def test_a_goodbye_that_was_long_under_way_is_for_nobody_who_sees_the_next_session_of_its_name(
    replaced: bool,
) -> None:
    """Drills, seed 514: the router of who saw it had stood still, with the goodbye before it; behind that it dealt with
    the bind of the next session first."""
    async with together("ab", Stores(), Broadcast, MODULES) as (a, b):
        romeo = await b.session("romeo")

        def show(type_: str, origin: str) -> None:
            from_ = f"juliet@{HOST}/desk"
            shown = Envelope(
                kind=PRESENCE, type=type_, origin=origin, from_jid=from_, to_jid=str(romeo.jid.bare),
                stanza=f"<presence from='{from_}' type='{type_}'/>".encode(),
            )  # fmt: skip
            (a if type_ else b).routing.route(shown)

        b.link.written.clear()
        show("", "the next" if replaced else "this one")
        show("unavailable", "this one")
        await until(lambda: not len(a.forwarder) and not len(b.forwarder))
        seen = [envelope.type for envelope in b.link.of(romeo)]
        assert seen == ([""] if replaced else ["", "unavailable"])
        show("unavailable", "the next")
        await until(lambda: not len(a.forwarder) and not len(b.forwarder))
        assert [envelope.type for envelope in b.link.of(romeo)][-1] == "unavailable"
