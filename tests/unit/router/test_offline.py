"""XEP-0160: stored messages reach a session once, in order, whatever happens to the session or the database meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.router import read_back
from services.router.messages import Kept, Message, marked
from services.router.messages_memory import MemoryMessageStore
from services.router.modules import rfc6121_presence, rfc6121_roster, xep_0160_offline
from services.router.sessions import Session
from services.router.store import Roster
from tests.unit.router.memory_router import HOST, MemoryRouter, Stores, iq, message, presence, together, until, view
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.node import NodeState
from tidings.kit.db import DatabaseAway
from tidings.kit.module import IQ, MESSAGE, PRESENCE, Stanza
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid

MODULES = (rfc6121_roster.MODULE, rfc6121_presence.MODULE, xep_0160_offline.MODULE)
JULIET = Jid.parse(f"juliet@{HOST}")


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Stores:
    monkeypatch.setattr(read_back, "RETRY", 0.01)
    return Stores()


@pytest.fixture
async def router(stores: Stores) -> AsyncIterator[MemoryRouter]:
    await stores.accounts.create(JULIET.domain, JULIET.local, {})
    made = MemoryRouter(stores=stores, modules=MODULES)
    yield made
    await made.stop()


async def store(router: MemoryRouter, *names: str) -> None:
    """As for an account that nobody has a session of."""
    for name in names:
        envelope = message(name, str(JULIET))
        envelope.from_jid = f"romeo@{HOST}/r"
        kept = router.safety.message(envelope, JULIET)
        assert kept is not None
        await router.stores.messages.keep(kept)


def messages_of(router: MemoryRouter) -> MemoryMessageStore:
    store = router.stores.messages
    assert isinstance(store, MemoryMessageStore)
    return store


def texts(router: MemoryRouter, session: Session) -> list[str]:
    """The ids of the messages that a session got."""
    return [
        envelope.id or envelope.stanza.split(b"'")[1].decode()
        for envelope in router.link.of(session)
        if envelope.kind == MESSAGE
    ]


async def test_a_session_that_comes_gets_all_that_waits_in_order(router: MemoryRouter) -> None:
    names = [str(number) for number in range(250)]
    await store(router, *names)
    juliet = await router.session("juliet", available=False)
    await router.send(juliet, presence())
    assert texts(router, juliet) == names


async def test_a_session_whose_stream_has_closed_gets_no_further_page(router: MemoryRouter) -> None:
    """Its end waits behind the pages; what it has not got waits for the next session."""
    names = [str(number) for number in range(250)]
    await store(router, *names)
    first = await router.session("juliet", "first", available=False)
    deliver = router.link.deliver

    def closes(session: Session, envelope: Envelope, number: int) -> None:
        deliver(session, envelope, number)
        first.closed = first.closed or len(texts(router, first)) == read_back.PAGE

    router.link.deliver = closes  # type: ignore[method-assign]
    await router.send(first, presence())
    assert texts(router, first) == names[: read_back.PAGE]
    second = await router.session("juliet", "second", available=False)
    await router.end(first)
    await router.send(second, presence())
    assert texts(router, second) == names, "nothing was confirmed"


async def test_what_a_closed_session_did_not_get_goes_to_another_one_that_is_there(router: MemoryRouter) -> None:
    second = await router.session("juliet", "second")
    first = await router.session("juliet", "first", available=False)
    await store(router, "1", "2")
    first.closed = True
    await router.send(first, presence())
    assert texts(router, second) == []
    await router.end(first)
    await until(lambda: texts(router, second) == ["1", "2"])
    await router.stop()


async def test_what_a_session_holds_goes_to_no_other_one_and_not_twice_to_itself(router: MemoryRouter) -> None:
    romeo = await router.session("romeo")
    for id_ in ("1", "2"):
        await router.send(romeo, message(id_, str(JULIET)))
    first = await router.session("juliet", "first", available=False)
    await router.send(first, presence())
    second = await router.session("juliet", "second", available=False)
    await router.send(second, presence())
    for session in (first, second):
        for announced in router.hooks.session_available:
            waiting = announced(session)
            assert waiting is not None
            await waiting
    assert (texts(router, first), texts(router, second)) == (["1", "2"], [])
    await router.end(first)
    await until(lambda: texts(router, second) == ["1", "2"])
    await router.stop()


async def test_what_was_stored_reaches_a_session_that_has_had_later_ones_of_the_same_sender(
    router: MemoryRouter,
) -> None:
    """While its priority is negative it gets what is for its full JID alone (RFC 6121 8.5.2.1.1)."""
    romeo = await router.session("romeo")
    juliet = await router.session("juliet", available=False)
    negative = presence()
    negative.stanza = b"<presence><priority>-1</priority></presence>"
    negative.children.append("priority")
    await router.send(juliet, negative)
    await router.send(romeo, message("stored", str(JULIET)))
    await router.send(romeo, message("later", str(juliet.jid)))
    await until(lambda: texts(router, juliet) == ["later"])
    await router.send(juliet, presence())
    assert texts(router, juliet) == ["later", "stored"]


async def test_what_another_session_was_given_is_not_taken_for_had_because_of_a_later_request(
    router: MemoryRouter,
) -> None:
    """A request of the same sender reaches a new session before its first presence; a message that a session which is
    gone was given has a lower number."""
    romeo = await router.session("romeo")
    first = await router.session("juliet", "first")
    await router.send(romeo, message("1", str(JULIET)))
    await until(lambda: not messages_of(router).waiting_bytes)
    await router.end(first)
    second = await router.session("juliet", "second", available=False)
    await router.send(romeo, iq("get", "question", str(second.jid), "{x}y"))
    await router.send(second, presence())
    assert texts(router, second) == ["1"]


@pytest.mark.parametrize("to", ["juliet@example.org", "juliet@example.org/first"], ids=["bare", "full"])
async def test_what_only_an_earlier_session_was_given_is_new_to_a_later_one(router: MemoryRouter, to: str) -> None:
    """The later one was given what its sender wrote later, before the earlier one ended: a message is had by those
    that were there, and only the addressed session is there for a full JID. Found by the drills."""
    romeo = await router.session("romeo")
    first = await router.session("juliet", "first")
    await router.send(romeo, message("1", to))
    first.priority = -1
    second = await router.session("juliet", "second")
    await router.send(romeo, message("2", str(second.jid)))
    assert (texts(router, first), texts(router, second)) == (["1"], ["2"])
    await until(lambda: not router.stores.messages.waiting_bytes)
    await router.end(first)
    await until(lambda: texts(router, second) == ["2", "1"])


async def test_what_waits_behind_a_withheld_answer_is_not_read_from_the_store_too(router: MemoryRouter) -> None:
    """Found by the drills."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    juliet.inbound.take()  # something that she has sent is not safe
    error = Envelope(kind=IQ, type="error", id="e", from_jid=romeo.jid_text, to_jid=juliet.jid_text, stanza=b"<iq/>")
    router.routing.deliveries.deliver(juliet, error)
    await router.send(romeo, message("1", str(juliet.jid)))
    await until(lambda: not router.stores.messages.waiting_bytes)
    assert texts(router, juliet) == []
    for handler in router.hooks.session_available:
        given = handler(juliet)
        assert given is not None
        await given
    juliet.inbound.settle(1)
    router.acknowledgements._safe(juliet)
    assert texts(router, juliet) == ["1"]


