"""Sessions whose router has died go on at another one, from the copies of their connector (DESIGN 9)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from services.connector.router_link import RouterLink
from services.connector.session_copy import SessionCopy
from services.router import first_presence
from services.router.store import SessionRow
from tests.unit.router.nodes import HOST, Client, Nodes, at_home, running, soon
from tests.unit.router.unsure_database import at_once, away
from tidings.api.router.v1.router_pb2 import SessionAttach
from tidings.xmpp.jid import Jid

SM = "urn:xmpp:sm:3"
QUERY = "<query xmlns='jabber:iq:version'/>"


@asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[tuple[Nodes, Client, Client]]:
    """Romeo, at home at router a, and Juliet, at home at b."""
    async with running(folder, "a", "b") as nodes:
        await nodes.up("a", "b")
        yield (
            nodes,
            await nodes.client(at_home("romeo", ab="a"), "a"),
            await nodes.client(at_home("juliet", ab="b"), "b"),
        )


async def killed(nodes: Nodes, name: str, *clients: Client) -> None:
    for client in clients:
        client.written = ""
    await nodes.kill(name)


async def enabled(client: Client) -> str:
    """The client may resume; by what it names its session then."""
    client.send(f"<enable xmlns='{SM}' resume='true'/>")
    await client.until("<enabled")
    return str(re.findall("<enabled[^>]* id=[\"']([^\"']+)", client.written)[0])


async def resumed(nodes: Nodes, client: Client, previous: str, h: int) -> Client:
    """The client comes back with another stream, and has had so much."""
    again = Client(nodes, client.name)
    await again.open("<mechanisms")
    await again.authenticate()
    await again.open("<bind")
    again.send(f"<resume xmlns='{SM}' previd='{previous}' h='{h}'/>")
    await again.until("<resumed")
    return again


async def left(nodes: Nodes, juliet: Client) -> None:
    juliet.disconnect()
    await soon(lambda: nodes.session("b", juliet.name) is None, "she is gone")


async def bound(nodes: Nodes, client: Client, manages: bool) -> Client:
    """Logs in once more, and sends no presence."""
    nodes.prefers = "b"
    again = Client(nodes, client.name)
    await again.come_silently()
    if manages:
        await enabled(again)
    await again.answered()
    return again


def h_of(client: Client) -> list[int]:
    return [int(h) for h in re.findall("<a xmlns='urn:xmpp:sm:3' h='([0-9]+)'/>", client.written)]


@pytest.mark.parametrize("manages", [True, False], ids=["0198", "plain"])
async def test_a_session_goes_on_when_its_router_has_died(tmp_path: Path, manages: bool) -> None:
    """Its client notices a pause, and nobody else anything: not its contacts, who see no presence."""
    async with pair(tmp_path) as (nodes, romeo, juliet):
        await nodes.is_at("a", romeo.name)
        await nodes.is_at("b", juliet.name)
        for one, other in ((romeo, juliet), (juliet, romeo)):
            one.send(f"<presence to='{other.name}@{HOST}/r'/>")
        await romeo.until(f"{juliet.name}@{HOST}/r")
        await juliet.until(f"{romeo.name}@{HOST}/r")
        if manages:
            romeo.send(f"<enable xmlns='{SM}' resume='true'/>")
            await romeo.until("<enabled")
        romeo.say(f"{juliet.name}@{HOST}/r", 1)
        juliet.say(f"{romeo.name}@{HOST}", 2)
        await juliet.until("<body>1</body>")
        await romeo.until("<body>2</body>")
        await killed(nodes, "a", romeo, juliet)
        romeo.say(f"{juliet.name}@{HOST}/r", 3)
        await nodes.is_at("b", romeo.name)
        await juliet.until("<body>3</body>")
        juliet.say(f"{romeo.name}@{HOST}/r", 4)
        await romeo.until("<body>4</body>")
        assert not romeo.closed
        assert (romeo.numbers(), juliet.numbers()) == ([4], [3])
        assert "<presence" not in juliet.written
        ((row),) = await nodes.rows(romeo.name)
        assert (row.router, row.epoch) == ("b", 2)
        if manages:
            romeo.send(f"<r xmlns='{SM}'/>")
            await soon(lambda: 2 in h_of(romeo), "its two messages are acknowledged")
            assert h_of(romeo) == sorted(h_of(romeo)), "what was acknowledged stays it"


async def test_what_a_client_sent_and_its_dead_router_may_not_have_passed_on_is_passed_on_once(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (nodes, romeo, juliet):
        romeo.send(f"<enable xmlns='{SM}' resume='true'/>")
        await romeo.until("<enabled")
        for number in range(1, 51):
            romeo.say(f"{juliet.name}@{HOST}{'/r' if number % 2 else ''}", number)
            if number == 25:
                await juliet.until("<body>3</body>")
        juliet_had = juliet.numbers()
        await nodes.kill("a")
        await juliet.until("<body>50</body>")
        assert juliet.numbers() == list(range(1, 51)), f"it had {juliet_had}"
        romeo.send(f"<r xmlns='{SM}'/>")
        await soon(lambda: h_of(romeo)[-1:] == [50], "all are acknowledged")


async def test_a_message_that_has_come_back_is_not_passed_on_by_the_next_router(tmp_path: Path) -> None:
    """An earlier one is not safe yet, so the connector's copy has both when the router dies."""
    async with pair(tmp_path) as (nodes, romeo, juliet):
        absent = await nodes.client(at_home("mercutio", ab="a"), "a")
        absent.disconnect()
        await soon(lambda: nodes.session("a", absent.name) is None, "he is gone")
        await enabled(romeo)
        nodes.databases["b"].before = away
        romeo.say(f"{juliet.name}@{HOST}/r", 1)
        await juliet.until("<body>1</body>")
        nodes.databases["a"].before = nodes.databases["a"].reading = away
        romeo.say(f"{absent.name}@{HOST}", 2)
        await romeo.until("resource-constraint")
        assert h_of(romeo) == []
        nodes.databases["b"].before = at_once
        await killed(nodes, "a", romeo, juliet)
        await nodes.is_at("b", romeo.name)
        romeo.send(f"<r xmlns='{SM}'/>")
        await soon(lambda: h_of(romeo)[-1:] == [2], "both are dealt with")
        await nodes.waiting(absent.name, 0)
        assert "resource-constraint" not in romeo.written, "nor does it come back again"


