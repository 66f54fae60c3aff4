"""What becomes of a hand-over whose outcome is not known at first: one router has the session, and its row says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from services.router import adoption, hand_over, peers, stranded
from services.router.hand_over import HandOver
from services.router.sessions import Session
from tests.unit.router.nodes import DRAINING, UP, Client, Nodes, at_home, running, soon
from tests.unit.router.unsure_database import at_once, away
from tidings.xmpp import ns


def once(then: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """Something that happens the first time only."""
    left = [then]

    async def happen() -> None:
        if left:
            await left.pop()()

    return happen


async def moving(nodes: Nodes) -> tuple[Client, Client]:
    """A session that is to go from router a to b as soon as b is up, and one at a that stays."""
    await nodes.up("a")
    juliet = await nodes.client(at_home("juliet", ab="b"))
    romeo = await nodes.client(at_home("romeo", ab="a"))
    return juliet, romeo


async def is_whole(nodes: Nodes, at: str, juliet: Client, romeo: Client, epoch: int) -> None:
    """The session is at one router, under this epoch at least, its row says so, and it gets and sends messages."""
    await nodes.is_at(at, juliet.name)
    (row,) = await nodes.rows(juliet.name)
    session = nodes.session(at, juliet.name)
    assert session is not None
    assert (row.router, row.epoch) == (at, session.epoch)
    assert row.epoch >= epoch
    romeo.say(f"{juliet.name}@example.org/r", 1)
    await soon(lambda: juliet.numbers() == [1], "a message for the session")
    juliet.say(f"{romeo.name}@example.org/r", 2)
    await soon(lambda: 2 in romeo.numbers(), "a message of the session")


async def test_an_adoption_that_was_committed_unknown_to_all_is_found_done(tmp_path: Path) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        clients = await moving(nodes)
        nodes.databases["b"].behind = once(away)
        nodes.tell(a=UP, b=UP)
        await is_whole(nodes, "b", *clients, epoch=2)


async def test_a_session_is_taken_back_from_a_router_that_died_as_it_had_adopted_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came to that one for the session is stored, and goes before what comes now."""
    monkeypatch.setattr(stranded, "WRITTEN", 0.02)
    async with running(tmp_path, "a", "b") as nodes:
        juliet, romeo = await moving(nodes)
        nodes.late("b")
        nodes.tell(a=UP, b=UP)
        await nodes.moves(juliet.name, "b")
        await nodes.kill("b")
        await is_whole(nodes, "a", juliet, romeo, epoch=3)
        assert not juliet.closed


async def test_an_adoption_that_did_not_happen_leaves_the_session_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_over, "RETRY", 0.05)
    async with running(tmp_path, "a", "b") as nodes:
        juliet, romeo = await moving(nodes)
        nodes.databases["b"].before = away
        nodes.tell(a=UP, b=UP)
        await soon(lambda: nodes.session("a", juliet.name).epoch >= 3, "it has been tried twice")  # type: ignore[union-attr]
        romeo.say(f"{juliet.name}@example.org", 7)
        await soon(lambda: juliet.numbers() == [7], "a message between two tries")
        assert nodes.session("b", juliet.name) is None
        (row,) = await nodes.rows(juliet.name)
        assert row.router == "a"
        nodes.databases["b"].before = at_once
        await nodes.is_at("b", juliet.name)
        assert not juliet.closed


