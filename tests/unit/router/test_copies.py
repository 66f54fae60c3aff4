"""Which connector holds the copy of a session, and what becomes of what waits for it (services/router/copies.py)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from services.router import copies
from services.router.copies import Copies
from services.router.iq_deadlines import IqDeadlines
from services.router.sessions import Session, Sessions, when_all_have_it, when_copied
from services.router.tickets import Tickets
from tests.unit.router.nodes import soon
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.tasks import Tasks
from tidings.xmpp.jid import Jid

OWN = "router on a"


class Link:
    """A connector, as the router sees it: `confirm` says that it has all that it was sent."""

    local = False

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.over = False
        self.handling: object | None = object()
        self.held: list[Session] = []
        self.forgotten: list[Session] = []
        self._waiting: deque[Callable[[], None]] = deque()

    def hold(self, session: Session) -> None:
        session.holder = self  # type: ignore[assignment]
        self.held.append(session)

    def forget(self, session: Session) -> None:
        self.forgotten.append(session)

    def when_copied(self, then: Callable[[], None]) -> None:
        self._waiting.append(then)

    def tell_progress(self) -> None:
        """What it is told is of no matter here: `when_copied` stands for it."""

    def confirm(self) -> None:
        while self._waiting:
            self._waiting.popleft()()

    def end(self) -> None:
        self.over, self.handling = True, None
        self.confirm()


class House:
    """One router's copies, with connectors on three hosts; the router is on the first."""

    def __init__(self, tasks: Tasks) -> None:
        nodes = [Node(OWN, OWN, "127.0.0.1", 1, ("router",), NodeState.UP, host="a")]
        nodes += [Node(name, name, "127.0.0.1", 1, ("connector",), NodeState.UP, host=name) for name in "abc"]
        view = ClusterView(1, nodes)
        self.here, self.b, self.c = Link("a"), Link("b"), Link("c")
        self.present = [self.here, self.b, self.c]
        self.raised: list[Session] = []
        deadlines = IqDeadlines(Sessions, lambda _session, _envelope: None)
        self.copies = Copies(OWN, Tickets(), deadlines, lambda: view, tasks.spawn)
        self.copies.links = lambda: self.present  # type: ignore[assignment,return-value]
        self.copies.old.keep = self._raise
        self.sessions = Sessions()

    async def _raise(self, session: Session) -> bool:
        self.raised.append(session)
        return True

    def session(self, link: Link) -> Session:
        """One that may be resumed, and whose stream is at a connector."""
        session = Session(Jid.parse("romeo@example.org/r"), "en", link, 1, lambda _work, _name: None)  # type: ignore[arg-type]
        session.resume_seconds = 300
        self.sessions.add(session)
        self.copies.served(session, link)  # type: ignore[arg-type]
        return session

    async def look_until(self, condition: Callable[[], bool], what: str) -> None:
        """The router looks after the holders of its sessions until something is so."""
        running: asyncio.Task[Any] = asyncio.ensure_future(self.copies.run(self.sessions))
        await soon(condition, what)
        running.cancel()

    def others(self, session: Session) -> tuple[Link, Link]:
        """Who holds the copy, and who of the other two hosts does not."""
        return (self.b, self.c) if session.holder is self.b else (self.c, self.b)  # type: ignore[comparison-overlap]


async def test_a_holder_that_says_nothing_is_replaced_and_what_has_waited_goes_on_behind_the_next_one(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "LOOK", 0.01)
    monkeypatch.setattr(copies, "SILENT", 0.5)
    session = house.session(house.here)
    silent, other = house.others(session)
    gone_on: list[int] = []
    for number in (1, 2):
        when_copied(session, silent, lambda number=number: gone_on.append(number))  # type: ignore[arg-type,misc]
    await house.look_until(lambda: session.holder is other, "the other one holds it")
    assert (silent.forgotten, other.held) == ([session], [session])
    assert gone_on == [], "the next one does not have it yet"
    await soon(lambda: session in house.raised, "its copy counts no more")
    silent.confirm()
    assert gone_on == [], "that one's word counts no more"
    other.confirm()
    assert gone_on == [1, 2]


