"""A session has a row and a row has a session, whatever the database leaves open (services/router/binding.py)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from services.router import binding, negotiation, orphans, peers
from services.router.store import SessionRow
from tests.unit.router.nodes import FAILED, HOST, UP, Client, at_home, running, soon
from tests.unit.router.unsure_database import at_once, away
from tidings.api.registry.v1.registry_pb2 import ListNodesResponse
from tidings.api.registry.v1.registry_pb2_grpc import (
    RegistryServiceServicer,
    add_RegistryServiceServicer_to_server,
)
from tidings.api.router.v1.router_pb2 import EndSessionRequest
from tidings.api.router.v1.router_pb2_grpc import RouterServiceStub
from tidings.cluster.node import Node
from tidings.cluster.view import ClusterView
from tidings.kit.node_messages import node_into
from tidings.xmpp.jid import Jid

JULIET = Jid("juliet", HOST, "r")


async def test_a_bind_of_which_nobody_knows_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "RETRY", 0.05)
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        await nodes.account("juliet")
        client = Client(nodes, "juliet")
        await client.open("<mechanisms")
        await client.authenticate()
        await client.open("<bind")
        nodes.databases["a"].behind = away
        client.bind()
        await client.until("resource-constraint")
        assert len(await nodes.rows("juliet")) == 1, "it was committed all the same"
        nodes.databases["a"].behind = at_once
        async with asyncio.timeout(5):
            while await nodes.rows("juliet"):
                await asyncio.sleep(0.01)
        client.bind()
        await client.until("<jid>")


async def test_a_session_that_is_ended_for_another_one_ends_whole_though_its_caller_waits_no_longer(
    tmp_path: Path,
) -> None:
    """gRPC cancels a handler at its caller's deadline; half an end would leave a row that nobody can pass."""
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        juliet = await nodes.client(at_home("juliet", ab="a"))
        romeo = await nodes.client(at_home("romeo", ab="b"))
        juliet.send(f"<presence to='{romeo.name}@{HOST}/r'/>")
        await soon(lambda: juliet.name in romeo.written, "directed presence")
        (row,) = await nodes.rows(juliet.name)
        nodes.databases["a"].before = lambda: asyncio.sleep(0.2)
        stub: Any = RouterServiceStub(nodes.served["a"].channel(nodes.members["b"].node))
        with pytest.raises(Exception, match="Deadline"):
            await stub.EndSession(EndSessionRequest(session=row.session, jid=str(row.jid)), timeout=0.05)
        await soon(lambda: "unavailable" in romeo.written, "who saw it is told")
        assert await nodes.rows(juliet.name) == []
        assert "<conflict" in juliet.written


@pytest.mark.parametrize("at", ["a", "b"])
async def test_the_end_of_a_session_is_told_before_the_next_one_of_its_full_jid_is_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Drills, seed 33: the router of the old one woke, removed its row, and told contacts of its end behind what they
    heard of the new one, at another router: they saw somebody go who was there."""
    monkeypatch.setattr(peers, "END_TIMEOUT", 0.1)
    async with running(tmp_path, "a", "b", strategy="online-users") as nodes:
        await nodes.up("a", "b")
        old = await nodes.client("juliet", at="a")
        (before,) = await nodes.rows("juliet")
        tell, told = nodes.routers["a"].routing.endings.tell, asyncio.Event()

        async def late(*arguments: Any) -> None:
            await told.wait()
            await tell(*arguments)

        monkeypatch.setattr(nodes.routers["a"].routing.endings, "tell", late)
        asks = 0
        if at == "b":
            end = nodes.routers[at]._binding._peers.end

            async def counted(*arguments: Any) -> None:
                nonlocal asks
                asks += 1
                try:
                    await end(*arguments)
                finally:
                    monkeypatch.setattr(peers, "END_TIMEOUT", 60.0)

            monkeypatch.setattr(nodes.routers[at]._binding._peers, "end", counted)
        nodes.prefers = at
        new = Client(nodes, "juliet")
        await new.open("<mechanisms")
        await new.authenticate()
        await new.open("<bind")
        if at == "a":
            old.disconnect()
        new.bind()
        await soon(lambda: nodes.session("a", "juliet") is None and (at == "a" or asks == 2), "the old one ends")
        while [row.session for row in await nodes.rows("juliet")] in ([], [before.session]):
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)  # whatever it does now, it does not get so far
        assert "<jid>" not in new.written
        told.set()
        await new.until("<jid>")


async def test_two_sessions_of_one_full_jid_may_end_at_one_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for long until the end of the first one is told."""
    monkeypatch.setattr(negotiation, "TOLD_TIMEOUT", 0.01)
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        router = nodes.routers["a"]
        tell, ending = router.routing.endings.tell, router._negotiator.ending
        gates: list[asyncio.Event] = []

        async def late(*arguments: Any) -> None:
            gates.append(gate := asyncio.Event())
            await gate.wait()
            await tell(*arguments)

        monkeypatch.setattr(router.routing.endings, "tell", late)
        await nodes.account("juliet")
        for count in (1, 2):
            client = Client(nodes, "juliet")
            await client.log_in()
            client.disconnect()
            await soon(lambda count=count: len(gates) == count, "it ends")  # type: ignore[misc]
        told = list(ending.values())
        gates[1].set()
        await soon(lambda: len(ending) == 1, "the second one has ended")
        gates[0].set()
        await soon(lambda: all(one.is_set() for one in told), "and the first one, for who waits for it")
        assert not ending


