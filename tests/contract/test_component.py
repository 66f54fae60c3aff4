"""component.v1, as an outsider uses it: a toy room, a toy PEP and a toy default route, made with the stubs alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from lxml import etree

from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.common.v1.stanza_pb2 import Envelope, Feed
from tidings.api.component.v1 import component_pb2 as pb
from tidings.api.component.v1.component_pb2_grpc import ComponentServiceStub
from tidings.kit.rpc_errors import reason
from tidings.testing.client import RawClient, show
from tidings.testing.server import Installation

PEP = "urn:example:toy-pep"


class Toy:
    """One attached instance: takes envelopes, sends stanzas."""

    def __init__(self, stub: Any) -> None:
        self._call = stub.Attach()
        self._sequence = 0
        self.envelopes: asyncio.Queue[Envelope] = asyncio.Queue()
        self.registered = pb.Registered()
        self._reading: asyncio.Task[None] | None = None

    async def attach(self, **registration: Any) -> None:
        await self._write(registration=pb.Registration(**registration))
        response = await asyncio.wait_for(self._call.read(), 10)
        self.registered.CopyFrom(response.registered)
        self._reading = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                for envelope in response.envelopes:
                    self.envelopes.put_nowait(envelope)
        except (grpc.RpcError, asyncio.CancelledError):
            pass  # grpc.aio raises the latter for a call that we have cancelled

    async def _write(self, **fields: Any) -> None:
        self._sequence += 1
        await self._call.write(pb.AttachRequest(sequence=self._sequence, **fields))

    async def send(self, *stanzas: str) -> None:
        await self._write(envelopes=[Envelope(stanza=stanza.encode()) for stanza in stanzas])

    async def assign(self, key: str, taken: bool) -> None:
        await self._write(assignments=[pb.KeyAssignment(key=key, taken=taken)])

    async def take(self) -> Envelope:
        return await asyncio.wait_for(self.envelopes.get(), 10)

    async def error(self) -> grpc.aio.AioRpcError:
        """What ended the call."""
        assert self._reading is not None
        await self._reading
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await self._call.read()
        return error.value

    async def close(self) -> None:
        self._call.cancel()
        if self._reading is not None:
            await self._reading


@pytest.fixture(scope="module")
def toys(way: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation that lets the client `toys` register things, and `narrow` less."""
    running = Installation(
        way,
        tmp_path_factory.mktemp("toys"),
        [
            f"--component-allow[toys]=room.{{vhost}},*,account:{PEP},exact.example,feed:presence,feed:session-end",
            "--component-allow[narrow]=room.{vhost}",
        ],
    )
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture
async def stub(toys: Installation) -> AsyncIterator[Any]:
    channel = toys.dial(toys.router_address, "toys")
    yield ComponentServiceStub(channel)
    await channel.close()


@pytest.fixture
async def romeo(toys: Installation) -> AsyncIterator[RawClient]:
    async for client in a_user(toys, "romeo"):
        yield client


@pytest.fixture
async def juliet(toys: Installation) -> AsyncIterator[RawClient]:
    async for client in a_user(toys, "juliet"):
        yield client


async def a_user(toys: Installation, name: str) -> AsyncIterator[RawClient]:
    known = toys.__dict__.setdefault("known", set())
    if name not in known:
        await toys.add_account(f"{name}@localhost")
        known.add(name)
    client = RawClient(toys.address, toys.port, "localhost")
    await client.log_in(name, "secret", "r")
    yield client
    await client.close()


BARE, DOMAIN, ASSIGNED = (
    pb.RoutingKey.ROUTING_KEY_BARE_TO,
    pb.RoutingKey.ROUTING_KEY_DOMAIN_TO,
    pb.RoutingKey.ROUTING_KEY_ASSIGNED,
)


async def attached(stub: Any, **registration: Any) -> Toy:
    toy = Toy(stub)
    await toy.attach(**registration)
    return toy


# --- a toy room ---


