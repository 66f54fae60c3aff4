"""What becomes of stanzas that are not in order, whose session has moved or ended, or that modules wait for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from services.router.iq_deadlines import MAX_ASKED
from tests.unit.router.memory_router import HOST, MemoryRouter, Stores, iq, message, presence, until, view
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.hashing import rendezvous
from tidings.cluster.node import NodeState
from tidings.cluster.strategies.broadcast import Broadcast
from tidings.cluster.strategies.home import Home
from tidings.cluster.strategies.online_users import OnlineUsers
from tidings.cluster.strategy import Factory
from tidings.kit.module import IQ, MESSAGE, PRESENCE, Stanza, Where
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid

UP, DRAINING = NodeState.UP, NodeState.DRAINING


@pytest.fixture
async def router() -> AsyncIterator[MemoryRouter]:
    made = MemoryRouter()
    yield made
    await made.stop()


Cluster = Callable[..., dict[str, MemoryRouter]]


@pytest.fixture
async def cluster_of() -> AsyncIterator[Cluster]:
    made: dict[str, MemoryRouter] = {}

    def make(strategy: Factory, *names: str) -> dict[str, MemoryRouter]:
        stores = Stores()
        for name in names:
            MemoryRouter(name, made, stores, strategy)
        return made

    yield make
    for router in made.values():
        await router.stop()


# --- what is not in order ---


@pytest.mark.parametrize(
    "request_",
    [
        iq("get", "1", "@bad", "{x}q"),
        iq("get", "1", f"juliet@{HOST}/r"),
        iq("set", "1", f"juliet@{HOST}/r", "{x}q", "{x}q"),
        iq("ask", "1", f"juliet@{HOST}/r", "{x}q"),
        iq("get", "1", HOST),
    ],
    ids=["a `to` that is none", "no child", "two children", "an unknown type", "to the own server"],
)
async def test_a_request_that_is_not_in_order_gets_one_error(router: MemoryRouter, request_: Envelope) -> None:
    """RFC 6120 8.2.3; also when it was for somebody else, who has not been asked yet."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    await router.send(romeo, request_)
    assert [(answer.type, answer.id) for answer in router.link.of(romeo)] == [("error", "1")]
    assert router.link.of(juliet) == []


