"""A receiver that does not read as fast as others write fills no memory, misses nothing, and gets all in order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from services.router import deliveries, held, read_back
from services.router.messages import Kept, Message, message_id
from services.router.modules import rfc6121_presence, rfc6121_roster, xep_0160_offline
from services.router.session_record import record_of, session_of
from services.router.sessions import Session
from tests.unit.router.memory_router import HOST, MemoryRouter, iq, message, presence, until
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import IQ, MESSAGE, NONZA
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream_management import ACK

MODULES = (rfc6121_roster.MODULE, rfc6121_presence.MODULE, xep_0160_offline.MODULE)
JULIET = Jid.parse(f"juliet@{HOST}")


@pytest.fixture
async def router(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MemoryRouter]:
    monkeypatch.setattr(read_back, "RETRY", 0.01)
    monkeypatch.setattr(deliveries, "WINDOW", 10)
    made = MemoryRouter(modules=MODULES)
    await made.stores.accounts.create(JULIET.domain, JULIET.local, {})
    yield made
    await made.stop()


async def juliet_at(
    router: MemoryRouter, resource: str = "r", counts: bool = True, available: bool = True
) -> Session:
    session = await router.session("juliet", resource, available)
    if counts:
        session.inbound.enable()
        session.outbound.enable()
    return session


def got(router: MemoryRouter, session: Session) -> list[str]:
    """The ids of the messages and requests that a session got, in order."""
    return [
        envelope.id or envelope.stanza.split(b"'")[1].decode()
        for envelope in router.link.of(session)
        if envelope.kind in (MESSAGE, IQ)
    ]


def acknowledge(router: MemoryRouter, session: Session, count: int) -> None:
    """Its client has so many stanzas."""
    link: Any = router.link
    router.acknowledgements.nonza(link, session, Envelope(kind=NONZA, type=ACK, id=str(count)))


async def all_acknowledged(router: MemoryRouter, session: Session, count: int) -> None:
    """The client acknowledges whatever it gets, until that is so many stanzas."""

    def done() -> bool:
        acknowledge(router, session, len(got(router, session)))
        return len(got(router, session)) >= count and session.behind is None

    await until(done)


def stored(origin: str, number: int) -> Message:
    """A message for juliet that a router has stored."""
    raw = f"<message id='{origin} {number}'><body/></message>".encode()
    id_ = message_id(b"k" * 32, JULIET.bare_text, origin, number)
    return Message(JULIET, id_, f"{origin}@{HOST}", origin, number, f"{origin}@{HOST}/r", number, raw, True, False)


def names(count: int, first: int = 0) -> list[str]:
    return [str(number) for number in range(first, first + count)]


async def send(router: MemoryRouter, sender: Session, ids: list[str], to: str) -> None:
    for id_ in ids:
        await router.send(sender, message(id_, to))


async def test_messages_beyond_the_window_stay_in_the_store_and_come_in_order_when_there_is_room(
    router: MemoryRouter,
) -> None:
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    await send(router, romeo, names(40), str(JULIET))
    assert got(router, juliet) == names(10)
    await until(lambda: not router.stores.messages.waiting_bytes)
    assert await router.stores.messages.pending_count(JULIET) == 40
    acknowledge(router, juliet, 6)
    await until(lambda: len(got(router, juliet)) >= 12)
    assert len(juliet.outbound.queue) <= 10
    await all_acknowledged(router, juliet, 40)
    await send(router, romeo, names(3, 40), str(juliet.jid))
    assert got(router, juliet) == names(43)


async def test_senders_do_not_wait_for_who_does_not_read(router: MemoryRouter) -> None:
    romeo, _ = await router.session("romeo"), await juliet_at(router)
    romeo.inbound.enable()
    await send(router, romeo, names(40), str(JULIET))
    await until(lambda: romeo.inbound.h == 40)


async def test_what_is_in_no_store_waits_behind_the_messages_that_were_sent_before_it(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    await send(router, romeo, names(15), str(JULIET))
    await router.send(romeo, iq("get", "question", str(juliet.jid), "{x}y"))
    await send(router, romeo, names(15, 15), str(JULIET))
    await router.send(romeo, message("news", str(juliet.jid), "headline"))
    await all_acknowledged(router, juliet, 32)
    found = got(router, juliet)
    assert [one for one in found if one.isdigit()] == names(30)
    assert found.index("question") > found.index("14")
    assert found.index("news") > max(found.index("29"), found.index("question"))


async def test_what_is_in_no_store_is_not_lost_in_the_midst_of_messages_that_are_read_back(
    router: MemoryRouter,
) -> None:
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    await send(router, romeo, names(12), str(juliet.jid))
    await router.send(romeo, message("news", str(juliet.jid), "headline"))
    await send(router, romeo, names(3, 12), str(juliet.jid))
    await all_acknowledged(router, juliet, 16)
    assert got(router, juliet) == [*names(12), "news", *names(3, 12)]


async def test_the_bytes_that_a_client_may_leave_unconfirmed_are_bounded(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "WINDOW_BYTES", 300)
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    await send(router, romeo, names(20), str(JULIET))
    assert 300 <= juliet.outbound.bytes < 400
    await all_acknowledged(router, juliet, 20)
    assert got(router, juliet) == names(20)
    assert juliet.outbound.bytes == 0


async def test_a_client_without_0198_that_confirms_is_bounded_too(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await juliet_at(router, counts=False)
    answered = 0

    async def answer() -> None:
        nonlocal answered
        for _, id_ in router.link.pings[answered:]:
            answered += 1
            await router.send(juliet, iq("result", id_, HOST))

    await router.send(romeo, message("0", str(JULIET)))
    await until(lambda: bool(router.link.pings))
    await answer()
    await send(router, romeo, names(40, 1), str(JULIET))
    assert got(router, juliet) == names(11)
    async with asyncio.timeout(5):
        while juliet.behind is not None:
            router.acknowledgements.look()
            await answer()
            await asyncio.sleep(0.01)
    assert got(router, juliet) == names(41)


async def test_a_client_that_has_never_confirmed_anything_gets_all_as_it_comes(router: MemoryRouter) -> None:
    """Perhaps it can't answer pings; the queue of its socket is its bound."""
    romeo, juliet = await router.session("romeo"), await juliet_at(router, counts=False)
    await send(router, romeo, names(40), str(JULIET))
    assert got(router, juliet) == names(40)