async def test_what_a_dead_router_had_stored_and_not_delivered_comes_first(tmp_path: Path) -> None:
    """Juliet's router dies while Romeo writes; each message comes once, in order."""
    async with pair(tmp_path) as (nodes, romeo, juliet):
        for number in range(1, 41):
            romeo.say(f"{juliet.name}@{HOST}{'/r' if number % 2 else ''}", number)
            if number == 20:
                await juliet.until("<body>3</body>")
        await nodes.kill("b")
        for number in range(41, 61):
            romeo.say(f"{juliet.name}@{HOST}{'/r' if number % 2 else ''}", number)
        await juliet.until("<body>60</body>")
        assert juliet.numbers() == list(range(1, 61))


@pytest.mark.parametrize("manages", [True, False], ids=["0198", "plain"])
async def test_who_has_sent_no_presence_when_its_router_dies_gets_what_was_stored_before_what_is_for_it_alone(
    tmp_path: Path, manages: bool
) -> None:
    """As with a router that lives. Log-ins under fire, on a slow machine: hundreds of messages out of order."""
    async with pair(tmp_path) as (nodes, romeo, juliet):
        await left(nodes, juliet)
        for number in (1, 2):
            romeo.say(f"{juliet.name}@{HOST}", number)
        await nodes.waiting(juliet.name, 2)
        again = await bound(nodes, juliet, manages)
        romeo.say(f"{juliet.name}@{HOST}/r", 3)
        await nodes.waiting(juliet.name, 3)
        await nodes.kill("b")
        await nodes.is_at("a", juliet.name)
        romeo.say(f"{juliet.name}@{HOST}/r", 4)
        await romeo.answered()
        again.send("<presence/>")
        await again.until("<body>4</body>")
        assert again.numbers() == [1, 2, 3, 4]


