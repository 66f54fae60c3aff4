"""Copies of sessions at a connector (services/connector/copies.py): which it keeps, and for how long."""

from __future__ import annotations

import pytest

from services.connector import copies
from services.connector.router_link import RouterLink
from tests.unit.connector.test_moves import Bound
from tests.unit.router.memory_router import until
from tidings.api.common.v1.session_pb2 import SessionRecord
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import (
    AttachResponse,
    CloseStream,
    ForgetSession,
    Moved,
    PrepareMove,
    SessionAttached,
    SessionBound,
    SessionProgress,
    StreamCommand,
    SurrenderSession,
)
from tidings.cluster.node import Node
from tidings.kit.module import MESSAGE

RECORD = SessionRecord(id="s", epoch=1, jid="juliet@example.org/r", resume_seconds=60)


def resumable() -> Bound:
    """A stream whose session may be resumed, and of which there is a copy."""
    stream = Bound(bound=False)
    stream.command(session_bound=SessionBound(session="s", jid=RECORD.jid, reply=b"<resumed/>", record=RECORD))
    return stream


def resumed_elsewhere(stream: Bound) -> None:
    """What the router of a session says to a connector whose stream has lost it to another one."""
    stream.command(close=CloseStream(condition="conflict"))
    stream.streams.copies.command(stream.old, StreamCommand(session="s", forget=ForgetSession()))


async def test_what_a_client_sends_ahead_of_its_session_is_in_the_copy() -> None:
    """The router numbers it as the first that the session sends, and so does the copy."""
    stream = Bound(bound=False)
    stream.say(1)
    assert stream.told(stream.old) == []
    stream.command(session_bound=SessionBound(session="s", jid=RECORD.jid, reply=b"<resumed/>", record=RECORD))
    stream.say(2)
    assert stream.told(stream.old) == ["1", "2"]
    copy = stream.stream.copy
    assert copy is not None
    assert [sent.id for sent in copy._sent] == ["1", "2"]


async def test_the_copy_of_a_stream_that_breaks_is_kept() -> None:
    stream = resumable()
    stream.stream.disconnected("connection reset")
    assert len(stream.streams.copies) == 1


async def test_a_stream_that_has_lost_its_session_to_another_one_leaves_no_copy() -> None:
    """It would grow old, and be brought to another router as if it were the session."""
    stream = resumable()
    resumed_elsewhere(stream)
    assert len(stream.streams.copies) == 0


async def test_nor_does_one_that_was_on_its_way_to_another_router() -> None:
    stream = resumable()
    stream.command(prepare_move=PrepareMove(attempt=1))
    stream.stream.disconnected("connection reset")
    resumed_elsewhere(stream)
    assert len(stream.streams) == 1, "its end is not told yet"
    stream.command(moved=Moved())
    assert (len(stream.streams), len(stream.streams.copies)) == (0, 0)


@pytest.mark.parametrize("which", ["session_bound", "attached"])
async def test_the_copy_of_a_session_whose_stream_breaks_as_it_begins_is_kept(which: str) -> None:
    """The router takes it for kept here, when it hears of the end."""
    stream = Bound(bound=False)
    stream.stream.disconnected("connection reset")
    begun = {
        "session_bound": StreamCommand(stream=1, session_bound=SessionBound(session="s", record=RECORD)),
        "attached": StreamCommand(stream=1, attached=SessionAttached(record=RECORD)),
    }
    stream.old.receive(AttachResponse(sequence=1, commands=[begun[which]]))
    assert len(stream.streams.copies) == 1


async def test_what_the_router_says_of_a_session_whose_stream_has_just_broken_is_in_the_copy_that_is_kept() -> None:
    """It is confirmed with all else of its batch, and not said again: a higher epoch, for example."""
    stream = resumable()
    stream.stream.disconnected("connection reset")
    state = SessionRecord(id="s", epoch=2, jid=RECORD.jid, resume_seconds=60)
    stream.old.receive(AttachResponse(sequence=1, commands=[StreamCommand(stream=1, session="s", state=state)]))
    copy = stream.streams.copies._copies["s"]
    assert copy.record is not None
    assert copy.record.epoch == 2


def held_at(link: RouterLink, stream: Bound) -> None:
    """A router asks for a copy of the session, says what its client has sent, and delivers something to it."""
    epoch = SessionRecord(id="s", epoch=2, jid=RECORD.jid, resume_seconds=60, counts=True)
    hold = StreamCommand(session="s", attached=SessionAttached(record=epoch, ticket=b"t2"))
    link.receive(AttachResponse(sequence=1, commands=[hold]))
    sent = Envelope(target="s", kind=MESSAGE, id="1", stanza=b"<message id='1' to='romeo@example.org'/>")
    given = Envelope(target="s", kind=MESSAGE, delivery=1, origin="o", number=1, stanza=b"<message id='2'/>")
    link.receive(AttachResponse(sequence=2, envelopes=[sent, given]))
    link.receive(AttachResponse(sequence=3, progress=[SessionProgress(session="s", number=9)]))
    held = stream.streams.copies._copies["s"]
    assert held.record is not None
    assert ([one.id for one in held._sent], len(held._delivered), held.record.number) == (["1"], 1, 9)