async def test_a_device_that_reads_gets_all_though_another_one_does_not(router: MemoryRouter) -> None:
    romeo = await router.session("romeo")
    slow = await juliet_at(router, "slow")
    fast = await juliet_at(router, "fast", counts=False)
    await send(router, romeo, names(30), str(JULIET))
    assert (got(router, slow), got(router, fast)) == (names(10), names(30))


async def test_what_a_session_was_never_given_is_new_to_every_other_one(router: MemoryRouter) -> None:
    """Another device has had later messages of the same sender: that says nothing of what it was not given."""
    romeo = await router.session("romeo")
    slow = await juliet_at(router, "slow")
    await send(router, romeo, names(15), str(slow.jid))
    other = await juliet_at(router, "other", counts=False)
    await router.send(romeo, message("later", str(other.jid)))
    assert got(router, other) == ["later"]
    await until(lambda: not router.stores.messages.waiting_bytes)
    await router.end(slow)
    await until(lambda: len(got(router, other)) >= 16)
    assert got(router, other)[1:] == names(15)


async def test_a_client_that_confirms_nothing_is_cut_off(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_back, "CONFIRM_TIMEOUT", 0.02)
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    await send(router, romeo, names(10), str(JULIET))
    assert not router.link.closed, "it has its window"
    await send(router, romeo, names(1, 10), str(JULIET))
    await until(lambda: (juliet.stream, "connection-timeout") in router.link.closed)


async def test_a_session_that_comes_to_much_that_waits_gets_it_as_it_confirms(router: MemoryRouter) -> None:
    romeo = await router.session("romeo")
    await send(router, romeo, names(60), str(JULIET))
    await until(lambda: not len(router.forwarder))
    juliet = await router.session("juliet", available=False)
    juliet.inbound.enable()
    juliet.outbound.enable()
    sent = router.link.written
    await router.send(juliet, presence())
    await until(lambda: len(sent) > 1)
    sent[:] = [(to, envelope) for to, envelope in sent if envelope.kind == MESSAGE]
    before = juliet.outbound.acknowledged
    assert len(juliet.outbound.queue) <= 11

    def done() -> bool:
        acknowledge(router, juliet, juliet.outbound.sent - before)
        return len(got(router, juliet)) >= 60 and juliet.behind is None

    await until(done)
    assert got(router, juliet) == names(60)


def at_each_look(router: MemoryRouter, monkeypatch: pytest.MonkeyPatch, then: Callable[[], Awaitable[None]]) -> None:
    """Whenever the store says that nothing waits, something else happens before that is known."""
    pending = router.stores.messages.pending

    async def at_that_moment(*arguments: Any) -> list[Kept]:
        found = await pending(*arguments)
        if not found:
            await then()
        return found

    monkeypatch.setattr(router.stores.messages, "pending", at_that_moment)


