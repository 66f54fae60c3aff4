"""A stream whose session goes to another router (services/connector/streams.py): nothing that its client does is lost,
and each router gets what is for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.connector import relocation
from services.connector.client_stream import ClientStream
from services.connector.limits import Addresses, ClientLimits
from services.connector.router_link import RouterLink
from services.connector.streams import Streams
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import (
    AttachResponse,
    CloseStream,
    Moved,
    PrepareMove,
    SessionBound,
    StreamCommand,
)
from tidings.cluster.node import Node
from tidings.kit.link import in_order
from tidings.kit.tasks import Tasks
from tidings.xmpp.stream import ServerStream, State, StreamConfig

NEW = Moved(router_incarnation="new", ticket=b"t")
BOUND = SessionBound(session="s", jid="juliet@example.org/r", reply=b"<bound/>")


class Connection:
    """What a transport is to a stream."""

    peer = ("192.0.2.1", 5222)
    slow = False

    def __init__(self) -> None:
        self.written = b""
        self.reading = True
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def set_reading(self, reading: bool) -> None:
        self.reading = reading

    def send_queue_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True

    abort = close

    async def start_tls(self, host: str) -> bool:
        return False


class Bound:
    """A stream with a session at one router, and another router that it may go to."""

    def __init__(self, bound: bool = True) -> None:
        """`bound`: whether there is a session yet; else the stream is authenticated only."""
        self.tasks = Tasks()
        self.streams = Streams(
            lambda _stream: self.old,
            self._link_to,
            self._other_link,
            lambda _name: None,
            Addresses(0),
            self.tasks.spawn,
        )
        self.old, self.new = (
            RouterLink(self.streams, Node(name, name, "127.0.0.1", 1), True) for name in ("old", "new")
        )
        self.reached = asyncio.Event()
        self.reached.set()
        self.there = True
        self.add()
        if bound:
            self.command(session_bound=BOUND)
        self.told(self.old)

    def add(self) -> None:
        """A stream that is authenticated and asks for a session. What is said and done here is this one's from now
        on."""
        self.connection = Connection()
        core = ServerStream(StreamConfig(frozenset({"example.org"}), tls_available=False, tls_required=False))
        self.stream = ClientStream(
            self.streams, self.streams.next_number(), self.connection, core, ClientLimits(0, 0, 0, 0), lambda: None
        )
        self.streams.add(self.stream)
        self.stream.received(
            b"<stream:stream to='example.org' version='1.0' xmlns='jabber:client'"
            b" xmlns:stream='http://etherx.jabber.org/streams'>"
        )
        core.authenticated_, core.state = True, State.ASKED

    async def _link_to(self, router: str) -> RouterLink | None:
        assert router == "new"
        await self.reached.wait()
        return self.new if self.there else None

    async def _other_link(self, router: str) -> RouterLink:
        return self.new if router == "old" else self.old

    def command(self, **what: Any) -> None:
        self.stream.command(StreamCommand(stream=1, **what))

    def receive(self, link: RouterLink, stream: int, **what: Any) -> None:
        """A command comes from a router."""
        link.receive(AttachResponse(commands=[StreamCommand(stream=stream, **what)]))

    def say(self, number: int) -> None:
        self.stream.received(b"<message id='%d' to='romeo@example.org'/>" % number)

    def told(self, link: RouterLink) -> list[str]:
        """What a router has been told since this was asked for the last time."""
        batch, link.outbox.batch = link.outbox.batch, type(link.outbox.batch)()
        found = []
        for item in in_order(batch.envelopes, batch.events):
            if isinstance(item, Envelope):
                found.append(item.id)
            else:
                which = str(item.WhichOneof("event"))
                found.append(f"{which} {item.move_ready.attempt}" if which == "move_ready" else which)
        return found

    async def settled(self) -> None:
        while len(self.tasks):
            await asyncio.sleep(0)


async def test_what_the_client_sends_while_it_moves_goes_to_the_new_router_behind_the_stream() -> None:
    bound = Bound()
    bound.say(1)
    bound.command(prepare_move=PrepareMove(attempt=7))
    bound.say(2)
    assert not bound.connection.reading
    assert bound.told(bound.old) == ["1", "move_ready 7"]
    bound.command(moved=NEW)
    bound.say(3)
    await bound.settled()
    bound.say(4)
    assert (bound.told(bound.old), bound.told(bound.new)) == ([], ["attach", "2", "3", "4"])
    assert bound.connection.reading


async def test_a_move_that_does_not_come_about_is_over_before_the_next_one_begins() -> None:
    """Else what the client has sent in between would be lost, or come behind the answer to the next question."""
    bound = Bound()
    bound.command(prepare_move=PrepareMove(attempt=1))
    bound.say(1)
    bound.command(moved=Moved())
    bound.command(prepare_move=PrepareMove(attempt=2))
    bound.say(2)
    bound.command(prepare_move=PrepareMove(attempt=3))
    bound.command(moved=Moved())
    assert bound.told(bound.old) == ["move_ready 1", "1", "move_ready 2", "move_ready 3", "2"]
    assert bound.connection.reading


async def test_who_leaves_while_the_stream_moves_has_left_at_the_new_router() -> None:
    bound = Bound()
    bound.command(prepare_move=PrepareMove(attempt=1))
    bound.say(1)
    bound.stream.disconnected("connection reset")
    assert bound.told(bound.old) == ["move_ready 1"]
    bound.command(moved=NEW)
    await bound.settled()
    assert (bound.told(bound.old), bound.told(bound.new)) == ([], ["attach", "1", "closed"])
    assert len(bound.streams) == 0


async def test_who_leaves_while_a_move_does_not_come_about_has_left_at_the_old_router() -> None:
    bound = Bound()
    bound.command(prepare_move=PrepareMove(attempt=1))
    bound.say(1)
    bound.stream.received(b"</stream:stream>")
    bound.stream.disconnected("connection reset")
    bound.command(moved=Moved())
    assert bound.told(bound.old) == ["move_ready 1", "1", "closed"]
    assert len(bound.streams) == 0


async def test_a_stream_that_is_closed_while_it_moves_is_closed_at_the_new_router() -> None:
    bound = Bound()
    bound.command(prepare_move=PrepareMove(attempt=1))
    bound.say(1)
    bound.command(close=CloseStream(condition="conflict"))
    assert bound.connection.closed
    assert b"<conflict" in bound.connection.written
    bound.command(moved=NEW)
    await bound.settled()
    assert (bound.told(bound.old), bound.told(bound.new)) == (["move_ready 1"], ["attach", "closed"])
    assert len(bound.streams) == 0


async def test_a_connector_that_drains_while_the_stream_moves_tells_the_new_router() -> None:
    bound = Bound()
    bound.command(prepare_move=PrepareMove(attempt=1))
    bound.stream.drain("")
    bound.command(moved=NEW)
    await bound.settled()
    assert (bound.told(bound.old), bound.told(bound.new)) == (["move_ready 1"], ["attach", "leaving"])


async def test_a_stream_ends_when_the_new_router_is_out_of_reach() -> None:
    bound = Bound()
    bound.there = False
    bound.command(prepare_move=PrepareMove(attempt=1))
    bound.command(moved=NEW)
    await bound.settled()
    assert b"<system-shutdown" in bound.connection.written
    assert len(bound.streams) == 0


@pytest.mark.parametrize("silent", [False, True])
async def test_a_stream_without_a_session_goes_to_any_other_router_when_the_one_named_is_out_of_reach(
    silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relocation, "ANSWER_TIMEOUT", 0.01)
    authenticated = Bound(bound=False)
    authenticated.there = False
    if silent:
        authenticated.reached.clear()
    authenticated.command(moved=NEW)
    await authenticated.settled()
    assert (authenticated.told(authenticated.old), authenticated.told(authenticated.new)) == (["opened"], [])
    assert authenticated.connection.reading
    assert not authenticated.connection.closed


async def test_a_stream_without_a_session_goes_to_any_other_router_when_the_one_named_is_gone() -> None:
    authenticated = Bound(bound=False)
    authenticated.command(moved=NEW)
    await authenticated.settled()
    assert authenticated.told(authenticated.new) == ["opened"]
    authenticated.stream.router_lost(True)
    await authenticated.settled()
    assert authenticated.told(authenticated.old) == ["opened"]
    assert authenticated.connection.reading


async def test_what_a_router_says_too_late_is_not_for_the_stream_that_was_sent_on_to_it_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drills, seed 116: it was resumed twice, and the connector ended, with all its streams."""
    monkeypatch.setattr(relocation, "ANSWER_TIMEOUT", 0.01)
    authenticated = Bound(bound=False)
    authenticated.receive(authenticated.old, 1, moved=NEW)
    async with asyncio.timeout(5):
        while authenticated.told(authenticated.old) != ["opened"]:
            await asyncio.sleep(0.001)
    monkeypatch.setattr(relocation, "ANSWER_TIMEOUT", 60.0)
    number = authenticated.stream.number
    authenticated.receive(authenticated.old, number, moved=NEW)
    await authenticated.settled()
    assert authenticated.told(authenticated.new) == ["opened", "closed", "opened"]
    authenticated.receive(authenticated.new, 1, session_bound=BOUND)
    assert not authenticated.stream.session
    authenticated.receive(authenticated.new, number, session_bound=BOUND)
    assert authenticated.stream.session == "s"
    assert authenticated.connection.written.count(b"<bound/>") == 1


