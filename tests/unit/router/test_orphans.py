"""Sessions of a router that has died: left alone for a while, then ended; what is for them waits (orphans.py)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.router import orphans
from services.router.schema import directed_presence
from services.router.store import DirectedChange
from tests.unit.router.nodes import HOST, Client, Nodes, at_home, running, soon
from tidings.xmpp.jid import Jid

QUERY = "<query xmlns='jabber:iq:version'/>"


async def directed(nodes: Nodes) -> set[str]:
    async with nodes.databases[""].read() as connection:
        return set((await connection.execute(sa.select(directed_presence.c.receiver))).scalars())


async def becomes(nodes: Nodes, *receivers: str) -> None:
    """Waits until just these are noted as those who got presence directly."""
    noted: set[str] = set()

    async def look() -> None:
        nonlocal noted
        while noted != set(receivers):
            noted = await directed(nodes)

    task = nodes.tasks.spawn(look(), "what is noted")
    await soon(task.done, f"{receivers} are noted")


async def left_behind(nodes: Nodes, name: str, *receivers: str) -> Jid:
    """A session at router b of which nobody holds a copy; nobody but these has seen it."""
    await nodes.account(name)
    jid = Jid(name, HOST, "r")
    await nodes.table.bind(jid, f"session of {name}", "b")
    await nodes.table.set_available([(jid, f"session of {name}", 1, False)])
    await nodes.table.set_directed([DirectedChange(jid, f"session of {name}", 1, receivers)])
    return jid


def gone(client: Client, jid: Jid) -> int:
    """How often a client was told that somebody is unavailable."""
    return sum(f"from='{jid}'" in part.replace('"', "'") and "unavailable" in part for part in _presence(client))


def _presence(client: Client) -> list[str]:
    return client.written.split("<presence")[1:]


def is_over(nodes: Nodes, jid: Jid) -> bool:
    return nodes.routers["a"]._orphans.is_settled(str(jid.bare))


async def test_what_is_sent_directly_is_noted_until_it_is_taken_back_or_the_session_ends(tmp_path: Path) -> None:
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        romeo = await nodes.client("romeo")
        one, other, third = (f"{name}@{HOST}/r" for name in ("nurse", "paris", "tybalt"))
        for to in (one, other, third):
            romeo.send(f"<presence to='{to}'/>")
        await becomes(nodes, one, other, third)
        romeo.send(f"<presence to='{one}' type='unavailable'/>")
        await becomes(nodes, other, third)
        romeo.send("<presence type='unavailable'/>")
        await becomes(nodes)
        romeo.send(f"<presence to='{one}'/>")
        await becomes(nodes, one)
        romeo.disconnect()
        await becomes(nodes)


async def test_directed_presence_is_noted_under_a_new_epoch_too(tmp_path: Path) -> None:
    """What the router that dies has not written yet, its successor writes."""
    name, to = at_home("romeo", ab="a"), f"nurse@{HOST}/r"
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        romeo = await nodes.client(name, "a")
        await nodes.is_at("a", name)
        session = nodes.session("a", name)
        assert session is not None
        romeo.send(f"<presence to='{to}'/>")
        await soon(lambda: session.directed == {to}, "it is sent")
        romeo.say(f"{name}@{HOST}/r", 1)
        await romeo.until("<body>1</body>")
        await nodes.kill("a")
        await nodes.is_at("b", name)
        await becomes(nodes, to)
        romeo.send(f"<presence to='{to}' type='unavailable'/>")
        await becomes(nodes)


async def test_who_got_presence_directly_is_told_once_of_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "GRACE", 0.3)
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        juliet = await nodes.client(at_home("juliet", ab="a"), "a")
        nurse = await nodes.client(at_home("nurse", ab="a"), "a")
        romeo = await left_behind(nodes, at_home("romeo", ab="a"), f"{juliet.name}@{HOST}/r")
        await nodes.kill("b")
        assert len(await nodes.rows(romeo.local)) == 1, "it may yet be taken over"
        await juliet.until("unavailable")
        assert await nodes.rows(romeo.local) == []
        juliet.say(f"{juliet.name}@{HOST}/r", 1)
        await juliet.until("<body>1</body>")
        assert (gone(juliet, romeo), gone(nurse, romeo)) == (1, 0)
        assert await directed(nodes) == set()


async def test_who_is_taken_over_in_time_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "GRACE", 0.5)
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        juliet = await nodes.client(at_home("juliet", ab="a"), "a")
        romeo = await left_behind(nodes, at_home("romeo", ab="a"), f"{juliet.name}@{HOST}/r")
        await nodes.kill("b")
        (row,) = await nodes.rows(romeo.local)
        assert not is_over(nodes, romeo)
        assert await nodes.table.move(row, "elsewhere")
        await soon(lambda: is_over(nodes, romeo), "that is seen")
        await soon(lambda: not nodes.routers["a"]._orphans._cleaning, "and nothing is left to do")
        assert [row.router for row in await nodes.rows(romeo.local)] == ["elsewhere"]
        assert gone(juliet, romeo) == 0


async def test_a_probe_gets_the_presence_of_a_session_that_is_being_taken_over(tmp_path: Path) -> None:
    romeo_name, juliet_name = at_home("romeo", ab="a"), at_home("juliet", ab="b")
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        romeo, juliet = await nodes.client(romeo_name, "a"), await nodes.client(juliet_name, "b")
        juliet.send(f"<presence type='subscribe' to='{romeo_name}@{HOST}'/>")
        await romeo.until("subscribe")
        romeo.send(f"<presence type='subscribed' to='{juliet_name}@{HOST}'/>")
        await juliet.until(f"{romeo_name}@{HOST}/r")
        juliet.written = ""
        nodes.databases["b"].before = lambda: asyncio.sleep(0.2)
        await nodes.kill("a")
        juliet.send(f"<presence type='probe' to='{romeo_name}@{HOST}'/>")
        juliet.say(f"{juliet_name}@{HOST}/r", 1)
        await juliet.until("<body>1</body>")
        await juliet.until(f"{romeo_name}@{HOST}/r")
        assert "unavailable" not in juliet.written
        await nodes.is_at("b", romeo_name)


async def test_what_is_for_a_session_in_between_waits_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when no other router is left that could have it."""
    monkeypatch.setattr(orphans, "GRACE", 0.5)
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        juliet = await nodes.client(at_home("juliet", ab="a"), "a")
        nurse = await nodes.client(at_home("nurse", ab="a"), "a")
        romeo = await left_behind(nodes, at_home("romeo", ab="a"))
        await nodes.kill("b")
        juliet.send(f"<iq type='get' id='q' to='{romeo}'>{QUERY}</iq>")
        juliet.send(f"<presence to='{romeo}'/>")
        juliet.say(f"{nurse.name}@{HOST}/r", 1)
        await nurse.until("<body>1</body>")
        assert not is_over(nodes, romeo)
        assert "<iq" not in juliet.written
        await juliet.until("service-unavailable")
        assert await nodes.rows(romeo.local) == []