async def test_a_request_beyond_those_that_may_wait_gets_its_error(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    for number in range(MAX_ASKED + 1):
        await router.send(romeo, iq("get", str(number), juliet.jid_text, "{x}q"))
    (answer,) = router.link.of(romeo)
    assert (answer.type, answer.id) == ("error", str(MAX_ASKED))
    assert b"<resource-constraint" in answer.stanza
    assert len(router.link.of(juliet)) == MAX_ASKED


async def test_an_answer_that_nobody_waits_for_is_dropped(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    await router.send(juliet, iq("result", "1", romeo.jid_text))
    assert router.link.of(romeo) == []


async def test_what_the_server_sent_itself_gets_no_answer(router: MemoryRouter) -> None:
    """A roster push that another router passed on for a session that has gone meanwhile."""
    push = iq("set", "push", f"juliet@{HOST}/gone", "{jabber:iq:roster}query")
    assert router.routing.route(push) is None
    assert router.link.written == []


# --- modules ---


async def test_work_behind_an_answer_that_fails_sends_no_second_answer(router: MemoryRouter) -> None:
    def breaks() -> None:
        raise RuntimeError("not foreseen")

    def answered_at_once(request: Stanza) -> bytes:
        request.after = breaks
        return b""

    async def answered_later(request: Stanza) -> bytes:
        request.after = breaks
        return b""

    router.hooks.iq[Where.SERVER, "get", "{x}now"] = answered_at_once
    router.hooks.iq[Where.SERVER, "get", "{x}later"] = answered_later
    romeo = await router.session("romeo")
    await router.send(romeo, iq("get", "1", HOST, "{x}now"))
    await router.send(romeo, iq("get", "2", HOST, "{x}later"))
    assert [(answer.type, answer.id) for answer in router.link.of(romeo)] == [("result", "1"), ("result", "2")]


async def test_a_stanza_that_a_module_waited_for_is_still_its_sessions(router: MemoryRouter) -> None:
    async def watched(_stanza: Stanza) -> bool:
        await asyncio.sleep(0)
        return False

    seen: list[str] = []

    def whose(request: Stanza) -> bytes:
        seen.append(request.session.id if request.session is not None else "nobody's")
        return b""

    router.hooks.sent[IQ] = [(frozenset(), watched)]
    router.hooks.iq[Where.ACCOUNT, "get", "{x}q"] = whose
    romeo = await router.session("romeo")
    await router.send(romeo, iq("get", "1", "", "{x}q"))
    assert seen == [romeo.id]


# --- a session that has ended ---


async def test_of_an_ended_session_only_messages_go_on(router: MemoryRouter) -> None:
    """What waited behind its end: nobody is to see it available again, and it can't be answered."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    asked: list[str] = []

    def noted(request: Stanza) -> bytes:
        asked.append(request.id)
        return b""

    router.hooks.iq[Where.SERVER, "set", "{x}q"] = noted
    await router.end(romeo)
    await router.send(romeo, presence(juliet.jid_text))
    await router.send(romeo, iq("set", "1", HOST, "{x}q"))
    await router.send(romeo, message("m", juliet.jid_text))
    assert [(envelope.kind, envelope.id) for envelope in router.link.of(juliet)] == [(MESSAGE, "m")]
    assert asked == []


async def test_a_session_that_ends_while_a_module_waits_sends_no_more_presence(router: MemoryRouter) -> None:
    go_on = asyncio.Event()

    async def watched(_stanza: Stanza) -> bool:
        await go_on.wait()
        return False

    router.hooks.sent[PRESENCE] = [(frozenset(), watched)]
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    sending = router.tasks.spawn(router.send(romeo, presence(juliet.jid_text)), "directed presence")
    await until(lambda: romeo.lane.waiting is not None)
    await router.end(romeo)
    go_on.set()
    await sending
    assert router.link.of(juliet) == []


# --- a session that is not at its home ---


@pytest.mark.parametrize("to", ["the account", "nobody"])
async def test_a_session_away_from_its_home_is_served_where_it_is(cluster_of: Cluster, to: str) -> None:
    """Between a change of the view and its move; its roster is its own all the while (RFC 6121 2.1.3)."""
    routers = cluster_of(Home, "a", "b", "c")
    local = next(
        name for name in (f"u{number}" for number in range(99))
        if rendezvous(f"{name}@{HOST}", ("a", "b", "c")) == "b" and rendezvous(f"{name}@{HOST}", ("a", "c")) == "a"
    )  # fmt: skip

    def own(request: Stanza) -> bytes:
        if request.session is None:
            raise StanzaError("forbidden")
        return b""

    for router in routers.values():
        router.hooks.iq[Where.ACCOUNT, "get", "{x}roster"] = own
        router.see(view(1, a=UP, b=DRAINING, c=UP))
    session = await routers["a"].session(local)
    for router in routers.values():
        router.see(view(2, a=UP, b=UP, c=UP))
    assert routers["a"].routing.strategy.keeper(session.account) == "b"
    request = iq("get", "1", session.account if to == "the account" else "", "{x}roster")
    await routers["a"].send(session, request)
    assert [answer.type for answer in routers["a"].link.of(session)] == ["result"]
    assert not routers["a"].forwarder.under_way(session.account), "it can move"


# --- a strategy that was wrong ---


async def moved(cluster_of: Cluster, strategy: Factory) -> tuple[dict[str, MemoryRouter], Jid]:
    """Three routers; a session that was at `a` is at `b`, and `c` has not heard of it."""
    routers = cluster_of(strategy, "a", "b", "c")
    for router in routers.values():
        router.see(view(1, a=UP, b=UP, c=UP))
    before = await routers["a"].session("juliet")
    await routers["a"].routing.notes.known()
    routers["a"].sessions.remove(before)
    (row,) = await routers["a"].stores.table.of_account(before.jid.bare)
    await routers["a"].stores.table.move(row, "b")
    after = await routers["b"].session("juliet")
    await routers["b"].routing.notes.known()
    # As if the note of `b` were still on its way.
    routers["c"].routing.strategy.noted("b", f"-{after.jid_text}".encode())
    assert routers["c"].routing.strategy.locate(after.account, "").nodes == ("a",)
    return routers, after.jid


@pytest.mark.parametrize("to", ["full", "bare"])
@pytest.mark.parametrize("kind", ["presence", "message"])
async def test_what_goes_where_a_session_was_reaches_it_where_it_is(cluster_of: Cluster, kind: str, to: str) -> None:
    """`online-users`: the note of the move comes later than the refusal."""
    routers, jid = await moved(cluster_of, OnlineUsers)
    romeo = await routers["c"].session("romeo")
    wanted = str(jid) if to == "full" else str(jid.bare)
    await routers["c"].send(romeo, presence(wanted) if kind == "presence" else message("m", wanted))
    await until(lambda: len(routers["b"].link.written) == 1)
    assert routers["b"].link.written[0][0] == str(jid)


async def test_presence_for_who_is_away_asks_no_table(cluster_of: Cluster) -> None:
    """`broadcast` guesses each time; most presence is for people who are away."""
    routers = cluster_of(Broadcast, "a", "b")
    for router in routers.values():
        router.see(view(1, a=UP, b=UP))
    romeo = await routers["a"].session("romeo")
    table = routers["a"].stores.table
    await routers["a"].send(romeo, presence(f"juliet@{HOST}"))
    await until(lambda: not len(routers["a"].forwarder) and bool(routers["a"].links.sent))
    assert table.asked == 0
    for router in routers.values():
        router.see(view(2, a=UP, b=DRAINING))
    await routers["a"].send(romeo, presence(f"juliet@{HOST}"))
    await until(lambda: table.asked == 1)


async def test_what_came_here_while_others_were_asked_is_found_here(cluster_of: Cluster) -> None:
    routers = cluster_of(Broadcast, "a", "b")
    for router in routers.values():
        router.see(view(1, a=UP, b=UP))
    romeo = await routers["a"].session("romeo")
    sent = presence(f"juliet@{HOST}/r")
    sent.from_jid = romeo.jid_text
    assert routers["a"].routing.from_session(romeo, sent) is None
    assert routers["a"].links.sent
    juliet = await routers["a"].session("juliet")
    await until(lambda: bool(routers["a"].link.of(juliet)))


# --- order ---


async def test_nothing_overtakes_what_is_held_for_a_session(router: MemoryRouter) -> None:
    """While it gets its stored messages: of any kind, from the same sender."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    router.for_modules.hold(juliet)
    await router.send(romeo, message("1", juliet.jid_text))
    await router.send(romeo, iq("get", "2", juliet.jid_text, "{x}q"))
    await router.send(romeo, presence(juliet.jid_text))
    await router.send(romeo, message("4", juliet.account))
    assert router.link.of(juliet) == []
    router.for_modules.release(juliet)
    assert [(envelope.kind, envelope.id) for envelope in router.link.of(juliet)] == [
        (MESSAGE, "1"), (IQ, "2"), (PRESENCE, ""), (MESSAGE, "4"),
    ]  # fmt: skip
