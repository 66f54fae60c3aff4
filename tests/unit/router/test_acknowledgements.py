"""XEP-0198 at a router: what is acknowledged when, and what a client is asked."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.router import acknowledgements, deliveries
from services.router.deliveries import ASK_AFTER
from services.router.messages_memory import MemoryMessageStore
from services.router.modules import rfc6121_presence, rfc6121_roster, xep_0160_offline, xep_0199_ping
from services.router.sessions import Session
from tests.unit.router.memory_router import HOST, MemoryRouter, iq, message, until
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import IQ, NONZA
from tidings.xmpp import ns
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream_management import ACK, ENABLE, REQUEST, RESUME

MODULES = (rfc6121_roster.MODULE, rfc6121_presence.MODULE, xep_0160_offline.MODULE, xep_0199_ping.MODULE)
PING = f"{{{ns.PING}}}ping"
JULIET = Jid.parse(f"juliet@{HOST}")


@pytest.fixture
async def router() -> AsyncIterator[MemoryRouter]:
    made = MemoryRouter(modules=MODULES)
    yield made
    await made.stop()


def store_of(router: MemoryRouter) -> MemoryMessageStore:
    store = router.stores.messages
    assert isinstance(store, MemoryMessageStore)
    return store


def nonza(router: MemoryRouter, session: Session, name: str, h: str = "", **attributes: str) -> None:
    """As its connector would give it."""
    local = name.partition("}")[2]
    written = "".join(f" {key}='{value}'" for key, value in {"h": h, **attributes}.items() if value)
    link: Any = router.link
    raw = f"<{local} xmlns='{ns.SM}'{written}/>".encode()
    router.acknowledgements.nonza(link, session, Envelope(kind=NONZA, type=name, id=h, stanza=raw))


def told(router: MemoryRouter, session: Session) -> list[str]:
    """What a session was told and asked: "3" for <a h='3'/>, else the name."""
    found = []
    for jid, raw in router.link.nonzas:
        if jid == session.jid_text:
            text = raw.decode()
            found.append(text.split("h='")[1].split("'")[0] if text.startswith("<a ") else text[1:].split(" ")[0])
    return found


async def ping(router: MemoryRouter, session: Session, id_: str) -> None:
    await router.send(session, iq("get", id_, HOST, PING))


def answers(router: MemoryRouter, session: Session) -> list[str]:
    return [envelope.id for envelope in router.link.of(session) if envelope.kind == IQ and envelope.type == "result"]


# --- with XEP-0198 ---


async def test_a_message_is_acknowledged_when_it_is_stored_and_a_request_is_answered_at_once(
    router: MemoryRouter,
) -> None:
    """4: <r/> MUST NOT be withheld; its answer says what is safe by then, and the rest is told when it is."""
    romeo, _ = await router.session("romeo"), await router.session("juliet")
    nonza(router, romeo, ENABLE)
    store_of(router).away = True
    await router.send(romeo, message("1", str(JULIET)))
    nonza(router, romeo, REQUEST)
    assert told(router, romeo) == ["enabled", "0"]
    await router.send(romeo, message("2", str(JULIET)))
    store_of(router).away = False
    await until(lambda: told(router, romeo) == ["enabled", "0", "2"])
    nonza(router, romeo, REQUEST)
    assert told(router, romeo)[-1] == "2"


async def test_what_needs_no_database_is_acknowledged_when_it_is_dealt_with(router: MemoryRouter) -> None:
    romeo = await router.session("romeo")
    nonza(router, romeo, ENABLE)
    await ping(router, romeo, "1")
    nonza(router, romeo, REQUEST)
    assert told(router, romeo) == ["enabled", "1"]


async def test_without_durability_nothing_waits_for_the_database() -> None:
    router = MemoryRouter(modules=MODULES, durability="none")
    romeo, _ = await router.session("romeo"), await router.session("juliet")
    nonza(router, romeo, ENABLE)
    store_of(router).away = True
    await router.send(romeo, message("1", str(JULIET)))
    nonza(router, romeo, REQUEST)
    assert told(router, romeo) == ["enabled", "1"]
    await router.stop()


async def test_a_message_waits_in_the_store_until_a_session_has_acknowledged_it(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    nonza(router, juliet, ENABLE)
    for id_ in ("1", "2"):
        await router.send(romeo, message(id_, str(JULIET)))
    await until(lambda: not store_of(router).waiting_bytes)
    assert await router.stores.messages.pending_count(JULIET) == 2
    nonza(router, juliet, ACK, "1")
    await until(lambda: not store_of(router).waiting_bytes)
    assert await router.stores.messages.pending_count(JULIET) == 1
    await router.end(juliet)
    phone = await router.session("juliet", "phone")
    (announced,) = router.hooks.session_available
    waiting = announced(phone)
    assert waiting is not None
    await waiting
    assert [envelope.number for envelope in router.link.of(phone)] == [2]


async def test_a_client_is_asked_by_count_and_by_time(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    nonza(router, juliet, ENABLE)
    for number in range(ASK_AFTER):
        await router.send(romeo, message(str(number), str(JULIET)))
    assert told(router, juliet) == ["enabled", "r"]
    await router.send(romeo, message("more", str(JULIET)))
    assert told(router, juliet) == ["enabled", "r"]
    router.acknowledgements.look()
    assert told(router, juliet) == ["enabled", "r", "r"]
    router.acknowledgements.look()
    assert told(router, juliet) == ["enabled", "r", "r"], "it is asked once"


async def test_a_count_that_is_too_high_ends_the_stream(router: MemoryRouter) -> None:
    """6: undefined-condition with <handled-count-too-high/>."""
    juliet = await router.session("juliet")
    nonza(router, juliet, ENABLE)
    nonza(router, juliet, ACK, "1")
    nonza(router, juliet, ACK, "x")
    assert [condition for _, condition in router.link.closed] == ["undefined-condition", "policy-violation"]


async def test_before_enable_and_for_those_who_are_bound_there_is_nothing_to_ask_or_resume(
    router: MemoryRouter,
) -> None:
    juliet = await router.session("juliet")
    for name in (REQUEST, ACK, RESUME):
        nonza(router, juliet, name, "0", previd="x")
    assert told(router, juliet) == ["failed"] * 3
    nonza(router, juliet, ENABLE)
    nonza(router, juliet, ENABLE)
    assert told(router, juliet) == ["failed"] * 3 + ["enabled", "failed"]
    assert [condition for _, condition in router.link.closed] == ["policy-violation"], "3: at most one attempt"


async def test_the_id_is_given_to_those_who_want_to_resume_and_max_is_the_lower_one(router: MemoryRouter) -> None:
    """3 and 5."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    nonza(router, romeo, ENABLE, resume="1", max="30")
    nonza(router, juliet, ENABLE, resume="true", max="1000")
    (_, first), (_, second) = router.link.nonzas
    assert f"id=\"{romeo.id}\" resume='true' max='30'".encode() in first
    assert (romeo.resume_seconds, juliet.resume_seconds) == (30, 60)
    assert juliet.id.encode() in second


