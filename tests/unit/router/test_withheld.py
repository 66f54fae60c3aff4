"""What a client without XEP-0198 gets while not all that it has sent is safe: an answer says that what came before the
stanza that is answered was taken, so nothing of that may be lost with the stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.messages import Message
from services.router.modules import xep_0160_offline, xep_0199_ping
from services.router.sessions import Session
from services.router.withheld import Withheld
from tests.unit.router.memory_router import HOST, MemoryRouter, Stores, iq, message, together, until
from tests.unit.router.nodes import at_home
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.forwarding import Item, Sent
from tidings.kit.db import DatabaseAway
from tidings.kit.module import IQ

PING = "{urn:xmpp:ping}ping"
MODULES = (xep_0160_offline.MODULE, xep_0199_ping.MODULE)


@pytest.fixture
async def router() -> AsyncIterator[MemoryRouter]:
    router = MemoryRouter(modules=MODULES)
    await router.stores.accounts.create(HOST, "juliet", {})
    yield router
    await router.stop()


def got(router: MemoryRouter, session: Session) -> list[tuple[str, str]]:
    return [(envelope.type, envelope.id) for envelope in router.link.of(session)]


async def soon(router: MemoryRouter, session: Session, envelope: Envelope) -> None:
    """Sends it, and does not wait until it is worked off."""
    envelope.from_jid = session.jid_text
    assert router.safety.accept(session, envelope)
    session.lane.run(router.routing.from_session, session, envelope)
    await asyncio.sleep(0)


async def test_an_error_goes_out_before_the_answer_that_says_that_its_message_was_taken(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message to somebody who is away can't be stored; others that can't be either come behind it."""
    romeo, nurse = await router.session("romeo"), await router.session("nurse")
    failed = asyncio.Event()
    kept: list[Message] = []

    async def keep(message: Message) -> None:
        kept.append(message)
        await failed.wait()
        raise DatabaseAway("a test says so")

    messages: Any = router.stores.messages
    monkeypatch.setattr(messages, "keep", keep)
    await soon(router, romeo, message("lost", f"juliet@{HOST}"))
    await until(lambda: bool(kept))
    messages.away = True
    await soon(router, romeo, iq("get", "answered", HOST, PING))
    await soon(router, romeo, message("waits", nurse.jid_text))
    await soon(router, romeo, iq("get", "behind", HOST, PING))
    assert got(router, romeo) == []
    failed.set()
    await until(lambda: got(router, romeo) == [("error", "lost"), ("result", "answered")])
    messages.away = False
    await until(lambda: got(router, romeo)[2:] == [("result", "behind")])