@pytest.mark.parametrize("where", ["before", "behind"])
async def test_an_adoption_that_comes_late_happens_once_or_not_at_all(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its commit: the giver has taken the row itself by then. Behind it: the giver asks again."""
    monkeypatch.setattr(peers, "ADOPT_TIMEOUT", 0.1)
    monkeypatch.setattr(hand_over, "RETRY", 0.2)
    async with running(tmp_path, "a", "b") as nodes:
        clients = await moving(nodes)
        setattr(nodes.databases["b"], where, once(lambda: asyncio.sleep(0.3)))
        nodes.tell(a=UP, b=UP)
        # At the first try the giver has kept it, and at the next one the other router gets it; or it has it at once.
        await is_whole(nodes, "b", *clients, epoch=3 if where == "before" else 2)


async def test_while_the_database_is_away_no_session_is_made_to_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_over, "RETRY", 0.05)
    async with running(tmp_path, "a", "b") as nodes:
        juliet, romeo = await moving(nodes)
        own = nodes.databases["a"]
        own.reading = away
        nodes.tell(a=UP, b=UP)
        for number in range(1, 6):
            romeo.say(f"{juliet.name}@example.org/r", number)
            await soon(lambda number=number: number in juliet.numbers(), "a message")  # type: ignore[misc]
        session = nodes.session("a", juliet.name)
        assert session is not None
        assert session.frozen is None
        own.reading = at_once
        await nodes.is_at("b", juliet.name)


async def test_a_session_whose_row_somebody_else_has_taken_ends(tmp_path: Path) -> None:
    """Whoever is refused closes its stream: two routers must not both have one session."""
    async with running(tmp_path, "a", "b") as nodes:
        juliet, _ = await moving(nodes)
        (row,) = await nodes.rows(juliet.name)
        assert await nodes.table.move(row, "somebody else")
        nodes.tell(a=UP, b=UP)
        await soon(lambda: juliet.closed, "the stream is closed")
        assert "<system-shutdown" in juliet.written
        assert nodes.session("a", juliet.name) is nodes.session("b", juliet.name) is None
        assert [row.router for row in await nodes.rows(juliet.name)] == ["somebody else"]


# --- the end of a session that is on its way ---


async def test_who_leaves_during_a_move_has_left_when_it_is_over(tmp_path: Path) -> None:
    """What the client has sent before counts; who sees it is told at once; what it did not get is stored."""
    async with running(tmp_path, "a", "b") as nodes:
        juliet, romeo = await moving(nodes)
        romeo.send(f"<presence to='{juliet.name}@example.org/r'/>")
        juliet.send(f"<presence to='{romeo.name}@example.org/r'/>")
        await soon(lambda: juliet.name in romeo.written, "directed presence")
        nodes.latency = 0.1
        nodes.tell(a=UP, b=UP)
        await soon(lambda: nodes.session("b", juliet.name) is not None, "it is adopted")
        juliet.say(f"{romeo.name}@example.org/r", 5)
        juliet.disconnect()
        romeo.say(f"{juliet.name}@example.org", 6)
        romeo.say(f"{juliet.name}@example.org/r", 7)
        await soon(lambda: "unavailable" in romeo.written, "romeo is told", 2)
        assert romeo.numbers() == [5]
        assert romeo.written.count("unavailable") == 1
        assert nodes.session("a", juliet.name) is nodes.session("b", juliet.name) is None
        assert await nodes.rows(juliet.name) == []
        again = Client(nodes, juliet.name)
        await again.log_in()
        await soon(lambda: sorted(again.numbers()) == [6, 7], "what was stored")


async def test_who_loses_the_connection_during_a_move_may_resume_behind_it(tmp_path: Path) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        juliet, romeo = await moving(nodes)
        juliet.send(f"<enable xmlns='{ns.SM}' resume='true'/>")
        await soon(lambda: "<enabled" in juliet.written, "stream management")
        nodes.latency = 0.1
        nodes.tell(a=UP, b=UP)
        await soon(lambda: nodes.session("b", juliet.name) is not None, "it is adopted")
        juliet.disconnect()
        romeo.say(f"{juliet.name}@example.org/r", 6)
        await nodes.is_at("b", juliet.name)
        session = nodes.session("b", juliet.name)
        assert session is not None
        await soon(lambda: session.waits is not None and len(session.outbound.queue) > 0, "it waits for its client")
        assert "unavailable" not in romeo.written


async def try_to_move(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, on: Callable[[HandOver], object], step: str
) -> int:
    """A session is to go from a to b, and its client comes back with another stream while a step of that is under way;
    `on` names who takes that step. The move does not come about. The number of the stream that it had."""
    juliet, _ = await moving(nodes)
    session = nodes.session("a", juliet.name)
    assert session is not None
    hand_over, number = nodes.routers["a"]._hand_over, session.stream

    async def resumed_meanwhile(*_: object) -> bool:
        session.stream = number + 5
        return True

    monkeypatch.setattr(on(hand_over), step, resumed_meanwhile)
    assert not await hand_over._try(session, nodes.members["b"].node, session.link)
    session.stream = number
    return number


async def test_a_stream_whose_session_has_gone_on_with_another_one_is_told_that_the_move_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that other stream, or one of that number."""
    told: list[int] = []
    monkeypatch.setattr(HandOver, "_stay", lambda _self, _session, _link, stream: told.append(stream))
    async with running(tmp_path, "a", "b") as nodes:
        number = await try_to_move(nodes, monkeypatch, lambda hand_over: hand_over, "_is_still")
        assert told == [number]


async def test_a_stream_that_its_session_got_while_the_database_was_asked_is_not_made_to_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would tell that one that the move is off."""
    asked: list[Session] = []

    async def is_still(_self: HandOver, session: Session, _link: object) -> bool:
        asked.append(session)
        return False

    monkeypatch.setattr(HandOver, "_is_still", is_still)
    async with running(tmp_path, "a", "b") as nodes:
        await try_to_move(nodes, monkeypatch, lambda hand_over: hand_over._binding, "is_reachable")
        assert asked == []


async def test_what_waits_for_a_session_that_nobody_attaches_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "ATTACH_TIMEOUT", 0.2)
    async with running(tmp_path, "a", "b") as nodes:
        juliet, romeo = await moving(nodes)
        nodes.streams.remove(juliet.stream, "the connector has forgotten it")
        session = nodes.session("a", juliet.name)
        assert session is not None
        nodes.tell(a=UP, b=UP)
        await soon(lambda: session.id in nodes.routers["a"]._hand_over._asked, "the connector is asked")
        # In its place, for it does not know the stream any more.
        nodes.routers["a"]._hand_over.ready(session, nodes.routers["a"]._hand_over._questions)
        await soon(lambda: nodes.session("b", juliet.name) is not None, "it is adopted")
        for number in range(3):
            romeo.say(f"{juliet.name}@example.org", number)
        await soon(lambda: nodes.session("b", juliet.name) is None, "it is given up")
        again = Client(nodes, juliet.name)
        await again.log_in()
        await soon(lambda: again.numbers() == [0, 1, 2], "what was stored, in order")


@pytest.mark.parametrize("strategy", ["home", "online-users", "broadcast"])
async def test_what_is_for_a_session_that_is_just_being_adopted_waits_for_it(tmp_path: Path, strategy: str) -> None:
    """The router that gives it has died, so that the other one has it as soon as the table says so."""
    async with running(tmp_path, "a", "b", "c", strategy=strategy) as nodes:
        await nodes.up("a", "b", "c")
        romeo = await nodes.client(at_home("romeo", abc="a", ac="a"), "a")
        juliet = await nodes.client(at_home("juliet", abc="b", ac="c"), "b")
        arrived = nodes.late("c")
        nodes.tell(a=UP, b=DRAINING, c=UP)
        nodes.tasks.spawn(nodes.routers["b"].drain(), "drain")
        await nodes.moves(juliet.name, "c")
        await nodes.kill("b")
        romeo.send(f"<iq type='get' id='q' to='{juliet.name}@example.org/r'><query xmlns='jabber:iq:version'/></iq>")
        await soon(lambda: nodes.is_waited_for("c", juliet.name) or "<iq" in romeo.written, "it waits")
        assert "<iq" not in romeo.written, "it is not refused"
        arrived.set()
        await soon(lambda: nodes.session("c", juliet.name) is not None, "the session comes")
        session = nodes.session("c", juliet.name)
        assert session is not None
        await soon(lambda: [one.id for one in session.early or ()] == ["q"], "it has the request")
