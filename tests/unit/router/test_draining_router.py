"""A router that drains (services/router/app.py): no stream of its clients ends, and it keeps nothing for itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from services.router import app
from tests.unit.router.nodes import DRAINING, SUSPECT, UP, Client, at_home, running, soon
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.common.v1.session_pb2 import SessionRecord
from tidings.api.router.v1.router_pb2 import AdoptSessionRequest, AttachHello, AttachRequest
from tidings.api.router.v1.router_pb2_grpc import RouterServiceStub
from tidings.kit.rpc_errors import reason


async def test_a_stream_that_authenticates_while_its_router_drains_goes_on_elsewhere(tmp_path: Path) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        await nodes.account("juliet")
        nodes.prefers = "a"
        client = Client(nodes, "juliet")
        await client.open("<mechanisms")
        nodes.tell(a=DRAINING, b=UP)
        draining = asyncio.create_task(nodes.routers["a"].drain())
        await soon(lambda: nodes.routers["a"]._adoption.draining, "it drains")
        await client.authenticate()
        await client.open("<bind")
        client.bind()
        await client.until("<jid>")
        async with asyncio.timeout(5):
            await draining
        assert nodes.session("b", "juliet") is not None
        assert not client.closed


async def test_a_stream_is_not_sent_back_to_a_router_that_drains_while_others_do_not_know_that(
    tmp_path: Path,
) -> None:
    """It would be bound there, and lost with it."""
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        name = at_home("juliet", ab="a")
        await nodes.account(name)
        nodes.prefers = "a"
        client = Client(nodes, name)
        await client.open("<mechanisms")
        draining = asyncio.create_task(nodes.routers["a"].drain())
        await soon(lambda: nodes.routers["a"]._adoption.draining, "it drains")
        await client.authenticate()
        await client.open("<bind")
        assert nodes.routers["b"]._has_streams()
        assert not nodes.routers["a"]._has_streams()
        client.bind()
        await client.until("<jid>")
        await draining
        assert nodes.session("b", name) is not None


async def test_a_router_that_has_handed_over_all_takes_no_more_streams(tmp_path: Path) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        await nodes.routers["a"].drain()
        nodes.prefers = "a"
        client = Client(nodes, "juliet")
        await client.open("<system-shutdown")
        assert client.closed


async def test_a_stream_that_never_authenticates_holds_no_drain_up_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "UNBOUND_TIMEOUT", 0.2)
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        nodes.prefers = "a"
        client = Client(nodes, "juliet")
        await client.open("<mechanisms")
        nodes.tell(a=DRAINING, b=UP)
        async with asyncio.timeout(5):
            await nodes.routers["a"].drain()


async def test_a_draining_router_takes_no_session_over(tmp_path: Path) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        juliet = await nodes.client(at_home("juliet", ab="a"))
        (row,) = await nodes.rows(juliet.name)
        nodes.prefers = "b"
        waiting = Client(nodes, "waiting")
        await waiting.open("<mechanisms")
        nodes.tell(a=UP, b=DRAINING)
        draining = asyncio.create_task(nodes.routers["b"].drain())
        await soon(lambda: nodes.routers["b"]._adoption.draining, "it drains")
        stub: Any = RouterServiceStub(nodes.served["b"].channel(nodes.members["a"].node))
        record = SessionRecord(id=row.session, epoch=row.epoch, jid=str(row.jid))
        with pytest.raises(Exception, match="drains") as caught:
            await stub.AdoptSession(AdoptSessionRequest(record=record), timeout=5)
        assert reason(caught.value) == ErrorReason.ERROR_REASON_NOT_SERVING
        assert await nodes.rows(juliet.name) == [row]
        waiting.disconnect()
        await draining


async def test_nothing_goes_to_a_router_that_may_be_dead(tmp_path: Path) -> None:
    """A suspect one is back before long, or has failed; a session on its way to it would stand still till then."""
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a")
        juliet = await nodes.client(at_home("juliet", ab="b"))
        nodes.tell(a=UP, b=SUSPECT)
        late = await nodes.client(at_home("late", ab="b"))
        assert not nodes.routers["a"]._hand_over._unsettled
        assert nodes.session("a", juliet.name) is not None
        assert nodes.session("a", late.name) is not None
        nodes.tell(a=UP, b=UP)
        await nodes.is_at("b", juliet.name)
        await nodes.is_at("b", late.name)


async def test_a_drain_waits_for_the_end_of_sessions_that_end_meanwhile(tmp_path: Path) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        juliet = await nodes.client(at_home("juliet", ab="a"))
        nodes.databases["a"].before = lambda: asyncio.sleep(0.1)
        juliet.disconnect()
        await soon(lambda: nodes.session("a", juliet.name) is None, "it ends")
        await nodes.routers["a"].drain()
        assert await nodes.rows(juliet.name) == []


# --- links of connectors ---


async def test_a_connector_that_attaches_anew_has_given_up_its_link_before(tmp_path: Path) -> None:
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        stub: Any = RouterServiceStub(nodes.served["a"].channel(nodes.members["front"].node))
        hello = AttachRequest(sequence=1, hello=AttachHello(connector_incarnation="front"))
        calls = []
        for _ in range(2):
            calls.append(stub.Attach())
            await calls[-1].write(hello)
            assert (await calls[-1].read()).HasField("welcome")
        await soon(lambda: bool(calls[0].done()), "the first call ends")
        assert not calls[1].done()


async def test_a_ticket_for_a_session_does_not_open_a_stream(tmp_path: Path) -> None:
    """It is the right to one session, not to all of an account."""
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        juliet = await nodes.client("juliet")
        session = nodes.session("a", "juliet")
        assert session is not None
        sealed = nodes.routers["a"]._tickets.seal("front", "juliet@example.org", session.id, session.epoch)
        other = Client(nodes, "other")
        await other.open("<mechanisms")
        other.stream.tell_opened(sealed)
        await other.until("<not-authorized")
        assert not juliet.closed