async def test_nothing_is_taken_for_an_account_behind_a_message_whose_error_is_held_back(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drills, seed 150: the router died, the next one took the message for new, and stored it behind the later one."""
    romeo, nurse = await router.session("romeo"), await router.session("nurse")
    kept: list[str] = []
    failed = 0

    async def keep(message: Message) -> None:
        nonlocal failed
        if not failed:
            failed += 1
            raise DatabaseAway("a test says so")
        kept.append(message.account.local)

    messages: Any = router.stores.messages
    waiting: list[Callable[[None], None]] = []
    monkeypatch.setattr(messages, "keep", keep)
    monkeypatch.setattr(messages, "write", lambda _message, done: waiting.append(done))
    for name in ("gone", "other"):
        await router.stores.accounts.create(HOST, name, {})
    await router.send(romeo, message("1", nurse.jid_text))
    await router.send(romeo, message("2", f"gone@{HOST}"))
    await until(lambda: romeo.withheld is not None)
    assert got(router, romeo) == [], "it waits for the first one"
    await router.send(romeo, message("3", f"gone@{HOST}/r"))
    await router.send(romeo, message("4", f"other@{HOST}"))
    await until(lambda: kept == ["other"])
    for done in waiting:
        done(None)
    await until(lambda: got(router, romeo) == [("error", "2"), ("error", "3")])
    await router.send(romeo, message("5", f"gone@{HOST}"))
    await until(lambda: kept == ["other", "gone"])


async def test_an_answer_of_somebody_else_waits_for_what_was_sent_before_its_request_and_for_no_more(
    router: MemoryRouter,
) -> None:
    romeo, nurse = await router.session("romeo"), await router.session("nurse")
    messages: Any = router.stores.messages
    await router.send(romeo, iq("get", "question", nurse.jid_text, PING))
    messages.away = True
    await router.send(romeo, message("1", nurse.jid_text))
    await router.send(nurse, iq("result", "question", romeo.jid_text))
    assert got(router, romeo) == [("result", "question")]
    await router.send(romeo, iq("get", "behind", nurse.jid_text, PING))
    await router.send(nurse, iq("result", "behind", romeo.jid_text))
    assert got(router, romeo) == [("result", "question")]
    messages.away = False
    await until(lambda: got(router, romeo) == [("result", "question"), ("result", "behind")])


async def test_an_error_of_the_server_does_not_wait_for_the_first_presence(router: MemoryRouter) -> None:
    """It would be lost with the stream, though answers go out meanwhile."""
    romeo = await router.session("romeo", available=False)
    router.routing.deliveries.first_presence.settle(romeo)
    await router.send(romeo, message("1", f"nobody@{HOST}"))
    await router.send(romeo, iq("get", "2", HOST, PING))
    await until(lambda: got(router, romeo) == [("error", "1"), ("result", "2")])
    assert romeo.held is not None


async def test_an_error_of_another_router_is_there_before_its_message_counts_as_safe() -> None:
    async with together("ab", Stores(), modules=MODULES) as (a, b):
        romeo = await a.session("romeo")
        name = at_home("nobody", ab="b")
        held: list[Callable[[], None]] = []
        send = b.links.send

        def later(node: str, item: Item, sent: Sent, seen: int) -> None:
            held.append(lambda: send(node, item, sent, seen))

        b.links.send = later  # type: ignore[method-assign]
        await soon(a, romeo, message("1", f"{name}@{HOST}"))
        await soon(a, romeo, iq("get", "2", HOST, PING))
        await until(lambda: bool(held))
        for _ in range(20):
            await asyncio.sleep(0)
        assert got(a, romeo) == []
        held[0]()
        await until(lambda: got(a, romeo) == [("error", "1"), ("result", "2")])


@pytest.mark.parametrize("asks", [False, True], ids=["message", "iq"])
async def test_what_is_answered_counts_when_the_answer_is_in_the_copy_of_the_session(
    router: MemoryRouter, asks: bool
) -> None:
    """XEP-0198: the answer is stored nowhere else, and the stream's connector gets it behind the copy's."""
    romeo = await router.session("romeo")
    romeo.inbound.enable()
    copied: list[Callable[[], None]] = []
    holder: Any = type("Holder", (type(router.link),), {"when_copied": lambda _self, then: copied.append(then)})()
    romeo.holder = holder
    await router.send(romeo, iq("get", "1", HOST, PING) if asks else message("1", f"nobody@{HOST}"))
    await until(lambda: got(router, romeo) == [] and len(holder.written) == 1)
    assert romeo.inbound.h == 0
    while copied:
        copied.pop(0)()
    assert romeo.inbound.h == 1
    assert len(got(router, romeo)) == 1


async def test_what_comes_behind_a_withheld_answer_stays_behind_it_when_the_client_counts_from_now_on(
    router: MemoryRouter,
) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    messages: Any = router.stores.messages
    messages.away = True
    await router.send(romeo, message("1", juliet.jid_text))
    await router.send(romeo, iq("get", "question", juliet.jid_text, PING))
    await router.send(juliet, iq("result", "question", romeo.jid_text))
    romeo.inbound.enable()
    romeo.outbound.enable()
    await router.send(juliet, message("2", romeo.jid_text))
    assert got(router, romeo) == []
    messages.away = False
    await until(lambda: got(router, romeo) == [("result", "question"), ("chat", "2")])


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from("ab")), max_size=12), st.integers(0, 7))
def test_what_may_go_goes_by_number_and_then_as_it_came(entries: list[tuple[int, str]], safe: int) -> None:
    withheld = Withheld()
    for place, (number, sender) in enumerate(entries):
        withheld.add(Envelope(kind=IQ, id=str(place), from_jid=sender), number)
    ready = [int(envelope.id) for envelope in withheld.take(safe)]
    assert ready == sorted(
        (n for n, (number, _) in enumerate(entries) if number <= safe), key=lambda n: (entries[n][0], n)
    )
    assert len(withheld) == len(entries) - len(ready)
    for sender in "ab":
        assert withheld.last(sender) == max((n for n, by in entries if by == sender and n > safe), default=0)
