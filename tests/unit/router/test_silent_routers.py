"""What a router that stood still, or was cut off, has stored as given to a session that another one had by then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from services.router import stranded
from services.router.messages import CLAIMED
from services.router.modules import rfc6121_presence, rfc6121_roster, xep_0160_offline
from services.router.sessions import Session
from services.router.stranded import Stranded, rest_first
from tests.unit.router.memory_router import HOST, MemoryRouter, message, presence, until, view
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.node import NodeState
from tidings.kit.module import MESSAGE
from tidings.xmpp.jid import Jid

JULIET = Jid("juliet", HOST, "")
MODULES = (rfc6121_roster.MODULE, rfc6121_presence.MODULE, xep_0160_offline.MODULE)


@pytest.fixture
async def router() -> AsyncIterator[MemoryRouter]:
    made = MemoryRouter(modules=MODULES)
    await made.stores.accounts.create(HOST, "juliet", {})
    yield made
    await made.stop()


async def stored_elsewhere(router: MemoryRouter) -> Session:
    """Juliet's session, which has had Romeo's messages 1 and 3; the second one has another router stored, as given to
    it, and that has not been confirmed."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    juliet.inbound.enable()
    juliet.outbound.enable()
    await router.send(romeo, message("1", juliet.jid_text))
    second = message("2", juliet.jid_text)
    second.from_jid = romeo.jid_text
    assert router.safety.accept(romeo, second)
    stored = router.safety.message(second, JULIET)
    assert stored is not None
    await router.stores.messages.keep(stored._replace(holder=juliet.id, pending=True))
    await router.send(romeo, message("3", juliet.jid_text))
    return juliet


def got(router: MemoryRouter, session: Session) -> list[str]:
    return [
        envelope.id or envelope.stanza.split(b"'")[1].decode()
        for envelope in router.link.of(session)
        if envelope.kind == MESSAGE
    ]


def told_that_messages_wait(router: MemoryRouter) -> None:
    handler = router.hooks.notes["offline"]
    router.tasks.spawn(handler(JULIET, b""), "a note")  # type: ignore[arg-type]


async def test_it_is_given_though_later_messages_were_when_that_router_says_that_messages_wait(
    router: MemoryRouter,
) -> None:
    juliet = await stored_elsewhere(router)
    juliet.doubtful = True
    told_that_messages_wait(router)
    await until(lambda: got(router, juliet) == ["1", "3", "2"])
    told_that_messages_wait(router)
    await router.send(await router.session("nurse"), message("4", juliet.jid_text))
    await until(lambda: len(got(router, juliet)) > 3)
    assert got(router, juliet) == ["1", "3", "2", "4"], "once"