async def test_a_room_gets_what_is_sent_to_it_and_reflects_it(stub: Any, romeo: RawClient, juliet: RawClient) -> None:
    room = await attached(stub, instance="a", domains=["room.{vhost}"], routing_key=BARE, title="Rooms")
    assert list(room.registered.domains) == ["room.example.net", "room.localhost"]
    assert list(room.registered.virtual_hosts) == ["example.net", "localhost"]
    await romeo.send("<message to='garden@room.localhost' type='groupchat' id='1'><body>hello, all</body></message>")
    envelope = await room.take()
    assert (envelope.from_jid, envelope.to_jid, envelope.type, envelope.id) == (
        romeo.jid,
        "garden@room.localhost",
        "groupchat",
        "1",
    )
    assert list(envelope.children) == ["body"]
    assert etree.fromstring(envelope.stanza).get("from") == romeo.jid
    await room.send(
        *(
            f"<message from='garden@room.localhost/romeo' to='{to}' type='groupchat'><body>hello, all</body></message>"
            for to in (romeo.jid, juliet.jid)
        )
    )
    for client in (romeo, juliet):
        message = await client.element()
        assert (message.get("from"), message.findtext("{jabber:client}body")) == (
            "garden@room.localhost/romeo",
            "hello, all",
        )
    await room.close()


async def test_a_room_is_in_the_list_of_its_host_while_it_is_there(stub: Any, romeo: RawClient) -> None:
    async def listed() -> set[str]:
        await romeo.send(
            "<iq type='get' id='i' to='localhost'><query xmlns='http://jabber.org/protocol/disco#items'/></iq>"
        )
        answer = await romeo.element()
        return {item.get("jid") for item in answer[0]}

    room = await attached(stub, instance="a", domains=["room.{vhost}"], routing_key=BARE, title="Rooms")
    assert await listed() == {"room.localhost", "pubsub.localhost"}
    await room.close()
    async with asyncio.timeout(10):
        while "room.localhost" in await listed():
            pass


async def test_errors_and_answers_of_a_component_reach_who_asked(stub: Any, romeo: RawClient) -> None:
    room = await attached(stub, instance="a", domains=["room.{vhost}"], routing_key=BARE)
    await romeo.send("<iq type='get' id='7' to='room.localhost'><q xmlns='urn:example:q'/></iq>")
    envelope = await room.take()
    await room.send(
        f"<iq type='result' id='7' from='room.localhost' to='{envelope.from_jid}'><q xmlns='urn:example:q'>42</q></iq>"
    )
    answer = await romeo.element()
    assert (answer.get("id"), answer.get("from"), answer[0].text) == ("7", "room.localhost", "42")
    # What the component sends to nobody comes back to it.
    await room.send("<message from='room.localhost' to='nobody@localhost' id='9'><body>x</body></message>")
    bounced = await room.take()
    assert (bounced.type, bounced.id, bounced.to_jid) == ("error", "9", "room.localhost")
    await room.close()


async def test_a_domain_that_nobody_serves_any_more_is_unreachable(stub: Any, romeo: RawClient) -> None:
    room = await attached(stub, instance="a", domains=["room.{vhost}"], routing_key=BARE)
    await room.close()
    async with asyncio.timeout(10):
        while True:
            await romeo.send("<message to='x@room.localhost' id='1'><body>x</body></message>")
            before = await romeo.ping()
            if before:
                break
    assert before[0].get("type") == "error"
    assert before[0][0][0].tag.endswith("remote-server-not-found")


async def test_instances_share_the_work_by_bare_jid_and_the_same_room_stays_together(
    stub: Any, romeo: RawClient
) -> None:
    first = await attached(stub, instance="a", domains=["room.{vhost}"], routing_key=BARE)
    second = await attached(stub, instance="b", domains=["room.{vhost}"], routing_key=BARE)
    for number in range(40):
        await romeo.send(f"<message to='r{number % 20}@room.localhost/n{number}'><body>x</body></message>")
    assert await romeo.ping() == []
    taken: dict[str, list[str]] = {}
    async with asyncio.timeout(10):
        while sum(map(len, taken.values())) < 40:
            for which, toy in (("a", first), ("b", second)):
                while not toy.envelopes.empty():
                    taken.setdefault(which, []).append(toy.envelopes.get_nowait().to_jid.split("/")[0])
            await romeo.ping()
    assert set(taken) == {"a", "b"}, "both have some"
    assert not set(taken["a"]) & set(taken["b"]), "each room is at one of them"
    await first.close()
    await second.close()


