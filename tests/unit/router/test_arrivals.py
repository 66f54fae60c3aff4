"""Stanzas for sessions that are arriving at a router: its row in the table is ahead of the session."""

from __future__ import annotations

from tests.unit.router.memory_router import HOST, MemoryRouter, Stores, iq, until, view
from tidings.cluster.node import NodeState
from tidings.cluster.strategies.broadcast import Broadcast
from tidings.kit.module import IQ

JULIET = f"juliet@{HOST}"


async def test_a_copy_waits_until_all_sessions_of_its_account_that_are_on_their_way_have_come_or_have_not() -> None:
    routers: dict[str, MemoryRouter] = {}
    stores = Stores()
    a, b = (MemoryRouter(name, routers, stores, Broadcast) for name in "ab")
    for router in (a, b):
        router.see(view(1, a=NodeState.UP, b=NodeState.UP))
    romeo = await a.session("romeo")
    with b.sessions.arriving(JULIET):
        with b.sessions.arriving(JULIET):
            await a.send(romeo, iq("get", "q", f"{JULIET}/r", "{x}y"))
            await until(lambda: len(b.forwarder) > 0 or bool(a.link.of(romeo)))
        # Refused there, though it came later.
        await a.send(romeo, iq("get", "other", f"nurse@{HOST}/r", "{x}y"))
        await until(lambda: bool(a.link.of(romeo)))
        assert [envelope.id for envelope in a.link.of(romeo)] == ["other"], "one did not come, the other may"
        juliet = await b.session("juliet")
    await until(lambda: [envelope.kind for envelope in b.link.of(juliet)] == [IQ])
    for router in (a, b):
        await router.stop()