async def test_who_sends_no_presence_at_all_gets_what_is_for_it_alone_though_its_router_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_presence, "FIRST_PRESENCE", 0.3)
    async with pair(tmp_path) as (nodes, romeo, juliet):
        await left(nodes, juliet)
        again = await bound(nodes, juliet, False)
        romeo.say(f"{juliet.name}@{HOST}/r", 1)
        await nodes.waiting(juliet.name, 1)
        await nodes.kill("b")
        await nodes.is_at("a", juliet.name)
        romeo.say(f"{juliet.name}@{HOST}/r", 2)
        await again.until("<body>2</body>")
        assert again.numbers() == [1, 2]


async def test_who_leaves_as_soon_as_it_may_resume_has_a_copy_that_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        romeo = await nodes.client("romeo", "a")
        waits: list[bool] = []

        def write(data: bytes) -> None:
            if b"<enabled" in data:
                waits.append(romeo.stream.copy is not None and romeo.stream.copy.resumable)

        monkeypatch.setattr(romeo, "write", write)
        romeo.send(f"<enable xmlns='{SM}' resume='true'/>")
        await soon(lambda: waits == [True], "its copy knows")


async def test_a_router_that_another_one_can_not_reach_ends_its_session_when_that_one_has_it(tmp_path: Path) -> None:
    """Both live, and have the connector. A row that the first one removes before could not be taken over."""
    async with running(tmp_path, "a", "b", strategy="broadcast") as nodes:
        await nodes.up("a", "b")
        romeo = await nodes.client("romeo", "a")
        previous = await enabled(romeo)
        romeo.disconnect()
        await soon(lambda: nodes.session("a", "romeo").waits is not None, "it waits")  # type: ignore[union-attr]

        async def cut(_router: str, _seconds: float) -> bool:
            return False

        changed = asyncio.Event()

        async def behind() -> None:
            changed.set()

        async def slow() -> None:
            """Until the other router has changed something, or does not."""
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), 0.3)

        nodes.routers["b"]._negotiator.resumption.answers = cut
        nodes.databases["a"].behind, nodes.databases["b"].before = behind, slow
        nodes.prefers = "b"
        again = await resumed(nodes, romeo, previous, h=0)
        await nodes.is_at("b", "romeo")
        assert not again.closed


async def test_a_session_that_waits_for_its_client_goes_on_waiting_elsewhere(tmp_path: Path) -> None:
    async with pair(tmp_path) as (nodes, romeo, juliet):
        previous = await enabled(romeo)
        juliet.say(f"{romeo.name}@{HOST}/r", 1)
        await romeo.until("<body>1</body>")
        romeo.disconnect()
        await soon(lambda: nodes.session("a", romeo.name).waits is not None, "it waits")  # type: ignore[union-attr]
        juliet.say(f"{romeo.name}@{HOST}/r", 2)
        await soon(lambda: len(nodes.session("a", romeo.name).outbound.queue) == 2, "it gets more")  # type: ignore[union-attr]
        await killed(nodes, "a", juliet)
        await nodes.is_at("b", romeo.name)
        juliet.say(f"{romeo.name}@{HOST}/r", 3)
        again = await resumed(nodes, romeo, previous, h=1)
        await again.until("<body>3</body>")
        assert again.numbers() == [2, 3]
        assert "<presence" not in juliet.written


