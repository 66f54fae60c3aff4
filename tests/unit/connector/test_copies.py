"""Copies of sessions at a connector (services/connector/copies.py): which it keeps, and for how long."""

from __future__ import annotations

import pytest

from services.connector import copies
from services.connector.router_link import RouterLink
from tests.unit.connector.test_moves import Bound
from tests.unit.router.memory_router import until
from tidings.api.common.v1.session_pb2 import SessionRecord
from tidings.api.router.v1.router_pb2 import (
    AttachResponse,
    CloseStream,
    ForgetSession,
    Moved,
    PrepareMove,
    SessionAttached,
    SessionBound,
    StreamCommand,
)
from tidings.cluster.node import Node

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
