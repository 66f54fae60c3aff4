"""IQ requests that pass twice: sent again by a client that resumes, or dealt with again when a router has died. Each gets
one answer, or one error (RFC 6120 8.2.3)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.connector.session_copy import Sent, SessionCopy
from services.router.session_record import record_of, session_of
from services.router.sessions import Session
from tests.unit.router.memory_router import MemoryRouter, iq
from tidings.api.common.v1.session_pb2 import SessionRecord
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import IQ
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream_management import Sent as Counted

ROMEO = Jid.parse("romeo@example.org/r")
JULIET = "juliet@example.org/r"


def nothing(_work: Any, _name: str) -> None: ...


def request(id_: str, answered: bool = False) -> Sent:
    return Sent(IQ, "get", id_, JULIET, ("ping",), b"<iq/>", answered)


def dealt_with_but_the_first(ids: str) -> Session:
    """A session that has just resumed. Its client may repeat these requests."""
    session = Session(ROMEO, "en", None, 1, nothing)
    session.inbound.enable()
    for id_ in ids:
        session.inbound.count(Counted(session.inbound.take(), IQ, id_, JULIET, b"<iq/>"))
    for number in range(2, len(ids) + 1):
        session.inbound.settle(number)
    session.inbound.resume()
    return session


def waited_for(copy: SessionCopy) -> list[str]:
    record = SessionRecord()
    copy._whole(record)
    return [one.id for one in record.asked]


def test_a_copy_that_begins_in_the_midst_waits_for_no_answer_that_has_come() -> None:
    copy = SessionCopy("r1")
    copy.begin(record_of(Session(ROMEO, "en", None, 1, nothing), ()), b"")
    copy.sent(request("1", answered=True))
    copy.sent(request("2"))
    assert waited_for(copy) == ["2"]


def test_what_a_client_asks_before_the_next_router_has_said_how_its_session_began_is_waited_for() -> None:
    """Drills, LONG, seed 13: that router died a moment later, and nobody answered."""
    session = dealt_with_but_the_first("01")
    copy = SessionCopy("r1")
    for id_ in "13":
        copy.sent(request(id_))
    copy.begin(record_of(session, [(JULIET, "2", 5.0)]), b"")
    copy.sent(request("4"))
    assert waited_for(copy) == ["2", "3", "4"], "the first of them is repeated, and had its answer before"


def test_a_copy_knows_an_address_in_all_its_spellings() -> None:
    """RFC 7622 3.2, 3.3: the answer comes from the address as the server writes it."""
    copy = SessionCopy("r1")
    copy.begin(record_of(Session(ROMEO, "en", None, 1, nothing), ()), b"")
    for id_ in "12":
        copy.sent(request(id_)._replace(to="Juliet@Example.Org/r"))
    copy.delivered(Envelope(kind=IQ, type="result", id="1", from_jid=JULIET, delivery=1), b"<iq/>")
    assert waited_for(copy) == ["2"]
    assert [one.answered for one in copy._sent] == [True, False]


def test_what_a_client_sends_again_is_waited_for_only_if_it_was_before() -> None:
    """XEP-0198 5: it repeats what was not acknowledged; its router had dealt with the first two."""
    session = dealt_with_but_the_first("123")
    copy = SessionCopy("r1")
    copy.begin(record_of(session, [(JULIET, "2", 5.0)]), b"")
    for id_ in "1234":
        copy.sent(request(id_))
    assert waited_for(copy) == ["2", "1", "4"]


@pytest.mark.parametrize("behind", [True, False], ids=["then it comes again", "it has come again"])
@pytest.mark.parametrize("to", ["", "example.org", "Romeo@Example.Org", JULIET])
def test_what_is_answered_since_the_client_has_resumed_is_not_dealt_with_again(to: str, behind: bool) -> None:
    """Drills, seed 524: its router was still at it when the client resumed, and died behind the answer. The next one
    took the repeated request for one that nobody had dealt with."""
    session = Session(ROMEO, "en", None, 1, nothing)
    session.inbound.enable()
    raws = [f"<iq type='{type_}' id='1' to='{to}'><x xmlns='y'/></iq>".encode() for type_ in ("result", "get")]
    for raw in raws:
        session.inbound.count(Counted(session.inbound.take(), IQ, "1", to, raw))
    session.inbound.resume()
    copy = SessionCopy("r1")
    copy.begin(record_of(session, ()), b"")
    sent = [Sent(IQ, type_, "1", to, ("x",), raw) for type_, raw in zip(("result", "get"), raws, strict=True)]
    if not behind:
        list(map(copy.sent, sent))
    from_ = "romeo@example.org" if to in ("", "Romeo@Example.Org") else to
    copy.delivered(Envelope(kind=IQ, type="result", id="1", from_jid=from_, delivery=1), b"<iq/>")
    if behind:
        list(map(copy.sent, sent))
    record = SessionRecord()
    copy._whole(record)
    taken = session_of(record, 1, nothing, doubtful=True)
    revived = []
    for one in sent:
        number = taken.inbound.repeated(one.kind, one.id, one.to, one.raw)
        revived.append(taken.inbound.revived == number)
    assert revived == [True, False], "the client's own answer, and its request"


def test_a_request_whose_time_was_over_while_its_router_stood_still_is_the_next_ones_to_answer() -> None:
    """Drills: it was in no record then, and nobody answered it."""
    copy = SessionCopy("r1")
    copy.begin(record_of(Session(ROMEO, "en", None, 1, nothing), ()), b"")
    for id_ in "123":
        copy.sent(request(id_))
    now = time.monotonic()
    copy._asked |= {(JULIET, "1"): now - 60.0, (JULIET, "2"): now - 25.0}
    record = SessionRecord()
    copy._whole(record)
    assert [(one.id, one.left > 0) for one in record.asked] == [("2", False), ("3", True)]


@pytest.fixture
async def router() -> AsyncIterator[MemoryRouter]:
    made = MemoryRouter()
    yield made
    await made.stop()


async def test_a_request_that_has_its_answer_before_it_is_dealt_with_again_gets_no_error(
    router: MemoryRouter,
) -> None:
    """The dead router had passed it on; who was asked takes no notice of what comes twice."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    deadlines = router.routing.deliveries.deadlines
    deadlines.adopted(romeo, [(juliet.jid_text, "1", 5.0), (juliet.jid_text, "2", 0.0)])
    again = [iq("get", id_, juliet.jid_text, "{x}q") for id_ in ("1", "2")]
    for envelope in again:
        deadlines.again(romeo, envelope)
    answer = iq("result", "1", romeo.jid_text)
    await router.send(juliet, answer)
    await router.send(juliet, Envelope.FromString(answer.SerializeToString()))
    assert [id_ for _, id_, _ in deadlines.left(romeo)] == ["2"]
    for envelope in again:
        await router.send(romeo, envelope)
    deadlines.look()
    assert [(envelope.type, envelope.id) for envelope in router.link.of(romeo)] == [("result", "1"), ("error", "2")]
    assert not romeo.asked


async def test_a_request_whose_time_is_over_before_it_is_dealt_with_again_is_not(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    deadlines = router.routing.deliveries.deadlines
    deadlines.adopted(romeo, [(juliet.jid_text, "1", 0.0)])
    again = iq("get", "1", "Juliet@Example.org/r", "{x}q")
    deadlines.again(romeo, again)
    deadlines.look()
    deadlines.look()
    await router.send(romeo, again)
    assert [(envelope.type, envelope.id) for envelope in router.link.of(romeo)] == [("error", "1")]
    assert router.link.of(juliet) == []


async def test_an_answer_of_the_client_is_not_taken_for_a_request_that_comes_again(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    deadlines = router.routing.deliveries.deadlines
    await router.send(romeo, iq("get", "1", juliet.jid_text, "{x}q"))
    deadlines.again(romeo, iq("result", "1", juliet.jid_text))
    for _ in range(2):
        await router.send(juliet, iq("result", "1", romeo.jid_text))
        await router.send(romeo, iq("get", "1", juliet.jid_text, "{x}q"))
    assert len(router.link.of(romeo)) == 2