async def test_a_holder_that_has_taken_the_place_of_a_silent_one_is_given_more_time(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drills, seed 0, on a machine with too much to do: each was replaced before it could have the whole copy."""
    monkeypatch.setattr(copies, "LOOK", 0.01)
    monkeypatch.setattr(copies, "SILENT", 0.2)
    monkeypatch.setattr(copies, "ALONE", 60.0)
    session = house.session(house.here)
    one, other = house.others(session)
    gone_on: list[float] = []
    when_copied(session, one, lambda: gone_on.append(time.monotonic()))  # type: ignore[arg-type]
    running: asyncio.Task[Any] = asyncio.ensure_future(house.copies.run(house.sessions))
    times: list[float] = []
    for holder in (other, one, other):
        await soon(lambda holder=holder: session.holder is holder, "another one holds it")  # type: ignore[misc]
        times.append(time.monotonic())
    assert times[1] - times[0] > 0.3
    assert times[2] - times[1] > 0.7
    other.confirm()
    assert gone_on
    await soon(lambda: not house.copies._replaced, "all is well again")
    running.cancel()


async def test_when_nobody_else_is_there_what_has_waited_goes_on(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "LOOK", 0.01)
    monkeypatch.setattr(copies, "SILENT", 0.1)
    monkeypatch.setattr(copies, "ALONE", 0.5)
    house.present.remove(house.c)
    session = house.session(house.here)
    assert session.holder is house.b  # type: ignore[comparison-overlap]
    gone_on: list[int] = []
    began = time.monotonic()
    when_copied(session, house.b, lambda: gone_on.append(1))  # type: ignore[arg-type]
    await house.look_until(lambda: gone_on == [1], "it goes on")
    assert time.monotonic() - began > 0.5, "one that is late is better than none"


async def test_no_holder_is_blamed_for_the_time_in_which_the_router_stood_still(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drills, seed 152: a router that woke let go of the copies that it was about to need."""
    monkeypatch.setattr(copies, "LOOK", 0.05)
    monkeypatch.setattr(copies, "SILENT", 0.5)
    session = house.session(house.here)
    holder, _other = house.others(session)
    gone_on: list[int] = []
    when_copied(session, holder, lambda: gone_on.append(1))  # type: ignore[arg-type]
    running: asyncio.Task[Any] = asyncio.ensure_future(house.copies.run(house.sessions))
    await asyncio.sleep(0)
    began = time.monotonic()
    while time.monotonic() < began + 1.2:
        pass  # it stands still
    asyncio.get_running_loop().call_later(0.2, holder.confirm)
    await soon(lambda: gone_on == [1], "it goes on")
    running.cancel()
    assert (session.holder, holder.forgotten) == (holder, [])


async def test_the_connector_of_the_stream_is_never_asked_to_hold_the_copy_as_another_one(house: House) -> None:
    """It would take what the client has sent, and what is copied to it, for something to be written to the client."""
    house.present = [house.here]
    session = house.session(house.here)
    assert session.holder is house.here, "it has a copy in any case"  # type: ignore[comparison-overlap]
    house.copies.cover(session)
    assert house.here.held == []


async def test_a_silent_holder_is_replaced_also_when_its_session_has_no_stream(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored nowhere is safe in that copy only."""
    monkeypatch.setattr(copies, "LOOK", 0.01)
    monkeypatch.setattr(copies, "SILENT", 0.1)
    session = house.session(house.here)
    silent, other = house.others(session)
    session.link = None
    safe: list[bool] = []
    when_all_have_it(session, safe.append)
    await house.look_until(lambda: session.holder is other, "the other one holds it")
    silent.confirm()
    assert safe == []
    other.confirm()
    assert safe == [True]
