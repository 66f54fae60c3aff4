"""A session that has just been bound: what is for it alone is held for its first presence, what is for its account is
stored meanwhile. With that presence it gets all of it, once, and each sender's in order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.router import first_presence, read_back
from services.router.messages import Done, Message
from services.router.messages_memory import MemoryMessageStore
from services.router.modules import rfc6121_presence, rfc6121_roster, xep_0160_offline
from services.router.sessions import Session
from tests.unit.router.memory_router import HOST, MemoryRouter, Stores, iq, message, presence, until
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import MESSAGE, NONZA, PRESENCE
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream_management import ACK

MODULES = (rfc6121_roster.MODULE, rfc6121_presence.MODULE, xep_0160_offline.MODULE)
JULIET = Jid.parse(f"juliet@{HOST}")


class LateStore(MemoryMessageStore):
    """What sessions are given is written when a test says so, and what nobody is given at once: as where one router
    has the session, and another one stores what is for its account."""

    def __init__(self) -> None:
        self.stores = Stores()
        super().__init__(self.stores.table)
        self.stores.messages = self
        self._late: list[tuple[Message, Done]] = []

    def write(self, message: Message, done: Done) -> None:
        self._late.append((message, done))

    async def catch_up(self) -> None:
        late, self._late = self._late, []
        for kept, done in late:
            super().write(kept, done)
        await until(lambda: not self.waiting_bytes)


@pytest.fixture
def store() -> LateStore:
    return LateStore()


@pytest.fixture
async def router(store: LateStore, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MemoryRouter]:
    monkeypatch.setattr(first_presence, "FIRST_PRESENCE", 3600.0)
    await store.stores.accounts.create(JULIET.domain, JULIET.local, {})
    made = MemoryRouter(stores=store.stores, modules=MODULES)
    yield made
    await made.stop()


async def bound(router: MemoryRouter, counts: bool = True, told: bool = True) -> Session:
    """Juliet has bound a session, and has sent no presence."""
    session = await router.session("juliet", available=False)
    if counts:
        session.inbound.enable()
        session.outbound.enable()
    router.routing.deliveries.first_presence.settle(session)
    if told:
        router.routing.deliveries.first_presence.told(session)
    return session


async def send(router: MemoryRouter, sender: Session, id_: str, to: Jid, type_: str = "chat") -> None:
    await router.send(sender, message(id_, str(to), type_))
    await until(lambda: not len(router.forwarder))  # what is for the account is stored


async def available(router: MemoryRouter, session: Session) -> None:
    """Somebody says that messages wait for it."""
    for handler in router.hooks.session_available:
        waiting = handler(session)
        assert waiting is not None
        await waiting


def got(router: MemoryRouter, session: Session) -> list[str]:
    """The ids of the messages that a session got, in order."""
    return [
        envelope.id or envelope.stanza.split(b"'")[1].decode()
        for envelope in router.link.of(session)
        if envelope.kind == MESSAGE
    ]


# --- what is held, and what is stored ---


async def test_a_router_that_has_come_back_makes_nothing_go_ahead_of_what_is_stored(router: MemoryRouter) -> None:
    """Then sessions look for what it had stored for them; one that is only just bound has had no other router."""
    romeo = await router.session("romeo")
    await send(router, romeo, "1", JULIET)
    juliet = await bound(router)
    await send(router, romeo, "2", juliet.jid)
    await router.routing.deliveries.read_again(juliet)
    assert got(router, juliet) == []
    await router.send(juliet, presence())
    await until(lambda: got(router, juliet) == ["1", "2"])


@pytest.mark.parametrize("written", [False, True], ids=["not written", "written behind it"])
async def test_what_was_held_goes_before_what_its_sender_sent_later_to_the_account(
    router: MemoryRouter, store: LateStore, written: bool
) -> None:
    """Whether or not it is found in the store too."""
    romeo, juliet = await router.session("romeo"), await bound(router)
    for number in range(1, 6):
        await send(router, romeo, str(number), juliet.jid if number % 2 else JULIET)
    if written:
        await store.catch_up()
    assert got(router, juliet) == []
    await router.send(juliet, presence())
    assert got(router, juliet) == ["1", "2", "3", "4", "5"]
    await store.catch_up()
    await available(router, juliet)
    assert got(router, juliet) == ["1", "2", "3", "4", "5"]


async def test_what_is_held_and_in_no_store_is_not_lost_behind_what_is_stored(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await bound(router)
    await send(router, romeo, "news", juliet.jid, "headline")
    await send(router, romeo, "1", JULIET)
    await router.send(juliet, presence())
    assert got(router, juliet) == ["news", "1"]


async def test_what_was_held_and_is_confirmed_before_it_is_written_waits_for_nobody(
    router: MemoryRouter, store: LateStore
) -> None:
    romeo, juliet = await router.session("romeo"), await bound(router)
    await send(router, romeo, "1", juliet.jid)
    await send(router, romeo, "2", JULIET)
    await router.send(juliet, presence())
    link: Any = router.link
    router.acknowledgements.nonza(link, juliet, Envelope(kind=NONZA, type=ACK, id=str(juliet.outbound.sent)))
    assert not juliet.outbound.queue
    await store.catch_up()
    await available(router, juliet)
    assert got(router, juliet) == ["1", "2"]
    assert await store.pending_count(JULIET) == 0


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_is_held_and_stored_comes_once_and_in_order(
    router: MemoryRouter, store: LateStore, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(read_back, "PAGE", 3)
    chance = random.Random(seed)
    senders = [await router.session(f"sender{number}") for number in range(3)]
    sent: list[list[str]] = [[], [], []]
    juliet = await bound(router, counts=chance.random() < 0.5)
    comes = chance.randint(5, 35)
    for number in range(40):
        if number == comes:
            await router.send(juliet, presence())
        index = chance.randrange(3)
        to, type_ = chance.choice(((JULIET, "chat"), (juliet.jid, "chat"), (juliet.jid, "headline")))
        sent[index].append(f"{index}-{number}")
        await send(router, senders[index], sent[index][-1], to, type_)
        if chance.random() < 0.2:
            await store.catch_up()
    await store.catch_up()
    await available(router, juliet)
    for index, ids in enumerate(sent):
        assert [id_ for id_ in got(router, juliet) if id_.startswith(f"{index}-")] == ids


# --- what comes again ---


async def test_what_comes_again_and_was_sent_before_anything_that_a_session_got_still_waits_for_it(
    router: MemoryRouter, store: LateStore
) -> None:
    """A router that died had taken it for an earlier session of that name. That the present one has had a later one says
    nothing of this: it is not confirmed."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    first = message("1", juliet.jid_text)
    first.from_jid = romeo.jid_text
    assert router.safety.accept(romeo, first)
    await send(router, romeo, "2", juliet.jid)
    assert router.routing.route(first) is None
    await store.catch_up()
    assert await store.pending_count(JULIET) == 2
    await available(router, juliet)
    assert got(router, juliet) == ["2", "1"]