async def test_what_comes_while_the_store_says_that_nothing_waits_is_not_missed(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drills, LONG, seed 9: it waited in the store for as long as nobody looked there, and came behind later ones."""
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    late = ["13", "12"]

    async def one() -> None:
        if late:
            await send(router, romeo, [late.pop()], str(JULIET))

    at_each_look(router, monkeypatch, one)
    await send(router, romeo, names(12), str(JULIET))
    await all_acknowledged(router, juliet, 14)
    await send(router, romeo, ["14"], str(JULIET))
    assert got(router, juliet) == names(15)


async def test_a_session_catches_up_though_something_comes_at_each_look(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that were left to the store each time, it would be behind for ever."""
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    sent = 12

    async def some() -> None:
        nonlocal sent
        await send(router, romeo, names(3, sent), str(JULIET))
        sent += 3

    at_each_look(router, monkeypatch, some)
    await send(router, romeo, names(12), str(JULIET))
    await all_acknowledged(router, juliet, 18)
    assert got(router, juliet) == names(sent)


async def test_what_is_more_than_its_window_is_left_to_the_store_also_at_the_last_look(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    kept, late = [], [names(40, 13), names(1, 12)]

    async def many() -> None:
        if late:
            await send(router, romeo, late.pop(), str(JULIET))
            kept.append(len(juliet.behind or ()))

    at_each_look(router, monkeypatch, many)
    await send(router, romeo, names(12), str(JULIET))
    await all_acknowledged(router, juliet, 53)
    assert kept == [0, 10]
    assert got(router, juliet) == names(53)


@pytest.mark.parametrize(("window", "window_bytes"), [(10, 100_000), (100, 1000), (100, 100_000)])
async def test_each_sender_s_messages_come_in_order_though_later_ones_were_stored_first(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch, window: int, window_bytes: int
) -> None:
    """Another router has stored what it had of them when the database had come back. Of those that find no room at
    once only each page is in order; none is missed."""
    monkeypatch.setattr(deliveries, "WINDOW", window)
    monkeypatch.setattr(deliveries, "WINDOW_BYTES", window_bytes)
    kept = [stored(origin, number) for origin in ("romeo", "nurse") for number in range(1, 21)]
    random.Random(1).shuffle(kept)
    for one in kept:
        await router.stores.messages.keep(one)
    juliet = await juliet_at(router, available=False)
    await router.send(juliet, presence())
    first = got(router, juliet)
    await all_acknowledged(router, juliet, 40)
    assert sorted(got(router, juliet)) == sorted(f"{one.origin} {one.number}" for one in kept)
    assert (len(first) == 40) == (window_bytes * window > 1_000_000)
    for origin in ("romeo", "nurse"):
        numbers = [int(id_.split()[1]) for id_ in first if id_.startswith(origin)]
        assert len(numbers) > 1
        assert numbers == sorted(numbers)


async def test_a_flood_of_what_is_in_no_store_ends_a_session_that_is_behind(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "MAX_HELD", 20)
    ended: list[Session] = []
    router.routing.deliveries.on_full = ended.append
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    await send(router, romeo, names(12), str(JULIET))
    for id_ in names(30):
        await router.send(romeo, message(id_, str(juliet.jid), "headline"))
    assert ended == [juliet], "told once"
    assert juliet.behind is not None
    assert len(juliet.behind) == 20


async def test_a_session_that_is_behind_is_so_wherever_it_goes(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    await send(router, romeo, names(15), str(JULIET))
    assert juliet.behind is not None
    moved = session_of(record_of(juliet, ()), 1, router.tasks.spawn)
    assert moved.behind is not None
    await all_acknowledged(router, juliet, 15)
    assert session_of(record_of(juliet, ()), 1, router.tasks.spawn).behind is None


async def test_messages_that_find_no_room_while_a_session_is_held_still_come_from_the_store(
    router: MemoryRouter,
) -> None:
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    router.routing.deliveries.hold(juliet)
    await router.send(romeo, iq("get", "question", str(juliet.jid), "{x}y"))
    await send(router, romeo, names(25), str(JULIET))
    router.routing.deliveries.release(juliet)
    await all_acknowledged(router, juliet, 26)
    found = got(router, juliet)
    assert [one for one in found if one.isdigit()] == names(25)
    assert "question" in found


async def test_a_request_is_not_taken_for_had_because_a_later_message_was_read_from_the_store(
    router: MemoryRouter,
) -> None:
    """While a session is held, what comes for it waits, and its messages are found in the store too."""
    romeo, juliet = await router.session("romeo"), await juliet_at(router)
    router.routing.deliveries.hold(juliet)
    await router.send(romeo, iq("get", "question", str(juliet.jid), "{x}y"))
    await router.send(romeo, message("1", str(JULIET)))
    await until(lambda: not router.stores.messages.waiting_bytes)
    for announced in router.hooks.session_available:
        waiting = announced(juliet)
        assert waiting is not None
        await waiting
    router.routing.deliveries.release(juliet)
    assert sorted(got(router, juliet)) == ["1", "question"]


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_the_pace_each_message_comes_once_and_in_order(router: MemoryRouter, seed: int) -> None:
    chance = random.Random(seed)
    senders = [await router.session(f"sender{number}") for number in range(3)]
    juliet = await juliet_at(router)
    sent: dict[str, list[str]] = {sender.id: [] for sender in senders}
    for number in range(120):
        sender = chance.choice(senders)
        id_ = f"{senders.index(sender)}-{number}"
        to = str(chance.choice((JULIET, juliet.jid)))
        await router.send(sender, message(id_, to))
        sent[sender.id].append(id_)
        if chance.random() < 0.2:
            have = len(got(router, juliet))
            acknowledge(router, juliet, chance.randint(have // 2, have))
        if chance.random() < 0.1:
            await until(lambda: not router.stores.messages.waiting_bytes)
    await all_acknowledged(router, juliet, 120)
    for index, sender in enumerate(senders):
        assert [one for one in got(router, juliet) if one.startswith(f"{index}-")] == sent[sender.id]
    await until(lambda: not router.stores.messages.waiting_bytes)
    assert await router.stores.messages.pending_count(JULIET) == 0
