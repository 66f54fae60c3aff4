"""RFC 6121 8.5: what is stored for nobody is safe when a session that goes on elsewhere has it in its copy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from services.router import first_presence
from services.router.sessions import Session
from tests.unit.router.memory_router import MemoryRouter, message, until
from tidings.api.common.v1.stanza_pb2 import Envelope


class Holder:
    """A connector on another host that has the copy of a session, when the test lets it."""

    local = False

    def __init__(self) -> None:
        self.had: list[str] = []
        self._copied: list[Callable[[], None]] = []

    def deliver(self, session: Session, envelope: Envelope, number: int) -> None:
        self.had.append(envelope.id)

    def progress(self, session: Session) -> None: ...

    def when_copied(self, then: Callable[[], None]) -> None:
        self._copied.append(then)

    def answer(self) -> None:
        copied, self._copied = self._copied, []
        for then in copied:
            then()


@pytest.fixture
async def router(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MemoryRouter]:
    monkeypatch.setattr(first_presence, "FIRST_PRESENCE", 3600.0)
    made = MemoryRouter()
    yield made
    await made.stop()


async def two(router: MemoryRouter) -> tuple[Session, Session, Holder]:
    """Romeo, who counts, and Juliet, whose copy is elsewhere."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    romeo.inbound.enable()
    juliet.inbound.enable()
    holder: Any = Holder()
    juliet.holder = holder
    return romeo, juliet, holder


@pytest.mark.parametrize("bare", [False, True], ids=["full", "bare"])
async def test_it_is_safe_when_the_copy_has_it(router: MemoryRouter, bare: bool) -> None:
    romeo, juliet, holder = await two(router)
    await router.send(romeo, message("1", str(juliet.jid.bare) if bare else juliet.jid_text, "headline"))
    assert (holder.had, romeo.inbound.h) == (["1"], 0)
    holder.answer()
    assert romeo.inbound.h == 1


@pytest.mark.parametrize("first", [0, 1])
async def test_of_several_sessions_all_must_have_it_that_go_on(router: MemoryRouter, first: int) -> None:
    """Drills, seed 0: one had it, so its sender's router forgot it; the router of both stood still, and the other one
    got it from the store, behind what the sender had written since."""
    romeo, juliet, holder = await two(router)
    phone, watch = await router.session("juliet", "phone"), await router.session("juliet", "watch")
    phone.inbound.enable()
    other: Any = Holder()
    phone.holder = other
    await router.send(romeo, message("1", str(juliet.jid.bare), "headline"))
    assert router.link.bodies(watch) == holder.had == other.had == ["1"]
    holders = holder, other
    for _ in range(2):
        holders[first].answer()
    assert romeo.inbound.h == 0
    holders[not first].answer()
    holders[first].answer()
    assert romeo.inbound.h == 1


@pytest.mark.parametrize("what", ["held", "frozen", "early"])
async def test_while_it_is_held_back_it_is_not_safe(router: MemoryRouter, what: str) -> None:
    """A new session that has sent no presence yet, or one that moves: with the router it would be lost."""
    romeo, juliet, holder = await two(router)
    if what == "held":
        router.routing.deliveries.first_presence.settle(juliet)
    else:
        setattr(juliet, what, type(romeo.outbound.queue)())
    for id_ in ("1", "2"):
        await router.send(romeo, message(id_, juliet.jid_text, "headline"))
    assert (holder.had, romeo.inbound.h) == ([], 0)
    if what == "held":
        router.routing.deliveries.hold(juliet)
        router.routing.deliveries.release(juliet)
    else:
        passes = router.routing.deliveries
        waited = getattr(juliet, what)
        setattr(juliet, what, None)
        for envelope in waited:
            (passes.deliver if what == "frozen" else passes.to_session)(juliet, envelope)
    assert (holder.had, romeo.inbound.h) == (["1", "2"], 0)
    await until(lambda: bool(holder.answer()) or romeo.inbound.h == 2)


async def test_nobody_waits_for_a_session_that_has_gone_meanwhile(router: MemoryRouter) -> None:
    romeo, juliet, _ = await two(router)
    router.routing.deliveries.first_presence.settle(juliet)
    await router.send(romeo, message("1", juliet.jid_text, "headline"))
    assert romeo.inbound.h == 0
    await router.end(juliet)
    await until(lambda: romeo.inbound.h == 1)


async def test_nor_for_one_that_ends_with_its_router_or_does_not_read(router: MemoryRouter) -> None:
    romeo, juliet, holder = await two(router)
    router.routing.deliveries.fall_behind(juliet)
    await router.send(romeo, message("1", juliet.jid_text, "headline"))
    assert (holder.had, romeo.inbound.h) == ([], 1)
    nurse = await router.session("nurse")
    router.routing.deliveries.first_presence.settle(nurse)
    await router.send(romeo, message("2", nurse.jid_text, "headline"))
    assert romeo.inbound.h == 2
