"""XEP-0198 5: what still comes of a stream that its session has left, or that came too late for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.router.memory_router import message, until
from tests.unit.router.test_connector_link import Attached
from tests.unit.router.test_resumption import answer, closed, got, resumable, resume, sent
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import AttachRequest, SessionAttach, StreamEvent


async def test_what_the_old_stream_still_brings_is_not_of_the_resumed_session(attached: Attached) -> None:
    """5: the client sends again what `h` does not count. A connector that was not read for a while has more of the
    old stream; it comes behind <resume/>, and before the end of that stream."""
    romeo = await resumable(attached, "romeo")
    juliet = await resumable(attached, "juliet")
    sent(attached, romeo, "1", juliet)
    old = romeo.stream
    await until(lambda: romeo.inbound.h == 1)
    await resume(attached, romeo, 0)
    assert b"h='1'" in answer(attached)
    sent(attached, romeo, "2", juliet)
    assert got(attached, juliet) == []
    attached.link.receive(AttachRequest(events=[closed(old)]))
    for id_ in ("2", "3"):
        sent(attached, romeo, id_, juliet)
    assert got(attached, juliet) == [2, 3]
    await until(lambda: romeo.inbound.h == 3)
    assert romeo.stream == 77
    assert romeo.link is attached.link


async def test_what_comes_of_a_stream_whose_connector_drains_is_not_of_the_one_that_resumes_there(
    attached: Attached,
) -> None:
    romeo = await resumable(attached, "romeo")
    juliet = await resumable(attached, "juliet")
    leaving = StreamEvent(stream=romeo.stream)
    leaving.leaving.SetInParent()
    old = romeo.stream
    attached.link.receive(AttachRequest(events=[leaving]))
    await resume(attached, romeo, 0)
    sent(attached, romeo, "1", juliet)
    attached.link.receive(AttachRequest(events=[closed(old)]))
    sent(attached, romeo, "1", juliet)
    assert got(attached, juliet) == [1]
    await until(lambda: romeo.inbound.h == 1)


async def test_what_an_old_copy_brings_is_not_of_the_session_that_is_there(attached: Attached) -> None:
    """A connector brings the copy of a session whose router is gone, and what its client has sent. The session may
    have been taken over here from another copy by then, and its client have come back on the same connector."""
    romeo = await resumable(attached, "romeo")
    juliet = await resumable(attached, "juliet")
    brought: list[tuple[int, list[str]]] = []

    async def take(_link: Any, stream: int, _attach: SessionAttach, sent: list[Envelope]) -> None:
        brought.append((stream, [envelope.id for envelope in sent]))

    attached.negotiator.reattachment = SimpleNamespace(take=take)  # type: ignore[assignment]
    event = StreamEvent(stream=0)
    event.attach.record.id, event.attach.follows = romeo.id, 2
    sent_before = [message(id_, juliet.jid_text) for id_ in ("1", "2")]
    for envelope in sent_before:
        envelope.origin = romeo.id
    attached.link.receive(AttachRequest(envelopes=sent_before, events=[event]))
    sent(attached, romeo, "3", juliet)
    await until(lambda: brought == [(0, ["1", "2"])])
    assert got(attached, juliet) == [1]
    await until(lambda: romeo.inbound.h == 1)


@pytest.mark.parametrize("how", ["surrendered", "attach"])
async def test_a_stream_that_has_gone_another_way_says_nothing_here(attached: Attached, how: str) -> None:
    """Its end is told to the router that got it; when the session comes back, what it sends is taken."""
    romeo = await resumable(attached, "romeo")
    old = romeo.stream
    await resume(attached, romeo, 0)
    assert attached.link._given_up == {romeo.id: old}
    event = StreamEvent(stream=0)
    if how == "attach":
        event.attach.record.id, event.attach.follows = romeo.id, 1
    else:
        event.surrendered.session = "another"
        attached.link.receive(AttachRequest(events=[event]))
        assert attached.link._given_up == {romeo.id: old}
        event.surrendered.session = romeo.id
    attached.link.receive(AttachRequest(events=[event]))
    assert attached.link._given_up == {}


async def test_what_follows_a_stream_that_came_too_late_is_not_of_the_session_that_is_there(
    attached: Attached,
) -> None:
    """It was on its way here with the session, whose client came back on another stream of the same connector."""
    romeo = await resumable(attached, "romeo")
    juliet = await resumable(attached, "juliet")
    attached.negotiator.adoption = SimpleNamespace(attach=lambda *_: (None, romeo.id))  # type: ignore[assignment]
    event = StreamEvent(stream=9)
    event.attach.ticket = b"t"
    attached.link.receive(AttachRequest(events=[event]))
    assert attached.closes() == [(9, "system-shutdown")]
    sent(attached, romeo, "1", juliet)
    assert got(attached, juliet) == []
    attached.link.receive(AttachRequest(events=[closed(9)]))
    sent(attached, romeo, "1", juliet)
    assert got(attached, juliet) == [1]
