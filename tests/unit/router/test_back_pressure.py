"""What waits for the database, here or at another router, is bounded: who sends much is not read meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.router.messages_memory import MemoryMessageStore
from services.router.modules import rfc6121_presence, rfc6121_roster, xep_0160_offline
from services.router.sessions import Session
from tests.unit.router.memory_router import HOST, MemoryRouter, message, until
from tests.unit.router.nodes import at_home, running, soon
from tests.unit.router.unsure_database import at_once, away
from tidings.xmpp.jid import Jid

MODULES = (rfc6121_roster.MODULE, rfc6121_presence.MODULE, xep_0160_offline.MODULE)
LIMIT = 20_000
NURSE = Jid.parse(f"nurse@{HOST}")


@pytest.fixture
async def router() -> AsyncIterator[MemoryRouter]:
    made = MemoryRouter(modules=MODULES)
    made.safety._limit = LIMIT
    await made.stores.accounts.create(NURSE.domain, NURSE.local, {})
    yield made
    await made.stop()


def store(router: MemoryRouter) -> MemoryMessageStore:
    assert isinstance(router.stores.messages, MemoryMessageStore)
    return router.stores.messages


class Socket:
    """Whether a session's socket is read, as its lane says."""

    def __init__(self, session: Session) -> None:
        self.read = True
        session.lane.on_long = lambda: setattr(self, "read", False)
        session.lane.on_short = lambda: setattr(self, "read", True)


async def test_who_sends_much_is_not_read_while_too_much_waits_for_the_database(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    socket = Socket(romeo)
    store(router).away = True
    for number in range(60):
        envelope = message(str(number), str(juliet.jid))
        envelope.from_jid = romeo.jid_text
        assert router.safety.accept(romeo, envelope)
        romeo.lane.run(router.routing.from_session, romeo, envelope)
    assert not socket.read
    assert LIMIT < store(router).waiting_bytes < LIMIT * 1.2
    store(router).away = False
    await until(lambda: socket.read)
    assert router.link.bodies(juliet) == [str(number) for number in range(60)]


async def test_who_sends_little_is_read_all_the_same(router: MemoryRouter) -> None:
    romeo, mercutio, juliet = [await router.session(name) for name in ("romeo", "mercutio", "juliet")]
    store(router).away = True
    for number in range(30):
        envelope = message(str(number), str(juliet.jid))
        envelope.from_jid = romeo.jid_text
        assert router.safety.accept(romeo, envelope)
        romeo.lane.run(router.routing.from_session, romeo, envelope)
    assert romeo.lane.waiting is not None
    await router.send(mercutio, message("m", str(juliet.jid)))
    assert mercutio.lane.waiting is None
    assert router.link.bodies(juliet)[-1] == "m"
    store(router).away = False
    await until(lambda: romeo.lane.waiting is None)


async def test_what_is_stored_for_an_absent_account_holds_up_nothing_but_what_follows_it_there(
    router: MemoryRouter,
) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    romeo.inbound.enable()
    keep, may = store(router).keep, asyncio.Event()
    kept: list[str] = []

    async def slow(stored: object) -> None:
        await may.wait()
        kept.append(stored.stanza.split(b"'")[1].decode())  # type: ignore[attr-defined]
        await keep(stored)  # type: ignore[arg-type]

    store(router).keep = slow  # type: ignore[method-assign,assignment]
    for id_, to in (("1", NURSE), ("2", juliet.jid), ("3", NURSE), ("4", juliet.jid)):
        await router.send(romeo, message(id_, str(to)))
    assert router.link.bodies(juliet) == ["2", "4"]
    await until(lambda: store(router).waiting_bytes == 0)
    assert romeo.inbound.h == 0, "the first is not safe"
    may.set()
    await until(lambda: romeo.inbound.h == 4)
    assert kept == ["1", "3"]


async def test_a_sender_to_many_absent_accounts_waits_before_they_are_too_many(router: MemoryRouter) -> None:
    romeo = await router.session("romeo")
    may = asyncio.Event()

    async def slow(_stored: object) -> None:
        await may.wait()

    store(router).keep = slow  # type: ignore[method-assign,assignment]
    for number in range(200):
        await router.stores.accounts.create(HOST, f"absent{number}", {})
        envelope = message(str(number), f"absent{number}@{HOST}")
        envelope.from_jid = romeo.jid_text
        assert router.safety.accept(romeo, envelope)
        romeo.lane.run(router.routing.from_session, romeo, envelope)
    assert len(router.forwarder) < 80
    may.set()
    await until(lambda: romeo.lane.waiting is None and not len(router.forwarder))


async def test_what_another_router_has_and_has_not_made_safe_holds_its_senders_socket(tmp_path: Path) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a", "b")
        romeo = await nodes.client(at_home("romeo", ab="a"))
        juliet = await nodes.client(at_home("juliet", ab="b"))
        nodes.routers["a"]._safety._limit = LIMIT
        nodes.databases["b"].before = away
        for number in range(100):
            romeo.say(f"{juliet.name}@{HOST}", number)
            if number % 10 == 0:
                await asyncio.sleep(0.01)
        await soon(lambda: not romeo._reading, "romeo is not read")
        assert nodes.routers["a"]._links.unsafe_bytes() > 0
        assert len(juliet.numbers()) < 100
        nodes.databases["b"].before = at_once
        await soon(lambda: juliet.numbers() == list(range(100)), "juliet has all in order")
        await soon(lambda: not nodes.routers["a"]._links.unsafe_bytes(), "all is safe")


async def test_what_was_read_while_the_router_took_nothing_comes_in_order(tmp_path: Path) -> None:
    async with running(tmp_path, "a") as nodes:
        await nodes.up("a")
        romeo, juliet = await nodes.client("romeo"), await nodes.client("juliet")
        assert romeo.stream.link is not None
        romeo.stream.link.outbox._most = 0
        for part in range(2):
            numbers = range(600 * part, 600 * (part + 1))
            romeo.stream.received(
                b"".join(
                    b"<message to='juliet@%b/r' type='chat'><body>%d</body></message>" % (HOST.encode(), number)
                    for number in numbers
                )
            )
        assert romeo.stream._unread, "the rest waits as it came"
        await soon(lambda: juliet.written.count("</body>") >= 1200, "juliet has all", timeout=20.0)
        assert juliet.numbers() == list(range(1200))