# --- how long it is waited for ---


async def held_up(router: MemoryRouter, monkeypatch: pytest.MonkeyPatch) -> tuple[Session, asyncio.Event]:
    """Juliet's session, while something that she has sent takes longer than her first presence is waited for; the
    event ends that. She has been sent two messages."""
    monkeypatch.setattr(first_presence, "FIRST_PRESENCE", 0.01)
    romeo, juliet = await router.session("romeo"), await bound(router)
    may = asyncio.Event()

    async def slow() -> None:
        await may.wait()

    assert router.safety.accept(juliet, iq("get", "slow", HOST, "{x}y"))
    juliet.lane.run(slow)
    first = juliet.settling
    await send(router, romeo, "1", JULIET)
    await send(router, romeo, "2", juliet.jid)
    await until(lambda: juliet.settling is not first)
    assert got(router, juliet) == []
    return juliet, may


async def test_a_presence_that_waits_behind_what_its_client_sent_before_is_waited_for(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    juliet, may = await held_up(router, monkeypatch)
    sent = presence()
    sent.from_jid = juliet.jid_text
    assert router.safety.accept(juliet, sent)
    juliet.lane.run(router.routing.from_session, juliet, sent)
    may.set()
    await juliet.lane.idle()
    assert got(router, juliet) == ["1", "2"]


async def test_when_all_that_a_client_has_sent_is_dealt_with_its_presence_is_waited_for_no_longer(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    juliet, may = await held_up(router, monkeypatch)
    may.set()
    await until(lambda: got(router, juliet) == ["2"])


async def test_what_is_no_message_does_not_go_past_a_message_of_the_same_sender_that_is_held(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of one sender rise over all that it sends: the message would be taken for one that was had."""
    monkeypatch.setattr(first_presence, "FIRST_PRESENCE", 0.01)
    romeo, nurse = await router.session("romeo"), await router.session("nurse")
    juliet = await bound(router)
    await send(router, romeo, "1", juliet.jid)
    await router.send(romeo, presence(juliet.jid_text))
    await router.send(nurse, presence(juliet.jid_text))
    juliet.inbound.number = 1
    await until(lambda: len(router.link.of(juliet)) == 3)
    assert [(envelope.kind, envelope.from_jid) for envelope in router.link.of(juliet)] == [
        (PRESENCE, nurse.jid_text),
        (MESSAGE, romeo.jid_text),
        (PRESENCE, romeo.jid_text),
    ]


async def test_a_client_that_has_sent_nothing_yet_is_waited_for_a_little_longer(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not have been told yet that it is bound."""
    monkeypatch.setattr(first_presence, "FIRST_PRESENCE", 0.01)
    romeo, juliet = await router.session("romeo"), await bound(router)
    first = juliet.settling
    await send(router, romeo, "1", juliet.jid)
    await until(lambda: juliet.settling is not first)
    assert got(router, juliet) == []
    await until(lambda: got(router, juliet) == ["1"])


async def test_the_waiting_begins_when_the_connector_has_been_told_of_the_session(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine that takes longer than the waiting: its client was not late."""
    monkeypatch.setattr(first_presence, "FIRST_PRESENCE", 0.0)
    romeo, juliet = await router.session("romeo"), await bound(router, told=False)
    juliet.inbound.number = 1
    await send(router, romeo, "1", JULIET)
    await send(router, romeo, "2", juliet.jid)
    for _ in range(10):
        await asyncio.sleep(0)
    assert (got(router, juliet), juliet.settling) == ([], None)
    router.routing.deliveries.first_presence.told(juliet)
    await until(lambda: got(router, juliet) == ["2"])
