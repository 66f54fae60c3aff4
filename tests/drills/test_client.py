"""The drill client against a scripted server: what it writes down is exactly what happened (XEP-0198)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any
from xml.etree.ElementTree import Element

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.drills.client import Client
from tests.drills.conversation import COUNTER, REQUEST_EVERY, Habits
from tests.drills.history import (
    Acknowledged,
    Answered,
    Available,
    Bounced,
    Confirmed,
    Cut,
    Dropped,
    Ended,
    History,
    Managed,
    Received,
    Resumed,
    Saw,
    Sent,
)
from tests.drills.scripted_peer import Connection, ScriptedPeer
from tidings.xmpp import ns

TO = "b@localhost/1"
ALL = Habits()
MESSAGES_ONLY = Habits(resends="messages")
PLAIN = Habits(managed=False, resends_after_failure=False)


@pytest.fixture
async def peer() -> AsyncIterator[ScriptedPeer]:
    async with ScriptedPeer() as started:
        yield started


class Bench:
    """A client, its history, and its server."""

    def __init__(self, peer: ScriptedPeer, habits: Habits = ALL, *addresses: str) -> None:
        self.history = History()
        self.peer = peer
        places = addresses or ("127.0.0.1",)
        self.client = Client(self.history, "a", "1", places, peer.port, Random(1), habits)

    async def __aenter__(self) -> Bench:
        self.client.start()
        self.connection = await self.peer.accept()
        await (self.connection.session if self.client.habits.managed else self.connection.plain_session)()
        await self.client.ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.stop()

    def told(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.history if isinstance(event, kind)]

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not true():
                await asyncio.sleep(0.005)

    async def next(self) -> Connection:
        """The next connection, logged in."""
        self.connection = await self.peer.accept()
        await self.connection.log_in()
        return self.connection

    async def stanzas(self, count: int) -> list[Element]:
        """What the client wrote next, requests for acknowledgements left out."""
        found: list[Element] = []
        while len(found) < count:
            element = await self.connection.read()
            if not element.tag.startswith(f"{{{ns.SM}}}"):
                found.append(element)
        return found

    async def asked_h(self) -> int:
        """The h that the client answers to a request."""
        self.connection.request()
        while not (element := await self.connection.read()).tag.endswith("}a"):
            pass
        return int(element.get("h", "-1"))


# --- counting ---


async def test_what_the_server_acknowledges_is_what_was_written_first(peer: ScriptedPeer) -> None:
    """XEP-0198 4: its own presence counts, too; it is the first stanza behind <enable/>."""
    async with Bench(peer) as bench:
        keys = [bench.client.send(TO) for _ in range(3)]
        bench.connection.acknowledge(3)
        await bench.until(lambda: bench.told(Acknowledged))
        assert [event.keys for event in bench.told(Acknowledged)] == [tuple(keys[:2])]
        bench.connection.acknowledge(4)
        await bench.until(lambda: len(bench.told(Acknowledged)) == 2)
        assert bench.told(Acknowledged)[1].keys == (keys[2],)
        assert [event.key for event in bench.told(Sent)] == keys


async def test_an_h_that_is_too_high_is_a_complaint_and_acknowledges_nothing(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.client.send(TO)
        bench.connection.acknowledge(3)
        await bench.until(lambda: bench.client.complaints)
        assert bench.told(Acknowledged) == []


async def test_its_h_is_the_number_of_stanzas_that_came_and_answers_confirm_them(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.connection.write(bench.connection.message("1"))
        bench.connection.write("<presence from='b@localhost/1'/>")
        bench.connection.write(bench.connection.message("2"))
        assert await bench.asked_h() == 3
        assert [event.keys for event in bench.told(Confirmed)] == [("1", "2")]
        assert [event.key for event in bench.told(Received)] == ["1", "2"]
        # Acknowledgements and requests are no stanzas.
        assert await bench.asked_h() == 3


async def test_what_comes_before_enabled_is_not_counted(peer: ScriptedPeer) -> None:
    """XEP-0198 4: the counter starts after <enabled/>."""
    bench = Bench(peer)
    bench.client.start()
    bench.connection = await peer.accept()
    await bench.connection.log_in()
    await bench.connection.bind()
    bench.connection.write(bench.connection.message("early"))
    await bench.connection.enable()
    await bench.connection.expect("presence")
    bench.connection.write(bench.connection.message("1"))
    assert await bench.asked_h() == 1
    assert [event.key for event in bench.told(Received)] == ["early", "1"]
    await bench.client.stop()


async def test_both_counters_go_from_the_last_number_to_zero(peer: ScriptedPeer) -> None:
    """XEP-0198 4: modulo 2^32."""
    async with Bench(peer) as bench:
        bench.connection.acknowledge(1)
        await bench.until(lambda: not bench.client.unacknowledged)
        bench.client.handled = bench.client.acknowledged = COUNTER - 1
        key = bench.client.send(TO)
        bench.connection.acknowledge(0)
        await bench.until(lambda: bench.told(Acknowledged))
        assert bench.told(Acknowledged)[0].keys == (key,)
        bench.connection.write(bench.connection.message("1"))
        assert await bench.asked_h() == 0


async def test_an_acknowledgement_is_requested_after_some_stanzas_and_after_some_time(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        for _ in range(REQUEST_EVERY - 1):  # the presence was the first
            bench.client.send(TO)
        kinds = [(await bench.connection.read()).tag.partition("}")[2] for _ in range(REQUEST_EVERY)]
        assert kinds == ["message"] * (REQUEST_EVERY - 1) + ["r"]
        bench.connection.acknowledge(REQUEST_EVERY)
        await bench.connection.expect("r")


# --- cuts ---


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 200))
async def test_a_stanza_that_was_cut_off_in_its_midst_is_not_counted_wherever_the_cut_is(cut: int) -> None:
    async with ScriptedPeer() as peer, Bench(peer) as bench:
        first, second = bench.connection.message("1"), bench.connection.message("2")
        whole = (cut >= len(first)) + (cut >= len(first + second))
        bench.connection.write((first + second)[:cut])
        bench.connection.stream._transport.close()  # type: ignore[union-attr]
        await bench.until(lambda: bench.told(Cut))
        connection = await bench.next()
        assert (await connection.resume(1)).get("h") == str(whole)
        # What it goes on with is not a piece of what was cut.
        connection.write(connection.message("3"))
        await bench.until(lambda: len(bench.told(Received)) == whole + 1)
        assert bench.told(Received)[-1].key == "3"


async def test_bytes_behind_its_own_cut_do_not_count(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        first = bench.connection.message("1")
        bench.client.cut_after(received=len(first) + 60)
        bench.connection.write(first + bench.connection.message("2") + bench.connection.message("3"))
        await bench.until(lambda: bench.told(Cut))
        assert [event.key for event in bench.told(Received)] == ["1"]
        connection = await bench.next()
        assert (await connection.resume(1)).get("h") == "1"


async def test_a_message_that_it_was_cut_off_in_was_sent_but_did_not_arrive(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.client.cut_after(sent=50)
        key = bench.client.send(TO)
        await bench.until(lambda: bench.told(Cut))
        connection = await bench.next()
        await connection.resume(1)
        again = (await bench.stanzas(1))[0]
        assert again.get("id") == key
        assert [event.key for event in bench.told(Sent)] == [key]


# --- resumption ---


async def test_what_the_server_has_not_handled_is_sent_again_in_order(peer: ScriptedPeer) -> None:
    """XEP-0198 5: <resumed h=…/> acknowledges as <a/> does; all behind it is sent again, of every kind."""
    async with Bench(peer) as bench:
        keys = [bench.client.send(TO), bench.client.send(TO), bench.client.ask(TO), bench.client.send(TO)]
        bench.connection.stream.abort()
        connection = await bench.next()
        asked = await connection.resume(2)
        assert (asked.get("previd"), asked.get("h")) == ("r1", "0")
        assert [stanza.get("id") for stanza in await bench.stanzas(3)] == keys[1:]
        connection.acknowledge(5)
        await bench.until(lambda: len(bench.told(Acknowledged)) == 2)
        assert [event.keys for event in bench.told(Acknowledged)] == [(keys[0],), (keys[1], keys[3])]
        assert len(bench.told(Sent)) == 3, "sending again is no new message"
        assert len(bench.told(Resumed)) == 1


async def test_one_kind_of_client_sends_messages_again_only_and_goes_on_counting(peer: ScriptedPeer) -> None:
    async with Bench(peer, MESSAGES_ONLY) as bench:
        keys = [bench.client.ask(TO), bench.client.send(TO)]
        bench.connection.stream.abort()
        connection = await bench.next()
        await connection.resume(1)
        assert [stanza.get("id") for stanza in await bench.stanzas(1)] == keys[1:]
        assert bench.told(Dropped)[0].keys == (keys[0],)
        connection.acknowledge(2)
        await bench.until(lambda: bench.told(Acknowledged))
        assert bench.told(Acknowledged)[0].keys == (keys[1],)


async def test_what_had_come_is_confirmed_by_resuming(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.connection.write(bench.connection.message("1"))
        await bench.until(lambda: bench.told(Received))
        bench.connection.stream.abort()
        assert bench.told(Confirmed) == []
        connection = await bench.next()
        assert (await connection.expect("resume")).get("h") == "1"
        await bench.until(lambda: bench.told(Confirmed))
        connection.stream.abort()
        connection = await bench.next()
        assert (await connection.resume(1)).get("h") == "1", "whether it was answered or not"
        connection.write(connection.message("2"))
        assert await bench.asked_h() == 2


async def test_what_comes_with_resumed_in_one_piece_is_counted(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.connection.stream.abort()
        connection = await bench.next()
        await connection.expect("resume")
        connection.write(f"<resumed xmlns='{ns.SM}' h='1' previd='r1'/>".encode() + connection.message("1"))
        assert await bench.asked_h() == 1


async def test_it_resumes_at_another_address_when_one_is_gone() -> None:
    async with ScriptedPeer("127.0.0.2") as peer:
        other = ScriptedPeer("127.0.0.3")
        await other.start(peer.port)
        async with Bench(peer, ALL, "127.0.0.2", "127.0.0.3") as bench:
            key = bench.client.send(TO)
            await peer.stop()
            bench.connection.stream.abort()
            bench.peer = other
            connection = await bench.next()
            await connection.resume(1)
            assert (await bench.stanzas(1))[0].get("id") == key
        await other.stop()


async def test_a_resumption_that_breaks_off_is_tried_again_with_the_same_h(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.connection.write(bench.connection.message("1"))
        await bench.until(lambda: bench.told(Received))
        bench.connection.stream.abort()
        connection = await bench.next()
        await connection.expect("resume")
        connection.stream.abort()
        connection = await bench.next()
        assert (await connection.resume(1)).get("h") == "1"
        await bench.client.ready()
        assert len(bench.told(Cut)) == len(bench.told(Resumed)) == 1


async def test_after_a_failed_resumption_the_rest_is_sent_in_a_new_session(peer: ScriptedPeer) -> None:
    """XEP-0198 5: <failed h=…/> still acknowledges, and a resource can be bound in the same stream."""
    async with Bench(peer) as bench:
        keys = [bench.client.send(TO), bench.client.send(TO), bench.client.ask(TO)]
        bench.connection.stream.abort()
        connection = await bench.next()
        await connection.expect("resume")
        connection.write(f"<failed xmlns='{ns.SM}' h='2'><item-not-found xmlns='{ns.STANZA_ERRORS}'/></failed>")
        await connection.bind()
        await connection.enable("r2")
        assert [stanza.get("id") for stanza in await bench.stanzas(2)] == [None, keys[1]], "presence, and the rest"
        assert [event.keys for event in bench.told(Acknowledged)] == [(keys[0],)]
        assert [(event.clean, event.refused) for event in bench.told(Ended)] == [(False, True)]
        first, second = [event for event in bench.told(Sent) if event.key == keys[1]]
        assert first.session != second.session
        assert first.body == second.body
        assert bench.client.handled == 0


async def test_it_asks_for_its_resumption_time_and_writes_down_what_it_got(peer: ScriptedPeer) -> None:
    bench = Bench(peer, Habits(resumption=5))
    bench.client.start()
    connection = await peer.accept()
    await connection.log_in()
    await connection.bind()
    assert (await connection.enable(more="max='7'")).get("max") == "5"
    await bench.until(lambda: bench.told(Managed))
    assert bench.told(Managed)[0].resumption == 7.0
    await bench.client.stop()


async def test_a_silent_server_is_given_up_and_the_pause_is_measured(
    peer: ScriptedPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.drills.client.SILENCE", 0.3)
    async with Bench(peer) as bench:
        await bench.until(lambda: bench.told(Cut))
        await (await bench.next()).resume(1)
        await bench.client.ready()
        assert [pause > 0 for _, pause in bench.client.pauses] == [True]


# --- closing ---


async def test_a_proper_close_confirms_and_ends_the_session(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.connection.write(bench.connection.message("1"))
        await bench.until(lambda: bench.told(Received))
        closing = asyncio.create_task(bench.client.close())
        while (element := await bench.connection.read()).tag != f"{{{ns.SM}}}a":
            pass
        assert element.get("h") == "1"
        bench.connection.write("</stream:stream>")
        await closing
        assert [event.clean for event in bench.told(Ended)] == [True]
        assert bench.told(Confirmed)[0].keys == ("1",)
        assert bench.told(Cut) == []


async def test_one_that_vanishes_comes_back_only_when_it_is_called(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.client.vanish(silently=True)
        assert len(bench.told(Cut)) == 1
        assert not bench.connection.stream.lost, "the server is not told"
        bench.connection.write(bench.connection.message("1"))
        bench.client.call_back()
        connection = await bench.next()
        assert (await connection.resume(1)).get("h") == "0"


async def test_the_time_for_which_it_stays_away_is_no_pause(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.client.vanish()
        called = bench.history.now()
        while bench.history.now() == called:
            await asyncio.sleep(0)
        bench.client.call_back()
        await (await bench.next()).resume(0)
        await bench.until(lambda: bench.client.pauses)
        ((since, _),) = bench.client.pauses
        assert since > called


# --- without XEP-0198 ---


async def test_without_0198_the_answer_to_a_later_request_acknowledges(peer: ScriptedPeer) -> None:
    async with Bench(peer, PLAIN) as bench:
        first = bench.client.send(TO)
        question = bench.client.ask("localhost")
        bench.client.send(TO)
        bench.connection.write(f"<iq type='result' from='localhost' id='{question}'/>")
        await bench.until(lambda: bench.told(Answered))
        assert [event.keys for event in bench.told(Acknowledged)] == [(first,)]


async def test_without_0198_an_error_for_a_later_message_acknowledges_and_is_written_down(peer: ScriptedPeer) -> None:
    async with Bench(peer, PLAIN) as bench:
        first, second = bench.client.send(TO), bench.client.send(TO)
        error = f"<error type='cancel'><service-unavailable xmlns='{ns.STANZA_ERRORS}'/></error>"
        bench.connection.write(f"<message type='error' from='{TO}' id='{second}'>{error}</message>")
        await bench.until(lambda: bench.told(Bounced))
        assert [(event.key, event.condition) for event in bench.told(Bounced)] == [(second, "service-unavailable")]
        assert [event.keys for event in bench.told(Acknowledged)] == [(first,)]


async def test_without_0198_the_answer_to_the_servers_ping_confirms_what_came_before(peer: ScriptedPeer) -> None:
    async with Bench(peer, PLAIN) as bench:
        bench.connection.write(bench.connection.message("1"))
        # Somebody else's ping proves nothing to the server.
        bench.connection.write(f"<iq type='get' id='p' from='b@localhost/1'><ping xmlns='{ns.PING}'/></iq>")
        while (await bench.connection.read()).get("id") != "p":
            pass
        assert bench.told(Confirmed) == []
        bench.connection.write(f"<iq type='get' id='s' from='localhost'><ping xmlns='{ns.PING}'/></iq>")
        while (answer := await bench.connection.read()).get("id") != "s":
            pass
        assert answer.get("type") == "result"
        assert [event.keys for event in bench.told(Confirmed)] == [("1",)]


async def test_without_0198_a_lost_stream_ends_the_session_and_nothing_is_sent_again(peer: ScriptedPeer) -> None:
    async with Bench(peer, PLAIN) as bench:
        bench.client.send(TO)
        bench.connection.stream.abort()
        bench.connection = await peer.accept()
        await bench.connection.plain_session()
        await bench.client.ready()
        assert len(bench.told(Sent)) == len(bench.told(Ended)) == 1
        assert bench.told(Cut) == []


# --- the rest ---


async def test_a_session_is_available_when_its_own_presence_has_come_back(peer: ScriptedPeer) -> None:
    """RFC 6121 4.2.2; what another device of the account shows, and what comes later, is something else."""
    async with Bench(peer) as bench:
        bench.connection.write("<presence from='a@localhost/2'/><presence from='b@localhost/1'/>")
        assert await bench.asked_h() == 2
        assert bench.told(Available) == []
        bench.connection.write("<presence from='a@localhost/1'/><presence from='a@localhost/1'/>")
        assert await bench.asked_h() == 4
        assert [event.session for event in bench.told(Available)] == [bench.client.session]


async def test_presence_of_others_is_written_down_and_requests_are_agreed_to(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.connection.write("<presence from='a@localhost/2'/><presence from='b@localhost/1'/>")
        bench.connection.write("<presence from='b@localhost/1' type='unavailable'/>")
        bench.connection.write("<presence from='b@localhost' type='subscribe'/>")
        agreed = (await bench.stanzas(1))[0]
        assert (agreed.get("type"), agreed.get("to")) == ("subscribed", "b@localhost")
        assert [(event.of, event.available) for event in bench.told(Saw)] == [
            ("b@localhost/1", True), ("b@localhost/1", False),
        ]  # fmt: skip


async def test_it_answers_the_requests_of_its_like_and_refuses_others(peer: ScriptedPeer) -> None:
    async with Bench(peer) as bench:
        bench.connection.write(f"<iq type='get' id='1' from='{TO}'><query xmlns='urn:example:drill'/></iq>")
        bench.connection.write(f"<iq type='set' id='2' from='{TO}'><query xmlns='urn:example:other'/></iq>")
        answers = await bench.stanzas(2)
        assert [(one.get("id"), one.get("type"), one.get("to")) for one in answers] == [
            ("1", "result", TO), ("2", "error", TO),
        ]  # fmt: skip