@pytest.mark.parametrize("to", ["the same router", "another one"])
async def test_what_a_router_says_to_a_copy_here_is_not_for_the_stream_that_brings_its_own(to: str) -> None:
    """Another holder was earlier. Drills, seed 0: the client got what it had sent itself, and counted that."""
    stream = resumable()
    written = stream.connection.written
    stream.stream.router_lost(True)
    await stream.settled()
    assert stream.told(stream.new) == ["attach"]
    taker = stream.new if to == "the same router" else remote("third", stream)
    held_at(taker, stream)
    assert stream.connection.written == written
    stream.command(close=CloseStream(condition="system-shutdown"))
    assert b"<system-shutdown" in stream.connection.written
    assert stream.streams.copies._copies["s"].router == taker.node.incarnation


async def test_nor_for_the_stream_that_is_handed_over_to_it_and_a_copy_here_is_needed_no_more_behind_that() -> None:
    stream = resumable()
    stream.new = remote("new", stream)
    written = stream.connection.written
    stream.command(moved=Moved(router_incarnation="new", ticket=b"t"))
    await stream.settled()
    held_at(stream.new, stream)
    assert stream.connection.written == written
    record = SessionRecord(id="s", epoch=2, jid=RECORD.jid, resume_seconds=60)
    begun = StreamCommand(stream=1, session="s", attached=SessionAttached(record=record, ticket=b"t3"))
    given = Envelope(target="s", kind=MESSAGE, delivery=1, origin="o", number=1, stanza=b"<message id='3'/>")
    stream.new.receive(AttachResponse(sequence=4, commands=[begun], envelopes=[]))
    stream.new.receive(AttachResponse(sequence=5, envelopes=[given]))
    assert stream.connection.written == written + b"<message id='3'/>"
    assert len(stream.streams.copies) == 0


def remote(name: str, stream: Bound) -> RouterLink:
    return RouterLink(stream.streams, Node(name, name, "127.0.0.1", 1), False)


async def test_there_is_no_copy_of_one_that_can_not_be_resumed() -> None:
    stream = Bound(bound=False)
    stream.stream.disconnected("connection reset")
    record = SessionRecord(id="s", epoch=1, jid=RECORD.jid)
    command = StreamCommand(stream=1, session_bound=SessionBound(session="s", record=record))
    stream.old.receive(AttachResponse(sequence=1, commands=[command]))
    assert len(stream.streams.copies) == 0


async def test_a_copy_is_brought_again_when_the_router_that_it_was_brought_to_is_gone_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copies, "STREAMS_FIRST", 0.0)
    stream = resumable()
    stream.stream.disconnected("connection reset")
    third = RouterLink(stream.streams, Node("third", "third", "127.0.0.1", 1), True)
    others = {"old": stream.new, "new": third}

    async def other(router: str) -> RouterLink:
        return others[router]

    stream.streams.other_link = other
    for gone, next_ in ((stream.old, stream.new), (stream.new, third)):
        stream.streams.copies.router_gone(gone)
        await until(lambda link=next_: stream.told(link) == ["attach"])  # type: ignore[misc]


async def test_a_copy_that_was_brought_to_another_router_takes_nothing_more_from_the_one_that_had_it() -> None:
    """That one may live, and only be out of the other one's reach. Drills, seed 111: what it gave to the session as
    the copy was on its way got the number of what the next router gave; so that was not in the copy, and what the
    next one had found in the store was in it twice."""
    stream = resumable()
    stream.old, stream.new = remote("old", stream), remote("new", stream)
    held_at(stream.old, stream)
    kept = stream.streams.copies
    surrender = StreamCommand(session="s", surrender=SurrenderSession(router_incarnation="old"))
    stream.new.receive(AttachResponse(sequence=1, commands=[surrender]))
    before = kept._copies["s"]
    given = Envelope(target="s", kind=MESSAGE, delivery=2, origin="o", number=2, stanza=b"<message id='old'/>")
    sent = Envelope(target="s", kind=MESSAGE, id="2", stanza=b"<message id='2' to='romeo@example.org'/>")
    state = SessionRecord(id="s", epoch=9, jid=RECORD.jid, resume_seconds=60)
    late = [StreamCommand(session="s", state=state), StreamCommand(session="s", forget=ForgetSession())]
    stream.old.receive(AttachResponse(sequence=4, envelopes=[given, sent]))
    stream.old.receive(AttachResponse(sequence=5, progress=[SessionProgress(session="s", number=11)]))
    stream.old.receive(AttachResponse(sequence=6, commands=late))
    taken = StreamCommand(session="s", attached=SessionAttached(ticket=b"t3"))
    stream.new.receive(AttachResponse(sequence=2, commands=[taken]))
    given.stanza = b"<message id='new'/>"
    stream.new.receive(AttachResponse(sequence=3, envelopes=[given]))
    copy = kept._copies["s"]
    assert copy is before
    assert copy.record is not None
    assert (copy.router, copy.record.epoch, copy.record.number) == ("new", 3, 9)
    assert [one.raw for one in copy._delivered] == [b"<message id='2'/>", b"<message id='new'/>"]
    assert [one.id for one in copy._sent] == ["1"]
