"""XEP-0198 5: a session waits for its client, and goes on with another stream."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from services.router import resumption
from services.router.negotiation import Negotiation
from services.router.sessions import Session
from services.router.store import SessionRow
from services.router.tickets import Tickets
from tests.unit.router.memory_router import HOST, message, until
from tests.unit.router.test_connector_link import Attached
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import AttachRequest, StreamEvent
from tidings.kit.link import Lane
from tidings.kit.module import IQ, MESSAGE, NONZA
from tidings.xmpp import ns
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream_management import ACK, ENABLE, RESUME


def nonza(attached: Attached, session: Session, name: str, h: str = "", attributes: str = "") -> None:
    raw = f"<{name.partition('}')[2]} xmlns='{ns.SM}' {attributes}/>".encode()
    envelope = Envelope(origin=session.id, kind=NONZA, type=name, id=h, stanza=raw)
    attached.link.receive(AttachRequest(envelopes=[envelope]))


async def resumable(attached: Attached, local: str) -> Session:
    stream, session = await attached.bound(local)
    stream.account = session.jid.bare
    nonza(attached, session, ENABLE, attributes="resume='true'")
    return session


def closed(stream: int, clean: bool = False) -> StreamEvent:
    event = StreamEvent(stream=stream)
    event.closed.clean = clean
    return event


def break_off(attached: Attached, session: Session, clean: bool = False) -> None:
    attached.link.receive(AttachRequest(events=[closed(session.stream, clean)]))


async def resume(attached: Attached, session: Session, h: int, account: str = "", number: int = 77) -> Negotiation:
    """On a new stream of the same connector; what was written before is forgotten."""
    stream = Negotiation(attached.link, number, Lane(attached.router.tasks.spawn))
    stream.account = session.jid.bare if not account else type(session.jid).parse(account)
    attached.link._streams[number] = stream
    attached.outbox.batch.Clear()
    event = StreamEvent(stream=number)
    event.stanza.kind = NONZA
    event.stanza.type = RESUME
    event.stanza.stanza = f"<resume xmlns='{ns.SM}' previd='{session.id}' h='{h}'/>".encode()
    attached.link.receive(AttachRequest(events=[event]))
    await stream.lane.idle()
    return stream


def answer(attached: Attached) -> bytes:
    """What the stream that resumes was told."""
    for command in attached.outbox.batch.commands:
        if command.WhichOneof("command") == "session_bound":
            return command.session_bound.reply
        if command.WhichOneof("command") == "element":
            return command.element
    return b""


def sent(attached: Attached, session: Session, id_: str, to: Session) -> None:
    envelope = message(id_, to.jid_text)
    envelope.origin = session.id
    attached.link.receive(AttachRequest(envelopes=[envelope]))


def got(attached: Attached, session: Session) -> list[int]:
    """The numbers of the stanzas that were written to a session."""
    return [
        envelope.delivery
        for envelope in attached.outbox.batch.envelopes
        if envelope.target == session.id and envelope.kind == MESSAGE
    ]


async def test_a_session_whose_stream_broke_waits_and_gets_what_came_meanwhile(attached: Attached) -> None:
    juliet = await resumable(attached, "juliet")
    _, romeo = await attached.bound("romeo")
    sent(attached, romeo, "1", juliet)
    sent(attached, romeo, "2", juliet)
    break_off(attached, juliet)
    assert juliet.presence is not None, "nobody sees that it has gone"
    sent(attached, romeo, "3", juliet)
    await resume(attached, juliet, 1)
    assert answer(attached).startswith(b"<resumed ")
    assert got(attached, juliet) == [2, 3]
    nonza(attached, juliet, ACK, "3")
    assert not juliet.outbound.queue


async def test_what_is_not_acknowledged_and_comes_again_is_passed_on_once(attached: Attached) -> None:
    romeo = await resumable(attached, "romeo")
    juliet = await resumable(attached, "juliet")
    attached.router.stores.messages.away = True  # type: ignore[attr-defined]
    sent(attached, romeo, "1", juliet)
    sent(attached, romeo, "2", juliet)
    break_off(attached, romeo)
    await resume(attached, romeo, 0)
    assert b"h='0'" in answer(attached)
    for id_ in ("1", "2", "3"):
        sent(attached, romeo, id_, juliet)
    assert got(attached, juliet) == [3]
    attached.router.stores.messages.away = False  # type: ignore[attr-defined]
    await until(lambda: romeo.inbound.h == 3)


async def test_who_resumes_at_another_router_is_told_no_less_than_the_one_before_has_said(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4: `h` only grows. What a copy has is dealt with again, and its connector may not have heard that it was safe."""
    romeo = await resumable(attached, "romeo")
    juliet = await resumable(attached, "juliet")
    attached.router.stores.messages.away = True  # type: ignore[attr-defined]
    sent(attached, romeo, "1", juliet)
    break_off(attached, romeo)
    romeo.doubt()
    resuming = asyncio.ensure_future(resume(attached, romeo, 0))
    await until(lambda: not attached.outbox.batch.envelopes and 77 in attached.link._streams)
    assert answer(attached) == b""
    attached.router.stores.messages.away = False  # type: ignore[attr-defined]
    await resuming
    assert b"h='1'" in answer(attached)
    attached.router.stores.messages.away = True  # type: ignore[attr-defined]
    monkeypatch.setattr(resumption, "SILENCE", 0.05)
    sent(attached, romeo, "2", juliet)
    break_off(attached, romeo)
    await resume(attached, romeo, 0, number=78)
    assert b"<resumed" in answer(attached), "the database may be away for long"