async def test_however_often_it_is_said_that_messages_wait_they_are_looked_for_one_time_after_the_other(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under fire that was said for each message, and each look read all that waits: the more came, the slower."""
    juliet = await router.session("juliet")
    juliet.presence, juliet.doubtful = None, True
    begun, go_on = 0, asyncio.Event()
    count = router.stores.messages.pending_count

    async def slowly(account: Jid) -> int:
        nonlocal begun
        begun += 1
        await go_on.wait()
        return await count(account)

    monkeypatch.setattr(router.stores.messages, "pending_count", slowly)
    says = router.hooks.notes["offline"]
    for _ in range(20):
        assert says(JULIET, b"") is None
    await until(lambda: begun == 1)
    for _ in range(20):
        says(JULIET, b"")
    go_on.set()
    await until(lambda: not len(router.tasks))
    assert begun == 2, "one, and one more for all that was said meanwhile"


async def test_what_a_router_that_died_in_a_hand_over_had_taken_goes_before_what_comes_now(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stranded, "WRITTEN", 0.02)
    juliet = await stored_elsewhere(router)
    arrivals = [juliet]
    rest_first(juliet, router.routing.deliveries, router.tasks.spawn, lambda: juliet in arrivals)
    await router.send(await router.session("nurse"), message("4", juliet.jid_text))
    arrivals.clear()
    await until(lambda: len(got(router, juliet)) > 3)
    assert got(router, juliet) == ["1", "3", "2", "4"]
    assert juliet.held is None


async def test_it_is_looked_for_when_that_router_has_come_back(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.router.stranded.AFTER", 0.01)
    juliet = await stored_elsewhere(router)
    juliet.doubtful = True
    stranded = Stranded(router.sessions, router.routing.deliveries, router.tasks.spawn)
    stranded.view_changed(view(1, other=NodeState.UP))
    stranded.view_changed(view(2, other=NodeState.FAILED))
    assert got(router, juliet) == ["1", "3"]
    stranded.view_changed(view(3, other=NodeState.UP))
    await until(lambda: got(router, juliet) == ["1", "3", "2"])


async def test_a_session_of_negative_priority_is_given_what_was_for_it_alone(router: MemoryRouter) -> None:
    """RFC 6121 8.5.3.1; what is for the account is not for it (8.5.2.1.1)."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    juliet.priority = -1
    for number, holder in enumerate((CLAIMED + juliet.id, ""), 1):
        one = message(str(number), juliet.jid_text)
        one.from_jid = romeo.jid_text
        assert router.safety.accept(romeo, one)
        stored = router.safety.message(one, JULIET)
        assert stored is not None
        await router.stores.messages.keep(stored._replace(holder=holder))
    await router.routing.deliveries.read_again(juliet)
    assert got(router, juliet) == ["1"]


async def test_what_was_confirmed_while_the_store_was_asked_is_not_given_again(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    juliet.doubtful = True
    one = message("1", juliet.jid_text)
    one.from_jid = romeo.jid_text
    assert router.safety.accept(romeo, one)
    id_ = router.safety.kept_as(one, JULIET)
    assert id_ is not None
    assert router.routing.deliveries.give_stored(juliet, [(one, id_, True)], confirmed=[id_]) == 1
    assert got(router, juliet) == []
    assert router.routing.deliveries.give_stored(juliet, [(one, id_, True)]) == 1
    assert got(router, juliet) == ["1"]


class Holder:
    """A connector that holds a copy, and takes its time."""

    incarnation = "c2"
    local = False

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def deliver(self, session: Session, envelope: Envelope, number: int) -> None:
        """It has it."""

    def when_copied(self, then: Callable[[], None]) -> None:
        self.waiting.append(then)


async def test_what_waits_for_a_copy_is_not_written_to_the_stream_that_resumes_meanwhile(
    router: MemoryRouter,
) -> None:
    """XEP-0198 5: it gets all that was not acknowledged, and each of that once; the link may be the same."""
    juliet, holder = await router.session("juliet"), Holder()
    juliet.inbound.enable()
    juliet.outbound.enable()
    juliet.holder = holder  # type: ignore[assignment]
    router.routing.deliveries.to_session(juliet, message("1", juliet.jid_text))
    assert got(router, juliet) == []
    juliet.stream += 1
    router.routing.deliveries.to_session(juliet, message("2", juliet.jid_text))
    for then in holder.waiting:
        then()
    assert got(router, juliet) == ["2"]


async def test_what_waited_for_a_session_that_has_ended_comes_in_order_to_one_that_had_later_presence_of_its_sender(
    router: MemoryRouter,
) -> None:
    """Another session of the account has had none, and gets all live (drills, LONG, seed 16): the first one took it for
    repeated, though the store said that it had it, and read it there behind later ones."""
    romeo, two = await router.session("romeo"), await router.session("juliet", "two")
    one = await router.session("juliet", "one")
    late = message("late", f"juliet@{HOST}/gone")
    late.from_jid = romeo.jid_text
    assert router.safety.accept(romeo, late)
    await router.send(romeo, presence(to=two.jid_text))
    romeo.lane.run(router.routing.from_session, romeo, late)
    await router.send(romeo, message("after", str(JULIET)))
    await until(lambda: "after" in got(router, one) and "after" in got(router, two))
    told_that_messages_wait(router)
    await until(lambda: not len(router.tasks))
    assert got(router, two) == ["late", "after"]
    assert got(router, one) == ["after"]