@pytest.mark.parametrize("is_held", [False, True])
async def test_a_session_that_can_be_resumed_gets_a_second_holder_at_once(
    router: MemoryRouter, is_held: bool
) -> None:
    """The node behind a client may die a moment after it has come. The connector of its stream is one holder; that it
    is must not keep the other from being looked for."""
    romeo = await router.session("romeo")
    if is_held:
        romeo.holder = romeo.link
    covered: list[Session] = []
    router.acknowledgements.cover = covered.append
    nonza(router, romeo, ENABLE, resume="true")
    assert covered == [romeo]


async def test_who_never_acknowledges_is_cut_off_and_its_messages_wait(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "MAX_UNACKNOWLEDGED", 3)
    full: list[Session] = []
    router.routing.deliveries.on_full = full.append
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    nonza(router, juliet, ENABLE)
    for number in range(6):
        await router.send(romeo, message(str(number), str(JULIET)))
    assert full == [juliet], "told once"
    await until(lambda: not store_of(router).waiting_bytes)
    assert await router.stores.messages.pending_count(JULIET) == 6


# --- without XEP-0198 ---


async def test_answers_to_later_stanzas_wait_until_a_message_is_safe(router: MemoryRouter) -> None:
    """To a client without XEP-0198 an answer says that what it sent before has arrived."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    await ping(router, romeo, "before")
    store_of(router).away = True
    await router.send(romeo, message("1", str(JULIET)))
    await ping(router, romeo, "behind")
    assert answers(router, romeo) == ["before"]
    assert router.link.bodies(juliet) == ["1"], "delivery does not wait"
    await router.send(juliet, message("2", romeo.jid_text))
    assert router.link.bodies(romeo) == ["2"], "what others send does not wait"
    store_of(router).away = False
    await until(lambda: answers(router, romeo) == ["before", "behind"])


async def test_what_the_same_sender_sends_behind_a_withheld_answer_stays_behind_it(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    store_of(router).away = True
    await router.send(romeo, message("1", str(JULIET)))
    await router.send(romeo, iq("get", "question", juliet.jid_text, PING))
    await router.send(juliet, iq("result", "question", romeo.jid_text))
    await router.send(juliet, message("2", romeo.jid_text))
    assert router.link.of(romeo) == []
    store_of(router).away = False
    await until(lambda: [envelope.id for envelope in router.link.of(romeo)] == ["question", "2"])


async def test_a_client_confirms_what_it_got_by_answering_a_ping(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    await router.send(romeo, message("1", str(JULIET)))
    await until(lambda: juliet.pinged > 0)
    ((_, asked),) = router.link.pings
    await router.send(romeo, message("2", str(JULIET)))
    await router.send(juliet, iq("result", "another", HOST))
    await until(lambda: not store_of(router).waiting_bytes)
    assert await router.stores.messages.pending_count(JULIET) == 2
    await router.send(juliet, iq("error", asked, HOST))
    await until(lambda: not store_of(router).waiting_bytes)
    assert await router.stores.messages.pending_count(JULIET) == 1, "what came behind the ping is not confirmed by it"


async def test_a_silent_client_is_pinged_once(router: MemoryRouter) -> None:
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    await router.send(romeo, message("1", str(JULIET)))
    await until(lambda: juliet.pinged > 0)
    await router.send(romeo, message("2", str(JULIET)))
    router.acknowledgements.look()
    await until(lambda: not store_of(router).waiting_bytes)
    assert [jid for jid, _ in router.link.pings] == [juliet.jid_text]


async def test_a_message_that_comes_again_when_it_was_confirmed_waits_for_nobody(router: MemoryRouter) -> None:
    """The router that had taken it died before it was stored; its sender's router has sent it again."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    nonza(router, juliet, ENABLE, resume="true")
    sent = message("1", juliet.jid_text)
    await router.send(romeo, sent)
    again = Envelope.FromString(sent.SerializeToString())
    for h, waits in (("", 1), ("1", 0)):
        if h:
            nonza(router, juliet, ACK, h)
        await until(lambda: not store_of(router).waiting_bytes)
        store_of(router)._queue._remembered.clear()  # as if another router had seen the confirmation
        assert router.routing.route(again) is None
        await until(lambda: not store_of(router).waiting_bytes)
        assert await router.stores.messages.pending_count(JULIET) == waits
    assert len(router.link.of(juliet)) == 1