async def test_a_session_that_goes_on_to_another_router_while_it_is_found_is_resumed_there(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    romeo = await resumable(attached, "romeo")
    break_off(attached, romeo)
    sent_on: list[str] = []

    def send_on(_stream: Negotiation, router: str, _request: Envelope) -> bool:
        sent_on.append(router)
        return True

    async def goes_on(session: Session) -> None:
        attached.router.sessions.remove(session)
        row = SessionRow(session.jid, session.id, session.epoch, attached.router.own)
        await attached.router.stores.table.move(row, "r2")

    attached.resumption.send_on = send_on
    monkeypatch.setattr(attached.resumption, "_dealt_with_again", goes_on)
    await resume(attached, romeo, 0)
    assert (sent_on, answer(attached)) == (["r2"], b"")


async def test_a_stream_that_has_come_far_enough_waits_for_a_session_that_is_on_its_way_to_it(
    attached: Attached,
) -> None:
    """Drills, seed 31: the session went home while its stream was sent from router to router, as often as it may."""
    romeo = await resumable(attached, "romeo")
    break_off(attached, romeo)
    attached.router.sessions.remove(romeo)
    row = SessionRow(romeo.jid, romeo.id, romeo.epoch, attached.router.own)
    assert await attached.router.stores.table.move(row, "r2")
    asked: list[str] = []

    def too_far(_stream: Negotiation, router: str, _request: Envelope) -> bool:
        asked.append(router)
        return False

    attached.resumption.send_on = too_far
    resuming = asyncio.ensure_future(resume(attached, romeo, 0))
    await until(lambda: asked == ["r2"])
    assert await attached.router.stores.table.move(
        replace(row, epoch=row.epoch + 1, router="r2"), attached.router.own
    )
    attached.router.sessions.add(romeo)
    await resuming
    assert b"<resumed" in answer(attached)


async def test_a_stream_for_which_its_session_cannot_be_found_by_a_fault_of_ours_is_told_so(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its client has sent behind the request waits for the answer."""
    romeo = await resumable(attached, "romeo")
    break_off(attached, romeo)

    async def fails(_session: Session) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(attached.resumption, "_dealt_with_again", fails)
    await resume(attached, romeo, 0)
    assert b"<failed" in answer(attached)
    assert b"internal-server-error" in answer(attached)


async def test_a_surrendered_session_whose_stream_is_elsewhere_takes_no_other_stream_along(
    attached: Attached,
) -> None:
    """This connector has its copy; connectors number their streams each for itself."""
    romeo, juliet = await resumable(attached, "romeo"), await resumable(attached, "juliet")
    attached.link._sessions.pop(romeo.id)
    attached.link._held[romeo.id] = romeo
    romeo.stream = juliet.stream
    event = StreamEvent(stream=0)
    event.surrendered.session = romeo.id
    attached.link.receive(AttachRequest(events=[event]))
    assert romeo.closed
    break_off(attached, juliet)
    assert juliet.waits is not None, "the end of its stream was heard of"


async def test_the_end_of_a_session_does_not_end_the_one_that_has_come_back_under_its_id(attached: Attached) -> None:
    romeo = await resumable(attached, "romeo")
    sessions = attached.router.sessions
    assert sessions.remove(romeo)
    again = attached.router.takes_over(romeo)
    assert not sessions.remove(romeo)
    assert sessions.get(romeo.id) is again


async def test_a_stream_that_is_still_there_gives_way(attached: Attached) -> None:
    """5: the old stream gets <conflict/>, and nothing that comes from it counts any more."""
    juliet = await resumable(attached, "juliet")
    before = juliet.stream
    stream = await resume(attached, juliet, 0)
    assert attached.closes() == [(before, "conflict")]
    assert (juliet.stream, stream.session) == (77, juliet)
    event = StreamEvent(stream=before)
    event.closed.clean = True
    attached.link.receive(AttachRequest(events=[event]))
    assert attached.router.sessions.get(juliet.id) is juliet


async def test_nobody_resumes_the_session_of_another_account_or_one_that_is_not_there(attached: Attached) -> None:
    juliet = await resumable(attached, "juliet")
    break_off(attached, juliet)
    stream = await resume(attached, juliet, 0, account="romeo@example.org")
    assert b"<item-not-found" in answer(attached)
    assert b" h=" not in answer(attached), "nor is told anything of it"
    assert stream.session is None
    assert juliet.link is None


async def test_a_session_that_is_closed_properly_waits_for_nobody(attached: Attached) -> None:
    juliet = await resumable(attached, "juliet")
    break_off(attached, juliet, clean=True)
    assert juliet.closed
    assert juliet.waits is None


async def test_a_count_that_is_too_high_ends_the_new_stream_and_leaves_the_session(attached: Attached) -> None:
    """6."""
    juliet = await resumable(attached, "juliet")
    break_off(attached, juliet)
    await resume(attached, juliet, 9)
    assert attached.closes() == [(77, "undefined-condition")]
    await resume(attached, juliet, 0, number=78)
    assert answer(attached).startswith(b"<resumed ")


async def test_when_its_time_is_over_the_session_ends_and_its_count_is_remembered(attached: Attached) -> None:
    """5: <failed/> MAY say what was handled before."""
    ended: list[Session] = []

    async def end(session: Session) -> None:
        attached.router.sessions.remove(session)
        attached.resumption.ended(session)
        await attached.router.stores.table.end(session.jid, session.id, session.epoch)
        ended.append(session)

    attached.resumption.end = end
    juliet = await resumable(attached, "juliet")
    _, romeo = await attached.bound("romeo")
    sent(attached, juliet, "1", romeo)
    await until(lambda: juliet.inbound.h == 1)
    juliet.resume_seconds = 0.01  # type: ignore[assignment]
    break_off(attached, juliet)
    await until(lambda: ended == [juliet])
    await resume(attached, juliet, 0)
    assert answer(attached).startswith(b"<failed xmlns='urn:xmpp:sm:3' h='1'><item-not-found")


async def test_while_the_database_is_away_no_time_passes(attached: Attached) -> None:
    asked = 0

    async def unreachable(_session: Session) -> bool:
        nonlocal asked
        asked += 1
        return False

    attached.resumption._is_reachable = unreachable
    juliet = await resumable(attached, "juliet")
    juliet.resume_seconds = 0.01  # type: ignore[assignment]
    break_off(attached, juliet)
    await until(lambda: asked == 1)
    await resume(attached, juliet, 0)
    assert answer(attached).startswith(b"<resumed ")


async def test_a_session_that_another_router_has_taken_over_is_not_resumed_here(attached: Attached) -> None:
    """That one could not reach this router, which does not know yet: what it has of the session is old."""
    juliet = await resumable(attached, "juliet")
    break_off(attached, juliet)
    (row,) = await attached.router.stores.table.of_account(juliet.jid.bare)
    assert await attached.router.stores.table.move(row, "another router")
    stream = await resume(attached, juliet, 0)
    assert b"<resumed " not in answer(attached)
    assert stream.session is None
    assert juliet.closed
    (present,) = await attached.router.stores.table.of_account(juliet.jid.bare)
    assert present.router == "another router", "nobody is told of an end"


async def test_a_session_that_begins_to_go_to_another_router_is_not_resumed_here(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the table is asked whose it is: it would go on here from its record of before, and there as well."""
    juliet = await resumable(attached, "juliet")
    break_off(attached, juliet)
    table, hand_over = attached.router.stores.table, attached.resumption._hand_over
    of_account, given = table.of_account, asyncio.Event()

    async def meanwhile(account: Jid) -> list[SessionRow]:
        rows = await of_account(account)
        monkeypatch.setattr(hand_over, "is_settled", lambda _session: given.is_set())
        monkeypatch.setattr(hand_over, "settled", lambda _session: given.wait())
        return rows

    monkeypatch.setattr(table, "of_account", meanwhile)
    resuming = asyncio.create_task(resume(attached, juliet, 0))
    for _ in range(20):
        await asyncio.sleep(0)
    assert juliet.link is None, "the client waits"
    attached.router.sessions.remove(juliet)
    await table.end(juliet.jid, juliet.id, juliet.epoch)
    given.set()
    stream = await resuming
    assert stream.session is None
    assert b"<resumed " not in answer(attached)


async def test_a_stream_that_ends_while_it_resumes_leaves_the_session_waiting(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be taken for the session's, and its end for that of the session."""
    juliet = await resumable(attached, "juliet")
    break_off(attached, juliet)
    table, asked = attached.router.stores.table, asyncio.Event()
    of_account = table.of_account

    async def slow(account: Jid) -> list[SessionRow]:
        await asked.wait()
        return await of_account(account)

    monkeypatch.setattr(table, "of_account", slow)
    resuming = asyncio.create_task(resume(attached, juliet, 0, number=77))
    await until(lambda: 77 in attached.link._streams)
    event = StreamEvent(stream=77)
    event.closed.clean = False
    attached.link.receive(AttachRequest(events=[event]))
    asked.set()
    stream = await resuming
    await stream.lane.idle()
    assert stream.session is None
    assert attached.router.sessions.get(juliet.id) is juliet
    monkeypatch.setattr(table, "of_account", of_account)
    await resume(attached, juliet, 0, number=78)
    assert answer(attached).startswith(b"<resumed ")


@pytest.mark.parametrize("old", [False, True], ids=["which are safe", "which others may not have"])
async def test_a_holder_that_begins_learns_what_under_way_has_its_answer(attached: Attached, old: bool) -> None:
    """Else the router that carries the session on from there would answer again. It has the answers too, so it does
    not matter whether those who had the copies before do."""
    romeo, juliet = await resumable(attached, "romeo"), await resumable(attached, "juliet")
    attached.router.stores.messages.away = True  # type: ignore[attr-defined]
    romeo.holder = attached.link
    if old:
        romeo.old_copies = frozenset((attached.link,))
    sent(attached, romeo, "1", juliet)
    for id_, to in (("2", HOST), ("3", juliet.jid_text), ("5", "@")):
        raw = f"<iq type='get' id='{id_}' to='{to}'><query xmlns='x:y'/></iq>".encode()
        envelope = Envelope(
            origin=romeo.id, kind=IQ, type="get", id=id_, to_jid=to, children=["{x:y}query"], stanza=raw
        )
        attached.link.receive(AttachRequest(envelopes=[envelope]))
    nobody = message("4", f"nobody@{HOST}")
    nobody.origin = romeo.id
    attached.link.receive(AttachRequest(envelopes=[nobody]))
    await until(lambda: [got.type for _, got in romeo.outbound.queue] == ["error"] * 3)  # type: ignore[union-attr]
    assert len(romeo.inbound.unsafe()) == (4 if old else 1)
    attached.outbox.batch.Clear()
    attached.link._negotiator.copies._tickets = tickets = Tickets()
    tickets.start(bytes(32))
    attached.link.hold(romeo)
    copied = [one for one in attached.outbox.batch.envelopes if one.target == romeo.id and not one.delivery]
    assert [(one.id, one.type, one.answered) for one in copied] == [
        ("1", "chat", False),
        ("2", "get", True),
        ("3", "get", False),
        ("5", "get", True),
        ("4", "chat", True),
    ]
    break_off(attached, romeo)
    await resume(attached, romeo, 0)
    attached.link.hold(romeo)
    begun = next(one.attached for one in attached.outbox.batch.commands if one.WhichOneof("command") == "attached")
    known = {one.id: one.answered for one in begun.record.unconfirmed}
    assert known == {"1": False, "2": True, "3": True, "4": True, "5": True}, (
        "the third was passed on: its answer comes"
    )


@pytest.mark.parametrize("own", [True, False], ids=["its own", "of another session"])
async def test_an_error_says_which_message_it_answers_to_the_session_that_sent_it_only(
    attached: Attached, own: bool
) -> None:
    """Another one that has its place has numbers of its own."""
    romeo = await resumable(attached, "romeo")
    attached.router.stores.messages.away = True  # type: ignore[attr-defined]
    sent(attached, romeo, "1", await resumable(attached, "juliet"))
    attached.link._copies = True
    error = Envelope(kind=MESSAGE, type="error", answers=romeo.inbound.number, target=romeo.id if own else "before")
    attached.link.deliver(romeo, error, 1)
    assert attached.outbox.batch.envelopes[-1].answers == (1 if own else 0)