async def test_instances_that_say_what_is_theirs_get_that(stub: Any, romeo: RawClient) -> None:
    first = await attached(stub, instance="a", domains=["room.{vhost}"], routing_key=ASSIGNED)
    second = await attached(stub, instance="b", domains=["room.{vhost}"], routing_key=ASSIGNED)
    for name, toy in (("a", first), ("b", second)):
        await toy.assign(f"sync-{name}@room.localhost", True)
    for owner, other in (("a", "b"), ("b", "a")):
        toys = {"a": first, "b": second}
        await toys[other].assign("hall@room.localhost", False)
        await toys[owner].assign("hall@room.localhost", True)
        # The assignments have been taken when what was sent behind them has come back.
        for name, toy in toys.items():
            await toy.send(
                f"<message from='sync-{name}@room.localhost' to='nobody@localhost' id='s'><body>x</body></message>"
            )
            assert (await toy.take()).id == "s"
        await romeo.send("<message to='hall@room.localhost/x' id='m'><body>x</body></message>")
        assert (await toys[owner].take()).id == "m"
    await first.close()
    await second.close()


# --- a toy PEP ---


async def test_a_namespace_at_accounts_is_served_by_its_component(
    stub: Any, romeo: RawClient, juliet: RawClient
) -> None:
    pep = await attached(stub, instance="p", routing_key=BARE, account_namespaces=[PEP])
    await romeo.send(f"<iq type='set' id='1'><mood xmlns='{PEP}'>glad</mood></iq>")
    envelope = await pep.take()
    assert (envelope.from_jid, envelope.to_jid) == (romeo.jid, "romeo@localhost"), "RFC 6120 10.3.3"
    await pep.send(f"<iq type='result' id='1' from='romeo@localhost' to='{romeo.jid}'/>")
    assert (await romeo.element()).get("type") == "result"
    await juliet.send(f"<iq type='get' id='2' to='romeo@localhost'><mood xmlns='{PEP}'/></iq>")
    assert (await pep.take()).to_jid == "romeo@localhost"
    await pep.send(
        f"<iq type='result' id='2' from='romeo@localhost' to='{juliet.jid}'><mood xmlns='{PEP}'>glad</mood></iq>"
    )
    assert (await juliet.element())[0].text == "glad"
    await pep.close()


async def test_an_answer_for_an_account_counts_once_and_only_where_somebody_asked(
    stub: Any, romeo: RawClient, juliet: RawClient
) -> None:
    """Else a component could answer for an account what others ask it, a roster for example."""
    pep = await attached(stub, instance="p", routing_key=BARE, account_namespaces=[PEP])
    await romeo.send(f"<iq type='get' id='1'><mood xmlns='{PEP}'/></iq>")
    await pep.take()
    answer = f"<iq type='result' from='romeo@localhost' to='{romeo.jid}' id"
    await pep.send(f"{answer}='other'/>", f"{answer}='1'/>", f"{answer}='1'/>")
    await pep.send(f"<iq type='result' id='1' from='romeo@localhost' to='{juliet.jid}'/>")
    await pep.send(event("romeo@localhost", romeo.jid), event("romeo@localhost", juliet.jid))
    assert (await romeo.element()).get("id") == "1"
    for client in (romeo, juliet):
        assert (await client.element()).get("id") == "event", "the one before it was dropped"
    await pep.close()


async def test_a_component_tells_of_its_namespaces_for_accounts_that_nobody_has_asked_at(
    stub: Any, juliet: RawClient
) -> None:
    """XEP-0163 4.3.2: what was published long ago is told to who comes online."""
    pep = await attached(stub, instance="p", routing_key=BARE, account_namespaces=[PEP])
    await pep.send(event("silent@localhost", juliet.jid))
    message = await juliet.element()
    assert (message.get("from"), message.get("type"), message[0].text) == ("silent@localhost", "headline", "glad")
    await pep.close()