async def test_a_message_that_comes_again_while_its_session_moves_was_not_confirmed(router: MemoryRouter) -> None:
    """It waits for the session with what it gets meanwhile; if the client leaves, it is lost unless it is stored."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    nonza(router, juliet, ENABLE, resume="true")
    juliet.frozen = deque()
    sent = message("1", juliet.jid_text)
    await router.send(romeo, sent)
    again = Envelope.FromString(sent.SerializeToString())
    await until(lambda: not store_of(router).waiting_bytes)
    assert router.routing.route(again) is None
    await until(lambda: not store_of(router).waiting_bytes)
    assert await router.stores.messages.pending_count(JULIET) == 1


async def test_who_is_about_to_be_sent_away_gets_a_moment_to_confirm_what_it_got(router: MemoryRouter) -> None:
    """So an orderly restart offers nothing twice."""
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    for id_ in ("1", "2"):
        await router.send(romeo, message(id_, str(JULIET)))
    confirmed = router.tasks.spawn(router.acknowledgements.confirmed(juliet), "leaves")
    for count in (1, 2):
        # The first ping may have gone out ahead of the second message.
        if count > 1 and not juliet.outbound.queue:
            break
        await until(lambda count=count: len(router.link.pings) == count)
        assert not confirmed.done()
        await router.send(juliet, iq("result", router.link.pings[-1][1], HOST))
    await until(confirmed.done)
    await until(lambda: not store_of(router).waiting_bytes)
    assert await router.stores.messages.pending_count(JULIET) == 0


async def test_who_confirms_nothing_is_not_waited_for_for_long(
    router: MemoryRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acknowledgements, "LAST_CONFIRMATION", 0.05)
    romeo, juliet = await router.session("romeo"), await router.session("juliet")
    await router.send(romeo, message("1", str(JULIET)))
    await router.acknowledgements.confirmed(juliet)
    assert [jid for jid, _ in router.link.pings] == [juliet.jid_text]


async def test_what_is_withheld_goes_out_in_order_as_its_messages_become_safe(router: MemoryRouter) -> None:
    """Each answer waits for what was sent before it, and for no more."""
    romeo = await router.session("romeo")
    for _ in range(4):
        romeo.inbound.take()
    errors = [Envelope(kind=IQ, type="error", id=str(n), from_jid=HOST, stanza=b"<iq/>") for n in range(3)]
    for number, error in enumerate(errors, 1):
        romeo.inbound.number = number
        router.routing.deliveries.deliver(romeo, error)
    romeo.inbound.number = 4
    for number, wanted in ((2, []), (1, ["0", "1"]), (3, ["0", "1", "2"])):
        romeo.inbound.settle(number)
        router.acknowledgements._safe(romeo)
        assert [envelope.id for envelope in router.link.of(romeo)] == wanted