async def test_a_row_without_a_session_is_no_obstacle(tmp_path: Path) -> None:
    """Neither at the router that the row names, nor at another one."""
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        name = at_home("juliet", ab="a")
        await nodes.table.bind(Jid(name, HOST, "r"), "left", "b")
        client = await nodes.client(name)
        (row,) = await nodes.rows(name)
        assert row.router == "a"
        client.say(f"{name}@{HOST}/r", 1)
        await soon(lambda: client.numbers() == [1], "it gets messages")


async def test_a_row_that_goes_just_now_is_not_taken_for_left_behind(tmp_path: Path) -> None:
    """Another router needs the place of a session whose row was read here just before it was removed."""
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        juliet = await nodes.client("juliet")
        (row,) = await nodes.rows("juliet")
        held = nodes.routers["a"]._binding
        removed, read, gone, ended = asyncio.Event(), asyncio.Event(), asyncio.Event(), list[str]()

        async def before() -> None:
            await removed.wait()

        async def late(account: Jid) -> list[SessionRow]:
            rows = await of_account(account)
            read.set()
            await gone.wait()
            return rows

        async def end(left: SessionRow) -> None:
            ended.append(left.session)

        of_account, held._table.of_account = held._table.of_account, late  # type: ignore[method-assign]
        held._orphans.end = end  # type: ignore[assignment, method-assign]
        nodes.databases["a"].before = before
        juliet.disconnect()
        await soon(lambda: nodes.session("a", "juliet") is None, "it ends")
        clearing = asyncio.create_task(held.clear(row.jid, row.session))
        await soon(lambda: read.is_set() or clearing.done(), "it is looked for")
        removed.set()
        await soon(lambda: not held._unsettled, "it has ended")
        gone.set()
        await clearing
        assert ended == []


async def test_rows_without_a_session_are_ended_when_they_were_seen_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "SWEEP", 0.05)
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        there = await nodes.client("romeo")
        await nodes.table.bind(JULIET, "left", "a")
        async with asyncio.timeout(5):
            while await nodes.rows("juliet"):
                await asyncio.sleep(0.01)
        assert len(await nodes.rows("romeo")) == 1
        assert not there.closed


async def test_a_router_that_was_put_out_ends_no_session_for_the_others(tmp_path: Path) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        juliet = await nodes.client(at_home("juliet", ab="a"))
        nodes.tell("a", a=FAILED, b=UP)
        juliet.disconnect()
        await soon(lambda: nodes.session("a", juliet.name) is None, "its session is gone")
        await soon(lambda: not nodes.routers["a"].is_busy(), "and over")
        (row,) = await nodes.rows(juliet.name)
        assert row.router == "a", "the others end it"