def event(account: str, to: str) -> str:
    return f"<message type='headline' id='event' from='{account}' to='{to}'><mood xmlns='{PEP}'>glad</mood></message>"


@pytest.mark.parametrize(
    "stanza",
    [
        "<message from='romeo@localhost' to='juliet@localhost'><body>I hate you</body></message>",
        f"<message from='romeo@localhost' to='juliet@localhost'><mood xmlns='{PEP}'/><body>x</body></message>",
        "<message from='romeo@localhost' to='juliet@localhost'/>",
        f"<message from='romeo@localhost/r' to='juliet@localhost'><mood xmlns='{PEP}'/></message>",
        f"<message from='localhost' to='juliet@localhost'><mood xmlns='{PEP}'/></message>",
        "<presence from='romeo@localhost' to='juliet@localhost'/>",
        "<presence from='romeo@localhost' to='juliet@localhost' type='subscribe'/>",
        f"<iq from='romeo@localhost' to='juliet@localhost' type='get' id='1'><mood xmlns='{PEP}'/></iq>",
    ],
)
async def test_for_an_account_a_component_sends_nothing_that_a_user_would(
    stub: Any, stanza: str, juliet: RawClient
) -> None:
    pep = await attached(stub, instance="p", routing_key=BARE, account_namespaces=[PEP])
    await pep.send(stanza)
    error = await pep.error()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [show(tree) for tree in await juliet.ping()] == []


async def test_feeds_tell_of_presence_and_of_the_end_of_sessions(toys: Installation, stub: Any) -> None:
    pep = await attached(
        stub,
        instance="p",
        routing_key=BARE,
        account_namespaces=[PEP],
        feeds=[Feed.FEED_PRESENCE, Feed.FEED_SESSION_END],
    )
    async for client in a_user(toys, "mercutio"):
        await client.send(
            "<presence><c xmlns='http://jabber.org/protocol/caps' hash='sha-1' node='n' ver='v'/></presence>"
        )
        copy = await pep.take()
        assert (copy.feed, copy.from_jid, copy.type) == (Feed.FEED_PRESENCE, client.jid, "")
        assert b"http://jabber.org/protocol/caps" in copy.stanza
        jid = client.jid
    gone = await pep.take()
    assert (gone.feed, gone.from_jid, gone.type) == (Feed.FEED_PRESENCE, jid, "unavailable")
    ended = await pep.take()
    assert (ended.feed, ended.from_jid, ended.stanza) == (Feed.FEED_SESSION_END, jid, b"")
    await pep.close()


async def test_the_roster_can_be_asked_for_a_contact(stub: Any, romeo: RawClient) -> None:
    await romeo.send(
        "<iq type='set' id='r'><query xmlns='jabber:iq:roster'><item jid='nurse@example.net'><group>Servants</group></item></query></iq>"
    )
    assert (await romeo.element()).get("type") == "result"
    request = pb.GetRosterItemRequest(account="romeo@localhost", contact="nurse@example.net")
    pep = await attached(stub, instance="p", routing_key=BARE, account_namespaces=[PEP])
    item = await stub.GetRosterItem(request, timeout=10)
    assert (item.subscription, list(item.groups)) == ("none", ["Servants"])
    for account in ("nobody@localhost", "romeo@elsewhere.example"):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.GetRosterItem(pb.GetRosterItemRequest(account=account, contact="x@example.net"), timeout=10)
        assert reason(error.value) == ErrorReason.ERROR_REASON_NOT_FOUND
    await pep.close()


async def test_rosters_are_only_for_components_that_serve_accounts(toys: Installation, stub: Any) -> None:
    room = await attached(stub, instance="a", domains=["room.{vhost}"], routing_key=BARE)
    channel = toys.dial(toys.router_address, "narrow")
    request = pb.GetRosterItemRequest(account="romeo@localhost", contact="nurse@example.net")
    for asking in (stub, ComponentServiceStub(channel)):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asking.GetRosterItem(request, timeout=10)
        assert reason(error.value) == ErrorReason.ERROR_REASON_NOT_ALLOWED
    await channel.close()
    await room.close()


# --- a toy default route ---