async def test_what_is_not_due_ends_the_stream_and_nothing_else() -> None:
    bound = Bound()
    bound.receive(bound.old, 1, session_bound=BOUND)
    assert b"<internal-server-error" in bound.connection.written
    assert bound.told(bound.old) == ["closed"]
    assert len(bound.streams) == 0


async def test_a_stream_ends_when_its_router_is_lost_in_the_midst_of_a_move() -> None:
    for left in (False, True):
        bound = Bound()
        bound.command(prepare_move=PrepareMove(attempt=1))
        if left:
            bound.stream.disconnected("connection reset")
        bound.stream.router_lost(True)
        assert len(bound.streams) == 0
        assert (b"<system-shutdown" in bound.connection.written) is not left


async def test_of_a_stream_that_moves_the_end_is_told_when_its_session_goes_on_with_another_one() -> None:
    """The router takes nothing of the session until it knows that the old stream sends no more."""
    bound = Bound()
    bound.say(1)
    bound.command(prepare_move=PrepareMove(attempt=1))
    bound.say(2)
    bound.receive(bound.old, 1, close=CloseStream(condition="conflict"))
    assert bound.told(bound.old) == ["1", "move_ready 1"]
    before, connection = bound.stream, bound.connection
    bound.add()
    bound.receive(bound.old, 2, session_bound=BOUND)
    bound.say(2)
    assert bound.told(bound.old) == ["opened", "closed", "2"]
    assert connection.closed
    assert not bound.connection.closed
    # The router says this of each move that does not come about.
    bound.receive(bound.old, 1, moved=Moved())
    before.received(b"<message id='3' to='romeo@example.org'/>")
    assert bound.told(bound.old) == []
    assert bound.streams.by_session == {"s": bound.stream}
