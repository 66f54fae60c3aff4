"""Messages of components (services/router/component_links.py) are kept like those of anybody else."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.router.component_links import ComponentLink, ComponentLinks
from services.router.modules import rfc6121_presence, rfc6121_roster, xep_0160_offline
from tests.unit.router.memory_router import HOST, MemoryRouter, until
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.component.v1 import component_pb2 as pb
from tidings.kit.link import Outbox
from tidings.xmpp.jid import Jid

MODULES = (rfc6121_roster.MODULE, rfc6121_presence.MODULE, xep_0160_offline.MODULE)
JULIET = Jid.parse(f"juliet@{HOST}")
GATEWAY = "gateway.example.org"


class Gateway:
    """A component, attached to a router."""

    def __init__(self, router: MemoryRouter) -> None:
        self.router = router
        self.links = ComponentLinks(frozenset({HOST}), lambda _name: [GATEWAY])
        self.attach()

    def attach(self) -> None:
        registration = pb.Registration(
            instance="one", domains=[GATEWAY], routing_key=pb.RoutingKey.ROUTING_KEY_BARE_TO
        )
        self.link = ComponentLink("gateway", "one", Outbox(pb.AttachResponse, 0), registration)
        self.links.add(self.link)

    async def say(self, number: int, sender: str = "romeo") -> None:
        stanza = (
            f"<message xmlns='jabber:client' type='chat' id='{number}' from='{sender}@{GATEWAY}/r' to='{JULIET}'>"
            "<body>.</body></message>"
        )
        checked = self.links.checked(self.link, Envelope(stanza=stanza.encode()))
        assert checked is not None
        pending = self.router.routing.route(checked)
        if pending is not None:
            await pending


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    router = MemoryRouter(modules=MODULES)
    await router.stores.accounts.create(JULIET.domain, JULIET.local, {})
    yield Gateway(router)
    await router.stop()


async def test_each_message_to_somebody_who_is_away_is_kept(gateway: Gateway) -> None:
    """Also of a component that is attached anew, under the same name, and counts from one again."""
    for turn in range(2):
        for number in range(3):
            await gateway.say(10 * turn + number)
        gateway.links.remove(gateway.link)
        gateway.attach()
    kept = await gateway.router.stores.messages.pending(JULIET, "s", 10)
    assert [one.stanza.split(b"id='")[1].split(b"'")[0] for one in kept] == [b"0", b"1", b"2", b"10", b"11", b"12"]
    assert len({one.id for one in kept}) == 6
    assert all(one.received_unix_ms for one in kept)


async def test_a_message_that_was_confirmed_waits_no_longer(gateway: Gateway) -> None:
    router = gateway.router
    juliet = await router.session("juliet")
    for number in range(2):
        await gateway.say(number)
    await until(lambda: not router.stores.messages.waiting_bytes)
    assert [envelope.id for envelope in router.link.of(juliet)] == ["0", "1"]
    assert await router.stores.messages.pending_count(JULIET) == 2
    router.safety.acknowledged(juliet, juliet.outbound.acknowledge(2))
    await until(lambda: not router.stores.messages.waiting_bytes)
    assert await router.stores.messages.pending_count(JULIET) == 0


async def test_what_two_of_a_components_accounts_send_may_come_in_any_order(gateway: Gateway) -> None:
    """They are two flows: the numbers of one say nothing of the other."""
    juliet = await gateway.router.session("juliet")
    first, second = (
        gateway.links.checked(
            gateway.link,
            Envelope(
                stanza=f"<message xmlns='jabber:client' type='chat' id='{name}' from='{name}@{GATEWAY}' "
                f"to='{JULIET}'><body>.</body></message>".encode()
            ),
        )
        for name in ("a", "b")
    )
    assert first is not None
    assert second is not None
    for checked in (second, first):
        pending = gateway.router.routing.route(checked)
        if pending is not None:
            await pending
    assert [envelope.id for envelope in gateway.router.link.of(juliet)] == ["b", "a"]