async def test_foreign_domains_go_to_who_serves_them_all(stub: Any, romeo: RawClient) -> None:
    route = await attached(stub, instance="d", domains=["*"], routing_key=DOMAIN)
    await romeo.send("<message to='tybalt@far.example/x' id='1'><body>hello</body></message>")
    assert (await route.take()).to_jid == "tybalt@far.example/x"
    await route.send(f"<message from='tybalt@far.example/x' to='{romeo.jid}'><body>hello yourself</body></message>")
    assert (await romeo.element()).findtext("{jabber:client}body") == "hello yourself"
    # What is ours stays ours.
    await romeo.send("<iq type='get' id='p' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>")
    assert (await romeo.element()).get("type") == "result"
    await route.close()


# --- what is refused ---


@pytest.mark.parametrize(
    ("registration", "expected"),
    [
        ({"instance": "a", "domains": ["other.example"], "routing_key": BARE}, ErrorReason.ERROR_REASON_NOT_ALLOWED),
        (
            {"instance": "a", "routing_key": BARE, "account_namespaces": ["urn:not:ours"]},
            ErrorReason.ERROR_REASON_NOT_ALLOWED,
        ),
        ({"instance": "a", "domains": ["room.{vhost}"]}, ErrorReason.ERROR_REASON_BAD_REQUEST),
        ({"instance": "", "domains": ["room.{vhost}"], "routing_key": BARE}, ErrorReason.ERROR_REASON_BAD_REQUEST),
        (
            {"instance": "x" * 65, "domains": ["room.{vhost}"], "routing_key": BARE},
            ErrorReason.ERROR_REASON_BAD_REQUEST,
        ),
        ({"instance": "a", "routing_key": BARE}, ErrorReason.ERROR_REASON_BAD_REQUEST),
        (
            {"instance": "a", "domains": ["room.{vhost}"], "routing_key": BARE, "feeds": [99]},
            ErrorReason.ERROR_REASON_BAD_REQUEST,
        ),
    ],
)
async def test_a_registration_that_is_not_allowed_is_refused(stub: Any, registration: Any, expected: int) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await Toy(stub).attach(**registration)
    assert reason(error.value) == expected


@pytest.mark.parametrize("feed", [Feed.FEED_PRESENCE, Feed.FEED_SESSION_END])
async def test_a_feed_must_be_allowed_by_name(toys: Installation, feed: Feed.ValueType) -> None:
    channel = toys.dial(toys.router_address, "narrow")
    toy = Toy(ComponentServiceStub(channel))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await toy.attach(instance="a", domains=["room.{vhost}"], routing_key=BARE, feeds=[feed])
    assert reason(error.value) == ErrorReason.ERROR_REASON_NOT_ALLOWED
    assert "--component-allow[narrow]=feed:" in (error.value.details() or "")
    await channel.close()


async def test_a_domain_that_another_component_holds_is_refused(toys: Installation, stub: Any) -> None:
    room = await attached(stub, instance="a", domains=["room.{vhost}"], routing_key=BARE)
    channel = toys.dial(toys.router_address, "narrow")
    await channel.channel_ready()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await Toy(ComponentServiceStub(channel)).attach(instance="b", domains=["room.{vhost}"], routing_key=BARE)
    assert reason(error.value) == ErrorReason.ERROR_REASON_DOMAIN_TAKEN
    await channel.close()
    await room.close()


@pytest.mark.parametrize(
    "stanza",
    [
        "<message from='romeo@localhost' to='juliet@localhost'/>",
        "<message from='pubsub.localhost' to='juliet@localhost'/>",
        "<message to='juliet@localhost'/>",
        "<message from='room.localhost'/>",
        "<letter from='room.localhost' to='juliet@localhost'/>",
        "<message from='room.localhost' to='juliet@localhost'>",
        "<message from='room.localhost' to='juliet@localhost'/><iq/>",
        "not xml",
    ],
)
async def test_what_a_component_must_not_send_ends_its_call(stub: Any, stanza: str, juliet: RawClient) -> None:
    room = await attached(stub, instance="a", domains=["room.{vhost}"], routing_key=BARE)
    await room.send(stanza)
    error = await room.error()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [show(tree) for tree in await juliet.ping()] == []