async def test_what_was_given_before_it_is_stored_overtakes_nothing_that_is(router: MemoryRouter) -> None:
    """A live message has a higher number than a stored one of the same sender, and waits till that is given."""
    romeo = await router.session("romeo")
    await router.send(romeo, message("1", str(JULIET)))
    juliet = await router.session("juliet", available=False)
    pending = router.stores.messages.pending

    async def slow(*args: Any) -> list[Kept]:
        kept = await pending(*args)
        if kept:
            router.stores.messages.pending = pending  # type: ignore[method-assign]
            await router.send(romeo, message("2", str(juliet.jid)))
        return kept

    router.stores.messages.pending = slow  # type: ignore[method-assign]
    await router.send(juliet, presence())
    assert texts(router, juliet) == ["1", "2"]


async def test_while_the_database_is_away_presence_goes_on_and_what_waits_comes_when_it_is_back(
    router: MemoryRouter,
) -> None:
    romeo = await router.session("romeo")
    await store(router, "old")
    juliet = await router.session("juliet", available=False)
    messages_of(router).away = True
    await router.send(juliet, presence())
    await router.send(romeo, message("new", str(JULIET)))
    assert texts(router, juliet) == ["new"], "chats between those who are online need no database"
    assert [envelope.type for envelope in router.link.of(juliet)] == ["", "chat"], "its presence was not refused"
    messages_of(router).away = False
    await until(lambda: texts(router, juliet) == ["new", "old"])


