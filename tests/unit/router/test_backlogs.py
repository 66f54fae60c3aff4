"""What waits for the database at one router comes to a session at another one before what is newer (RFC 6120 10.1)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from services.router import backlogs, forward_links, notes
from tests.unit.router.nodes import HOST, UP, Client, Nodes, running, soon
from tests.unit.router.unsure_database import UnsureDatabase, at_once, away
from tidings.xmpp.jid import Jid


async def way_of_messages(nodes: Nodes, router: str) -> UnsureDatabase:
    """What a router writes messages by, and nothing else, from now on."""
    way = nodes.databases[f"messages of {router}"] = nodes._database()
    await way.start()
    for writer in nodes.routers[router]._messages._writers:
        writer._database = way
    return way


async def with_a_backlog(nodes: Nodes, before: Callable[[], Awaitable[object]]) -> tuple[Client, Client]:
    """Romeo at a, and juliet at b, who has a message of his that b can't write yet (`before`: comes before each try),
    and a knows that."""
    romeo, juliet = await nodes.client("romeo", at="a"), await nodes.client("juliet", at="b")
    (await way_of_messages(nodes, "b")).before = before  # type: ignore[assignment]
    romeo.say(f"juliet@{HOST}/r", 0)
    await soon(lambda: juliet.numbers() == [0], "she gets it, and it waits to be written")
    await soon(lambda: nodes.routers["a"]._backlogs._behind == {"b"}, "the other router knows")
    return romeo, juliet


async def leaves(nodes: Nodes, client: Client, router: str) -> None:
    client.disconnect()
    await soon(lambda: nodes.session(router, client.name) is None, "it is seen that she has gone")


async def comes(nodes: Nodes, name: str, at: str) -> Client:
    nodes.prefers = at
    client = Client(nodes, name)
    await client.come()
    return client


def count_asked(nodes: Nodes, router: str) -> list[str]:
    """Grows each time that a router is asked for something that waits there."""
    asked: list[str] = []
    backlog = nodes.routers[router]._backlogs
    when_written = backlog._when_written

    async def noticed() -> bytes:
        asked.append(router)
        return await when_written()

    backlog._when_written = noticed  # type: ignore[method-assign]
    return asked


async def waits_for_a_backlog(nodes: Nodes) -> tuple[Client, asyncio.Event]:
    """Juliet, who has come again at a and waits there for what b has not written, and for whom there is a message more
    since; and what lets b write."""
    may_write = asyncio.Event()
    romeo, juliet = await with_a_backlog(nodes, may_write.wait)
    asked = count_asked(nodes, "b")
    await leaves(nodes, juliet, "b")
    again = await comes(nodes, "juliet", at="a")
    await soon(lambda: bool(asked), "it is asked for what it has for her")
    romeo.say(f"juliet@{HOST}/r", 1)
    return again, may_write


def is_present(nodes: Nodes, router: str, name: str) -> bool:
    session = nodes.session(router, name)
    return session is not None and session.presence is not None


@pytest.mark.parametrize("strategy", ["broadcast", "online-users"])
async def test_who_comes_reads_the_store_when_another_router_has_written_what_it_has_for_the_account(
    tmp_path: Path, strategy: str
) -> None:
    async with running(tmp_path, "a", "b", strategy=strategy) as nodes:
        await nodes.up("a", "b")
        again, may_write = await waits_for_a_backlog(nodes)
        await soon(lambda: is_present(nodes, "a", "juliet"), "she is there again")
        assert again.numbers() == []
        may_write.set()
        await soon(lambda: again.numbers() == [0, 1], "in order")
        await soon(lambda: not nodes.routers["a"]._backlogs._behind, "nothing waits any more")


async def test_who_comes_and_waits_is_not_given_what_others_have_stored_meanwhile(tmp_path: Path) -> None:
    """That a message waits for her is told by each router that has written one."""
    async with running(tmp_path, "a", "b", strategy="broadcast") as nodes:
        await nodes.up("a", "b")
        again, may_write = await waits_for_a_backlog(nodes)
        await nodes.waiting("juliet", 1)
        told = nodes.routers["a"].routing.notes._hooks.notes["offline"](Jid("juliet", HOST, ""), b"")
        assert told == b"", "she comes to it"
        assert again.numbers() == []
        may_write.set()
        await soon(lambda: again.numbers() == [0, 1], "in order")


async def test_who_comes_waits_as_long_as_the_other_router_says_that_it_has_not_come_to_it_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlogs, "PATIENCE", 0.05)
    monkeypatch.setattr(backlogs, "WITHIN", 0.4)
    async with running(tmp_path, "a", "b", strategy="online-users") as nodes:
        await nodes.up("a", "b")
        _romeo, juliet = await with_a_backlog(nodes, away)
        asked = count_asked(nodes, "b")
        await leaves(nodes, juliet, "b")
        again = await comes(nodes, "juliet", at="a")
        await soon(lambda: len(asked) > 1, "it is asked again")
        await again.answered()
        assert again.numbers() == []
        nodes.databases["messages of b"].before = at_once


async def test_who_comes_does_not_wait_for_long_for_a_router_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "KNOWN_TIMEOUT", 0.1)
    monkeypatch.setattr(backlogs, "WITHIN", 60.0)
    async with running(tmp_path, "a", "b", strategy="online-users") as nodes:
        await nodes.up("a", "b")
        await with_a_backlog(nodes, away)
        hangs = asyncio.Event()

        async def nothing() -> bytes:
            await hangs.wait()
            return b""

        nodes.routers["b"]._backlogs._when_written = nothing  # type: ignore[method-assign]
        again = await comes(nodes, "juliet", at="a")  # it is another session of hers that ends for it
        await again.answered()
        hangs.set()
        nodes.databases["messages of b"].before = at_once


async def test_who_comes_does_not_wait_for_what_is_for_others(tmp_path: Path) -> None:
    async with running(tmp_path, "a", "b", strategy="online-users") as nodes:
        await nodes.up("a", "b")
        may_write = asyncio.Event()
        romeo, _juliet = await with_a_backlog(nodes, may_write.wait)
        nurse = await nodes.client("nurse", at="a")
        romeo.say(f"nurse@{HOST}/r", 1)
        await soon(lambda: nurse.numbers() == [1], "at once")
        assert nodes.routers["a"]._backlogs._behind == {"b"}
        may_write.set()


async def test_a_router_that_comes_while_another_one_has_a_backlog_is_told_and_one_that_is_gone_has_none(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, "a", "b", strategy="broadcast") as nodes:
        await nodes.up("a", "b")
        await with_a_backlog(nodes, away)
        await nodes._start("c")
        nodes.tell(a=UP, b=UP, c=UP)
        await soon(lambda: nodes.routers["c"]._backlogs._behind == {"b"}, "c is told")
        nodes.databases["messages of b"].before = at_once
        await nodes.kill("b")
        assert not nodes.routers["a"]._backlogs._behind
        assert not nodes.routers["c"]._backlogs._behind


async def test_what_the_table_finds_a_place_for_waits_for_what_another_router_has_not_made_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when that was not so long for it to be a backlog, or for a doubt; and while this router's own messages
    wait."""
    monkeypatch.setattr(backlogs, "LONG", 60.0)
    monkeypatch.setattr(forward_links, "SLOW", 60.0)
    async with running(tmp_path, "a", "b", "c", strategy="online-users") as nodes:
        await nodes.up("a", "b", "c")
        romeo, juliet = await nodes.client("romeo", at="a"), await nodes.client("juliet", at="b")
        may_write, may_read = asyncio.Event(), asyncio.Event()
        (await way_of_messages(nodes, "b")).before = may_write.wait  # type: ignore[assignment]
        (await way_of_messages(nodes, "a")).before = away
        romeo.say(f"juliet@{HOST}/r", 0)
        await soon(lambda: juliet.numbers() == [0], "b has given it")
        await soon(lambda: nodes.routers["a"]._messages.away, "a can't write it into his archive")
        await leaves(nodes, juliet, "b")
        reads: list[bool] = []

        async def reading() -> None:
            reads.append(True)
            await may_read.wait()

        nodes.databases["a"].reading = reading
        romeo.say(f"juliet@{HOST}/r", 1)
        await soon(lambda: bool(reads), "a asks the table")
        again = await comes(nodes, "juliet", at="c")
        await again.until("<presence")
        await again.answered()  # she has read what is stored
        waits = nodes.looks_for_unsafe("a")
        may_read.set()
        await soon(lambda: bool(waits or again.numbers()), "a looks for what is not safe")
        may_write.set()
        await soon(lambda: again.numbers() == [0, 1], "in order")
        nodes.databases["messages of a"].before = at_once