async def test_a_copy_that_is_brought_twice_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drills, seed 27: its connector had missed its router, and was asked for it at the same moment. The second time
    counted as a repetition, so the row was right; the session of the first time was ended, and the row with it."""
    async with pair(tmp_path) as (nodes, romeo, _):
        previous = await enabled(romeo)
        romeo.disconnect()
        copies = nodes.streams.copies
        await soon(lambda: len(copies) == 1, "its copy is kept")
        attach, brought = copies._attach, list[str]()

        def twice(link: RouterLink, session: str, copy: SessionCopy, moves: int) -> None:
            attach(link, session, copy, moves)
            attach(link, session, copy, moves)
            brought.append(session)

        reattachment = nodes.routers["b"]._negotiator.reattachment
        read, rows = reattachment._row, list[SessionRow | None]()

        async def row_of(jid: Jid, brought: SessionAttach) -> SessionRow | None:
            """As it was before the first one was taken, if both may ask for it by then."""
            rows.append(await read(jid, brought))
            row, second = rows[-1], len(rows) == 2
            with suppress(AssertionError):
                await soon(lambda: len(rows) == 2, "both have asked", timeout=0.3)
            if second:
                await soon(lambda: nodes.session("b", romeo.name) is not None, "the first one is taken")
            return row

        monkeypatch.setattr(copies, "_attach", twice)
        monkeypatch.setattr(reattachment, "_row", row_of)
        await nodes.kill("a")
        await soon(lambda: brought == [previous] and len(rows) == 2, "it is brought, and answered")
        await nodes.is_at("b", romeo.name)
        again = await resumed(nodes, romeo, previous, 0)
        ((row),) = await nodes.rows(romeo.name)
        assert (row.session, row.router, row.epoch) == (previous, "b", 2)
        assert not again.closed


async def test_what_was_confirmed_before_a_copy_began_and_is_not_written_is_neither_given_again_nor_waits(
    tmp_path: Path,
) -> None:
    """Juliet confirms two messages when she resumes; her router dies before the database is told."""
    async with pair(tmp_path) as (nodes, romeo, juliet):
        previous = await enabled(juliet)
        for number in (1, 2):
            romeo.say(f"{juliet.name}@{HOST}/r", number)
        await juliet.until("<body>2</body>")
        await nodes.waiting(juliet.name, 2)
        nodes.databases["b"].before = away
        nodes.prefers = "b"
        juliet.disconnect()
        again = await resumed(nodes, juliet, previous, h=2)
        await nodes.kill("b")
        await nodes.is_at("a", juliet.name)
        await nodes.waiting(juliet.name, 0)
        romeo.say(f"{juliet.name}@{HOST}/r", 3)
        await again.until("<body>3</body>")
        assert again.numbers() == [3]


@pytest.mark.parametrize("strategy", ["home", "online-users", "broadcast"])
async def test_what_is_for_a_session_that_is_just_being_taken_over_waits_for_it(
    tmp_path: Path, strategy: str
) -> None:
    """The table says already where it is; another router, or that one itself, finds it there."""
    async with running(tmp_path, "a", "b", "c", strategy=strategy) as nodes:
        await nodes.up("a", "b", "c")
        romeo = await nodes.client(at_home("romeo", abc="a", ac="a"), "a")
        juliet = await nodes.client(at_home("juliet", abc="b", ac="c"), "b")
        arrived = nodes.late("c")
        nodes.prefers = "c"
        await nodes.kill("b")
        await nodes.moves(juliet.name, "c")
        assert nodes.session("c", juliet.name) is None
        romeo.send(f"<iq type='get' id='q' to='{juliet.name}@{HOST}/r'>{QUERY}</iq>")
        await soon(lambda: nodes.is_waited_for("c", juliet.name) or "<iq" in romeo.written, "it waits")
        assert "<iq" not in romeo.written, "it is not refused"
        arrived.set()
        await juliet.until("jabber:iq:version")
        assert "<iq" not in romeo.written


async def test_a_copy_that_has_grown_old_is_refused(tmp_path: Path) -> None:
    """A connector that was cut off brings a session that has gone on elsewhere since: the epoch tells."""
    async with pair(tmp_path) as (nodes, romeo, _):
        session = nodes.session("a", romeo.name)
        assert session is not None
        await nodes.table.move((await nodes.rows(romeo.name))[0], "elsewhere")
        await killed(nodes, "a", romeo)
        await soon(lambda: romeo.closed, "its stream is closed")
        assert "system-shutdown" in romeo.written
        assert (await nodes.rows(romeo.name))[0].router == "elsewhere"