async def test_who_becomes_available_behind_a_move_is_noted_so(tmp_path: Path) -> None:
    """Its row said that nobody had seen it; were that left, nobody would be told when its router dies."""
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a")
        juliet = await nodes.client(at_home("juliet", ab="b"))
        juliet.send("<presence type='unavailable'/>")
        session = nodes.session("a", juliet.name)
        assert session is not None
        await soon(lambda: session.seen_available is False, "it is seen no longer")
        nodes.tell(a=UP, b=UP)
        await nodes.is_at("b", juliet.name)
        for presence, available in (("<presence/>", True), ("<presence type='unavailable'/>", False)):
            juliet.send(presence)
            async with asyncio.timeout(5):
                while [row.available for row in await nodes.rows(juliet.name)] != [available]:
                    await asyncio.sleep(0.01)


class Registry(RegistryServiceServicer):
    """Tells a view."""

    def __init__(self) -> None:
        self.view = ClusterView()
        self.asked = 0

    async def ListNodes(self, request: Any, context: Any) -> ListNodesResponse:
        self.asked += 1
        response = ListNodesResponse(view_version=self.view.version)
        for node in self.view:
            node_into(node, response.nodes.add())
        return response


async def test_sessions_of_a_router_that_only_our_view_does_not_show_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view may stand still; then sessions of a router that has only just come look like orphans."""
    monkeypatch.setattr(orphans, "SWEEP", 0.05)
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        registry, registries = Registry(), nodes.served_by("registry")
        registries.add(add_RegistryServiceServicer_to_server, registry, "tidings.api.registry.v1.RegistryService")
        router_b = Node("b", "b", "127.0.0.1", 1, ("router",), UP)
        registry.view = ClusterView(9, [nodes.members["a"].node, router_b])
        await nodes.table.bind(JULIET, "s", "b")
        nodes.tell(a=UP, registry=UP)
        await soon(lambda: registry.asked >= 3, "the registry is asked")
        assert len(await nodes.rows("juliet")) == 1
        registry.view = ClusterView(10, [nodes.members["a"].node])
        async with asyncio.timeout(5):
            while await nodes.rows("juliet"):
                await asyncio.sleep(0.01)


async def test_a_session_has_the_epoch_of_its_row_though_several_raise_it_at_one_time(tmp_path: Path) -> None:
    """Drills, seed 124: behind the database's absence all those that had waited raised it, each counted one, and the
    session was nobody's any more."""
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        await nodes.client("juliet")
        session, keep = nodes.session("a", "juliet"), nodes.routers["a"]._binding.keep
        assert session is not None
        begun = session.epoch
        told = nodes.late("a")
        first, second = (asyncio.create_task(keep(session)) for _ in range(2))
        async with asyncio.timeout(5):
            while [row.epoch for row in await nodes.rows("juliet")] != [begun + 1]:
                await asyncio.sleep(0.01)
        told.set()
        assert [await first, await second] == [True, True]
        assert [row.epoch for row in await nodes.rows("juliet")] == [session.epoch]


async def test_an_epoch_that_was_raised_twice_while_it_is_raised_is_no_other_router_s_row(tmp_path: Path) -> None:
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        await nodes.client("juliet")
        session, keep = nodes.session("a", "juliet"), nodes.routers["a"]._binding.keep
        assert session is not None
        go_on = asyncio.Event()
        nodes.databases["a"].before = go_on.wait
        slow = asyncio.create_task(keep(session))
        await asyncio.sleep(0)
        nodes.databases["a"].before = at_once
        assert await keep(session)
        assert await keep(session)
        go_on.set()
        assert await slow
        assert [row.epoch for row in await nodes.rows("juliet")] == [session.epoch]


async def test_the_end_of_a_session_removes_its_row_also_when_its_epoch_is_just_being_raised(tmp_path: Path) -> None:
    """Else its contacts see it there until the row is found, seconds later."""
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        await nodes.client("juliet")
        session, binding = nodes.session("a", "juliet"), nodes.routers["a"]._binding
        assert session is not None
        begun, told = session.epoch, nodes.late("a")
        raising = asyncio.create_task(binding.keep(session))
        async with asyncio.timeout(5):
            while [row.epoch for row in await nodes.rows("juliet")] != [begun + 1]:
                await asyncio.sleep(0.01)
        ending = asyncio.create_task(binding.give_up(session))
        await asyncio.sleep(0)
        told.set()
        assert await raising
        assert await ending
        assert await nodes.rows("juliet") == []