async def test_when_the_database_goes_in_the_midst_of_what_is_stored_nothing_newer_goes_ahead_of_the_rest(
    router: MemoryRouter,
) -> None:
    """Drills, seed 119: four of the rest were taken for had, for they had been another session's, and were lost."""
    romeo, first = await router.session("romeo"), await router.session("juliet", "1")
    names = [str(number) for number in range(2 * read_back.PAGE)]
    for name in names:
        await router.send(romeo, message(name, str(JULIET)))
    await until(lambda: not router.stores.messages.waiting_bytes)
    await router.end(first)
    store, juliet = messages_of(router), await router.session("juliet", available=False)
    pending = store.pending

    async def goes(*args: Any) -> list[Kept]:
        kept = await pending(*args)
        store.away = True
        return kept

    store.pending = goes  # type: ignore[method-assign]
    await router.send(juliet, presence())
    await router.send(romeo, message("new", str(JULIET)))
    assert texts(router, juliet) == names[: read_back.PAGE]
    store.pending = pending  # type: ignore[method-assign]
    store.away = False
    await until(lambda: len(texts(router, juliet)) > 2 * read_back.PAGE)
    assert texts(router, juliet) == [*names, "new"]


async def test_a_first_presence_that_meets_no_database_counts_when_that_is_back(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client was bound just before: it will not send it again."""
    monkeypatch.setattr("services.router.modules.rfc6121_presence.RETRY", 0.01)
    romeo = await router.session("romeo")
    await store(router, "old")
    juliet = await router.session("juliet", available=False)
    load, back = router.stores.rosters.load, asyncio.Event()

    async def away(account: Jid) -> Roster:
        if not back.is_set():
            raise DatabaseAway("gone")
        return await load(account)

    monkeypatch.setattr(router.stores.rosters, "load", away)
    await router.send(juliet, presence())
    await router.send(romeo, message("new", str(JULIET)))
    assert texts(router, juliet) == ["new"], "it is there"
    assert [envelope.type for envelope in router.link.of(juliet)] == ["chat"], "its presence was not refused"
    await router.send(juliet, presence())
    back.set()
    await until(lambda: texts(router, juliet) == ["new", "old"])
    assert [envelope.kind for envelope in router.link.of(juliet)].count(PRESENCE) == 1, "it sees itself, once"


async def test_a_message_that_is_stored_is_not_answered_by_an_error(router: MemoryRouter) -> None:
    """Somebody comes while it is written, and then the database goes."""
    juliet = await router.session("juliet")
    (undelivered,) = router.hooks.undelivered
    keep = router.stores.messages.keep

    async def kept(stored: Message) -> None:
        await keep(stored)
        messages_of(router).away = True

    router.stores.messages.keep = kept  # type: ignore[method-assign]
    envelope = message("1", str(JULIET))
    envelope.from_jid = f"romeo@{HOST}/r"
    result = undelivered(Stanza(envelope))
    assert not isinstance(result, bool)
    assert await result is True
    messages_of(router).away = False
    await until(lambda: texts(router, juliet) == ["1"])


# --- between two routers ---


async def test_a_frozen_session_gets_what_is_stored_when_it_stays_after_all(router: MemoryRouter) -> None:
    juliet = await router.session("juliet")
    juliet.frozen = deque()
    await store(router, "1")
    (announced,) = router.hooks.session_available
    waiting = announced(juliet)
    assert waiting is not None
    await waiting
    assert not juliet.frozen
    juliet.frozen = None
    await until(lambda: texts(router, juliet) == ["1"])


async def test_a_session_that_was_handed_over_gets_what_was_stored_meanwhile(stores: Stores) -> None:
    routers: dict[str, MemoryRouter] = {}
    for name in ("a", "b"):
        MemoryRouter(name, routers, stores, modules=MODULES)
    for router in routers.values():
        router.see(view(1, a=NodeState.UP, b=NodeState.UP))
    b = routers["b"]
    juliet = await b.session("juliet")
    await store(b, "1")
    for handler in b.hooks.session_attached:
        assert handler(juliet) is None, "its stanzas do not wait for this"
    await until(lambda: texts(b, juliet) == ["1"])
    for router in routers.values():
        await router.stop()


# --- how many may wait ---


class CountingStore(MemoryMessageStore):
    counted = 0

    async def pending_count(self, account: Jid) -> int:
        self.counted += 1
        return await super().pending_count(account)


async def kept(router: MemoryRouter, name: str) -> bool | str:
    """True when a message for an account that nobody has a session of is stored, else how it is refused."""
    envelope = message(name, str(JULIET))
    envelope.from_jid = f"romeo@{HOST}/r"
    (handler,) = router.hooks.undelivered
    try:
        return await handler(Stanza(envelope)) is True  # type: ignore[misc]
    except StanzaError as error:
        return error.condition


@pytest.mark.parametrize("routers", [1, 2, 8])
async def test_no_more_messages_wait_than_may_and_they_are_not_counted_for_each(stores: Stores, routers: int) -> None:
    """Also when several routers store them, none of which knows of the others'."""
    stores.messages = counting = CountingStore(stores.table)
    made = [
        MemoryRouter(stores=stores, modules=MODULES, given=["--max-offline-messages=200"]) for _ in range(routers)
    ]
    results = [await kept(made[number % routers], str(number)) for number in range(220)]
    assert results == [True] * 200 + ["service-unavailable"] * 20
    assert counting.counted < 220 // 2
    for router in made:
        await router.stop()


async def test_there_is_room_again_when_what_waits_was_delivered(stores: Stores) -> None:
    router = MemoryRouter(stores=stores, modules=MODULES, given=["--max-offline-messages=3"])
    await stores.accounts.create(JULIET.domain, JULIET.local, {})
    assert [await kept(router, str(number)) for number in range(4)] == [True, True, True, "service-unavailable"]
    waiting = await stores.messages.pending(JULIET, "a session", 10)
    stores.messages.delivered(JULIET, [message.id for message in waiting])
    await marked(stores.messages)
    assert await kept(router, "4") is True
    await router.stop()


# --- what is only being written ---


class SlowStore(MemoryMessageStore):
    """Commits when a test says so."""

    slow = False

    def _commit_soon(self) -> None:
        if not self.slow:
            super()._commit_soon()

    def commit(self) -> None:
        self.slow = False
        self._commit_soon()


async def test_a_session_gets_first_what_the_last_one_was_given_also_when_that_is_only_being_written(
    stores: Stores,
) -> None:
    """As after a moment in which the router stood still: its commit comes behind its sessions' ends."""
    stores.messages = store = SlowStore(stores.table)
    router = MemoryRouter(stores=stores, modules=MODULES)
    romeo, first = await router.session("romeo"), await router.session("juliet", "first")
    first.inbound.enable()
    first.outbound.enable()
    store.slow = True
    await router.send(romeo, message("1", str(JULIET)))
    assert texts(router, first) == ["1"]
    assert (store.is_writing_for(JULIET), store.is_writing_for(romeo.jid.bare)) == (True, False)
    await router.end(first)
    second = await router.session("juliet", "second", available=False)
    comes = asyncio.create_task(router.send(second, presence()))
    await until(lambda: second.presence is not None)
    await router.send(romeo, message("2", str(JULIET)))
    assert texts(router, second) == []
    store.commit()
    await comes
    await until(lambda: texts(router, second) == ["1", "2"])
    await router.stop()


async def test_a_session_gets_what_was_being_stored_when_it_came_wherever_it_is(stores: Stores) -> None:
    """The account's home did not answer when the session began: so it is elsewhere, and has read what is stored. The
    home's strategy knows nothing of it; the table does."""
    stores.messages = store = SlowStore(stores.table)
    await stores.accounts.create(JULIET.domain, JULIET.local, {})
    async with together("ab", stores, modules=MODULES) as routers:
        keeper = routers[0].routing.strategy.keeper(str(JULIET))
        home, other = sorted(routers, key=lambda router: router.own != keeper)
        romeo = await home.session("romeo")
        store.slow = True
        await home.send(romeo, message("1", str(JULIET)))
        await until(lambda: store.is_writing_for(JULIET))
        juliet = await other.session("juliet")
        store.commit()
        await until(lambda: texts(other, juliet) == ["1"])


async def test_a_session_gets_what_one_of_its_account_was_given_whose_stream_has_closed(router: MemoryRouter) -> None:
    """The end of that one waits for what it has sent before."""
    romeo, first = await router.session("romeo"), await router.session("juliet", "first")
    await router.send(romeo, message("1", str(JULIET)))
    await until(lambda: not messages_of(router).waiting_bytes)
    first.closed = True
    second = await router.session("juliet", "second", available=False)
    await router.send(second, presence())
    assert texts(router, second) == ["1"]


async def test_a_message_is_safe_when_those_have_it_who_have_taken_the_session_over_that_was_given_it(
    stores: Stores,
) -> None:
    """A router stood still with it in its hands: what its sender sends next may reach them another way."""
    stores.messages = store = SlowStore(stores.table)
    async with together("ab", stores, modules=MODULES) as (before, after):
        romeo, juliet = await before.session("romeo"), await before.session("juliet")
        romeo.inbound.enable()
        store.slow = True
        message_sent = asyncio.create_task(before.send(romeo, message("1", juliet.jid_text)))
        await until(lambda: texts(before, juliet) == ["1"])
        (row,) = await stores.table.of_account(JULIET)
        assert await stores.table.move(row, "b")
        before.sessions.remove(juliet)
        taken = after.takes_over(juliet)
        told: list[tuple[int, list[str]]] = []
        before.safety.on_safe = lambda _session: told.append((romeo.inbound.h, texts(after, taken)))
        store.commit()
        await message_sent
        await until(lambda: told)
        assert told == [(1, ["1"])]
