"""XEP-0160: stored messages reach a session once, in order, whatever happens to the session or the database meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

import pytest

from services.router.modules import rfc6121_presence, rfc6121_roster, xep_0160_offline
from services.router.sessions import Session
from services.router.store import KeptMessage
from services.router.store_memory import MemoryMessageStore
from tests.unit.router.memory_router import HOST, MemoryRouter, Stores, message, presence, until, view
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.node import NodeState
from tidings.kit.db import DatabaseAway
from tidings.kit.module import MESSAGE, Stanza
from tidings.xmpp.jid import Jid

MODULES = (rfc6121_roster.MODULE, rfc6121_presence.MODULE, xep_0160_offline.MODULE)
JULIET = Jid.parse(f"juliet@{HOST}")


class Messages(MemoryMessageStore):
    """A store whose database can be away: at once, or when all is done but the commit."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.breaks_at_commit = False

    async def pending_count(self, account: Jid) -> int:
        self._check()
        return await super().pending_count(account)

    async def take(self, account: Jid, limit: int, give: Callable[[list[KeptMessage]], bool]) -> int:
        await asyncio.sleep(0)
        self._check()
        if self.breaks_at_commit:
            self.breaks_at_commit = False
            give(self._messages[account][:limit])
            raise DatabaseAway("nobody knows whether it has happened")
        return await super().take(account, limit, give)

    def waiting(self, account: Jid) -> int:
        return len(self._messages.get(account, ()))

    def _check(self) -> None:
        if self.away:
            raise DatabaseAway("for this test")


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Stores:
    monkeypatch.setattr(xep_0160_offline, "RETRY", 0.01)
    stores = Stores()
    stores.messages = Messages()
    return stores


@pytest.fixture
async def router(stores: Stores) -> AsyncIterator[MemoryRouter]:
    made = MemoryRouter(stores=stores, modules=MODULES)
    yield made
    await made.stop()


def messages_of(router: MemoryRouter) -> Messages:
    store = router.stores.messages
    assert isinstance(store, Messages)
    return store


async def store(router: MemoryRouter, *names: str) -> None:
    """As for an account that nobody has a session of."""
    for name in names:
        envelope = message(name, str(JULIET))
        await router.stores.messages.keep(
            JULIET, id_=name, from_jid=f"romeo@{HOST}/r", received_unix_ms=1, stanza=envelope.stanza, origin="", number=0
        )  # fmt: skip


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
    assert await router.stores.messages.pending_count(JULIET) == 0


async def test_a_session_whose_stream_has_closed_gets_no_further_page(router: MemoryRouter) -> None:
    """Its end waits behind the pages; what it has not got waits for the next session."""
    names = [str(number) for number in range(250)]
    await store(router, *names)
    first = await router.session("juliet", "first", available=False)
    deliver = router.link.deliver

    def closes(session: Session, envelope: Envelope) -> None:
        deliver(session, envelope)
        first.closed = first.closed or len(texts(router, first)) == xep_0160_offline.PAGE

    router.link.deliver = closes  # type: ignore[method-assign]
    await router.send(first, presence())
    assert texts(router, first) == names[: xep_0160_offline.PAGE]
    second = await router.session("juliet", "second", available=False)
    await router.end(first)
    await router.send(second, presence())
    assert texts(router, second) == names[xep_0160_offline.PAGE :]


async def test_what_a_closed_session_did_not_get_goes_to_another_one_that_is_there(router: MemoryRouter) -> None:
    second = await router.session("juliet", "second")
    first = await router.session("juliet", "first", available=False)
    await store(router, "1", "2")
    first.closed = True
    await router.send(first, presence())
    assert texts(router, second) == []
    await router.end(first)
    await until(lambda: texts(router, second) == ["1", "2"])


async def test_an_unknown_outcome_gives_no_session_a_message_twice(router: MemoryRouter) -> None:
    await store(router, "1", "2")
    messages_of(router).breaks_at_commit = True
    juliet = await router.session("juliet", available=False)
    await router.send(juliet, presence())
    assert texts(router, juliet) == ["1", "2"]
    await until(lambda: not messages_of(router).waiting(JULIET))
    assert texts(router, juliet) == ["1", "2"]
    await store(router, "3")
    (announced,) = router.hooks.session_available
    waiting = announced(juliet)
    assert waiting is not None
    await waiting
    assert texts(router, juliet) == ["1", "2", "3"]


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


async def test_a_message_that_is_stored_is_not_answered_by_an_error(router: MemoryRouter) -> None:
    """Somebody comes while it is written, and then the database goes."""
    juliet = await router.session("juliet")
    (undelivered,) = router.hooks.undelivered
    keep = router.stores.messages.keep

    async def kept(*args: object, **values: object) -> None:
        await keep(*args, **values)  # type: ignore[arg-type]
        messages_of(router).away = True

    router.stores.messages.keep = kept  # type: ignore[assignment, method-assign]
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
    assert await router.stores.messages.pending_count(JULIET) == 1
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