def hangs(nodes: Nodes, name: str) -> None:
    """From now on a router deals with nothing that others send to it."""
    nodes.routers[name]._forwarder.incoming = lambda *_: None  # type: ignore[method-assign]


@pytest.mark.parametrize("strategy", ["home", "online-users", "broadcast"])
async def test_what_nobody_stores_waits_for_a_session_in_between_though_no_other_router_is_left(
    tmp_path: Path, strategy: str
) -> None:
    """RFC 6121 8.5.2.2.1: a headline is ignored where nobody is there. Drills, seed 28: the third router was just
    starting again, and what came back from the second one was decided about before it was known whose sessions that
    one had had."""
    async with running(tmp_path, "a", "b", strategy=strategy) as nodes:
        await nodes.up("a", "b")
        romeo = await nodes.client(at_home("romeo", ab="a"), "a")
        juliet = await nodes.client(at_home("juliet", ab="b"), "b")
        await nodes.is_at("b", juliet.name)
        hangs(nodes, "b")
        link = nodes.routers["a"]._links._outgoing["b"]
        romeo.say(f"{juliet.name}@{HOST}", 1, "headline")
        await soon(lambda: bool(link._later), "the other router has it")
        await nodes.kill("b")
        await juliet.until("<body>1</body>")


async def test_what_one_of_two_devices_has_had_waits_for_the_other_one_though_no_other_router_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its router had taken it and died: it is the other device's too (RFC 6121 8.5.2.1.1)."""
    async with running(tmp_path, "a", "b", strategy="broadcast") as nodes:
        await nodes.up("a", "b")
        romeo, juliet = await nodes.client("romeo", "a"), await nodes.client("juliet", "b")
        nodes.prefers = "a"
        second = Client(nodes, juliet.name, "s")
        await second.log_in()
        there = nodes.routers["b"].routing
        monkeypatch.setattr(there.deliveries, "to_session", lambda *_: None)
        monkeypatch.setattr(there._at_account._passing, "when_passed", lambda *_: None)
        link = nodes.routers["a"]._links._outgoing["b"]
        romeo.say(f"{juliet.name}@{HOST}", 1, "headline")
        await soon(lambda: bool(link._unsafe), "the other router has taken it")
        await second.until("<body>1</body>")
        await nodes.kill("b")
        await juliet.until("<body>1</body>")
        await second.answered()
        assert (juliet.numbers(), second.numbers()) == ([1], [1])
