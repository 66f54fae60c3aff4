"""XEP-0198: what is acknowledged when. Clause numbers are those of version 1.6.3."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.xmpp.errors import StanzaError
from tidings.xmpp.stream_management import (
    MODULUS,
    Inbound,
    Outbound,
    Sent,
    TooHigh,
    ack,
    count_of,
    enabled,
    failed,
    is_same,
    resumed,
    seconds_of,
)

MESSAGE = 1


def stanza(id_: str, body: str = "hi", delay: str = "") -> bytes:
    return f"<message id='{id_}' to='b@example.org'><body>{body}</body>{delay}</message>".encode()


def send(inbound: Inbound, id_: str, body: str = "hi") -> int:
    """As a router does with a stanza: a repetition keeps its number."""
    raw = stanza(id_, body)
    if inbound.may_repeat and (number := inbound.repeated(MESSAGE, id_, "b@example.org", raw)):
        return number
    number = inbound.take()
    if inbound.counts:
        inbound.count(Sent(number, MESSAGE, id_, "b@example.org", raw))
    return number


# --- what comes from the client ---


def test_h_counts_from_enable_and_only_what_is_safe() -> None:
    """4: h starts at zero when stream management is enabled."""
    inbound = Inbound()
    inbound.settle(send(inbound, "before"))
    inbound.enable()
    first, second = send(inbound, "1"), send(inbound, "2")
    assert inbound.h == 0
    assert inbound.settle(second)
    assert inbound.h == 0, "what is behind an unsafe one is not acknowledged"
    inbound.settle(first)
    assert (inbound.h, inbound.is_behind, inbound.safe_through) == (2, False, 3)


def test_a_stanza_is_safe_when_all_that_it_waits_for_has_happened() -> None:
    inbound = Inbound()
    inbound.enable()
    number = send(inbound, "1")
    inbound.expect(number)
    inbound.expect(number)
    assert [inbound.settle(number) for _ in range(3)] == [False, False, True]
    assert not inbound.settle(number), "what is told twice changes nothing"
    assert inbound.h == 1


def test_all_below_the_first_unsafe_one_is_safe() -> None:
    inbound = Inbound()
    for id_ in "1234":
        send(inbound, id_)
    assert inbound.safe_through == 0
    for number in (1, 2, 4):
        inbound.settle(number)
    assert inbound.safe_through == 2
    inbound.settle(3)
    assert inbound.safe_through == 4


def test_h_goes_round_to_zero() -> None:
    """4: behind 2^32 - 1."""
    inbound = Inbound()
    inbound.enable()
    inbound.handled = MODULUS - 1
    inbound.settle(send(inbound, "1"))
    assert inbound.h == 0


def test_a_repetition_after_resumption_keeps_its_number() -> None:
    """5, and the answer to what it was passed on as."""
    inbound = Inbound()
    inbound.enable()
    numbers = [send(inbound, id_) for id_ in ("1", "2", "3")]
    inbound.settle(numbers[0])
    inbound.resume()
    assert inbound.h == 1
    assert [send(inbound, id_) for id_ in ("2", "3", "4")] == [2, 3, 4]
    for number in (2, 3, 4):
        inbound.settle(number)
    assert inbound.h == 4


def test_who_repeats_only_some_is_counted_by_what_comes() -> None:
    """5 says SHOULD: presence is mostly not sent again."""
    inbound = Inbound()
    inbound.enable()
    for id_ in ("message", "presence", "another"):
        send(inbound, id_)
    inbound.resume()
    assert (send(inbound, "message"), send(inbound, "another"), send(inbound, "new")) == (1, 3, 4)
    for number in (1, 2, 3, 4):
        inbound.settle(number)
    assert inbound.h == 3


def test_a_repetition_of_what_has_become_safe_meanwhile_counts_at_once() -> None:
    inbound = Inbound()
    inbound.enable()
    send(inbound, "1")
    inbound.resume()
    inbound.settle(1)
    assert inbound.h == 0
    assert send(inbound, "1") == 1
    assert inbound.h == 1


def test_what_only_looks_alike_is_new() -> None:
    inbound = Inbound()
    inbound.enable()
    send(inbound, "1", "one")
    inbound.resume()
    assert send(inbound, "1", "another") == 2


def test_a_delay_makes_no_other_stanza() -> None:
    """8: clients SHOULD add one to what they send again."""
    delay = "<delay xmlns='urn:xmpp:delay' stamp='2026-01-01T00:00:00Z'/>"
    assert is_same(stanza("1"), stanza("1", delay=delay))
    assert is_same(stanza("1"), stanza("1").replace(b"'", b'"'))
    assert not is_same(stanza("1"), stanza("1", "other"))
    assert not is_same(stanza("1"), stanza("1", delay="<x xmlns='y'/>"))


@given(
    st.lists(st.sampled_from(("send", "settle", "resume")), max_size=60),
    st.randoms(use_true_random=False),
)
def test_h_is_never_more_than_what_is_safe_and_in_the_end_all(steps: list[str], random) -> None:  # type: ignore[no-untyped-def]
    """A client that sends all again which is not acknowledged ends with h = all that it has sent, each once."""
    inbound = Inbound()
    inbound.enable()
    sent: list[str] = []
    numbers: dict[str, int] = {}
    for step in steps:
        if step == "send":
            sent.append(str(len(sent)))
            numbers[sent[-1]] = send(inbound, sent[-1])
        elif step == "settle" and inbound.unsafe():
            inbound.settle(random.choice(inbound.unsafe()))
        elif step == "resume":
            inbound.resume()
            for id_ in sent[inbound.h :]:
                assert send(inbound, id_) == numbers[id_]
        assert all(numbers[id_] not in inbound.unsafe() for id_ in sent[: inbound.h])
    for number in inbound.unsafe():
        inbound.settle(number)
    assert inbound.h == len(sent)
    assert sorted(numbers.values()) == list(range(1, len(sent) + 1))


# --- what goes to the client ---


def outbound(count: int) -> Outbound[int]:
    made: Outbound[int] = Outbound()
    made.enable()
    for number in range(1, count + 1):
        made.sent = number
        made.keep(number)
    return made


def test_what_is_acknowledged_leaves_the_queue() -> None:
    queue = outbound(5)
    assert queue.acknowledge(0) == []
    assert queue.acknowledge(2) == [1, 2]
    assert queue.acknowledge(2) == []
    assert queue.acknowledge(1) == [], "an older count came late"
    assert queue.acknowledge(5) == [3, 4, 5]
    assert not queue.queue


def test_more_than_was_sent_is_refused_and_changes_nothing() -> None:
    """6."""
    queue = outbound(8)
    with pytest.raises(TooHigh) as raised:
        queue.acknowledge(10)
    assert b"<handled-count-too-high xmlns='urn:xmpp:sm:3' h='10' send-count='8'/>" in raised.value.to_xml()
    assert queue.acknowledge(8) == list(range(1, 9))


def test_what_went_before_enable_is_confirmed_with_the_first_behind_it() -> None:
    queue: Outbound[str] = Outbound()
    for text in ("a", "b"):
        queue.sent += 1
        queue.keep(text)
    queue.enable()
    queue.sent += 1
    queue.keep("c")
    assert queue.acknowledge(0) == []
    assert queue.acknowledge(1) == ["a", "b", "c"]


@given(st.integers(0, 3), st.lists(st.integers(1, 5), max_size=20))
def test_counts_go_round_in_both_directions(before: int, portions: list[int]) -> None:
    """4: 2^32 is followed by 0."""
    queue: Outbound[int] = Outbound()
    queue.base = 7
    queue.acknowledged = queue.sent = 7 + MODULUS - before
    for portion in portions:
        for _ in range(portion):
            queue.sent += 1
            queue.keep(queue.sent)
        assert len(queue.acknowledge((queue.sent - queue.base) % MODULUS)) == portion


# --- the elements ---


@pytest.mark.parametrize("text", ["", "-1", "x", "1.0", " 1", str(MODULUS), "٣"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(StanzaError):
        count_of(text)


def test_the_elements_are_those_of_the_specification() -> None:
    assert enabled() == b"<enabled xmlns='urn:xmpp:sm:3'/>"
    assert enabled("i", 300, "[::1]:5222") == (
        b"<enabled xmlns='urn:xmpp:sm:3' id=\"i\" resume='true' max='300' location=\"[::1]:5222\"/>"
    )
    assert resumed("i", 3) == b"<resumed xmlns='urn:xmpp:sm:3' previd=\"i\" h='3'/>"
    assert failed("item-not-found", 4) == (
        b"<failed xmlns='urn:xmpp:sm:3' h='4'><item-not-found xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></failed>"
    )
    assert ack(0) == b"<a xmlns='urn:xmpp:sm:3' h='0'/>"
    assert count_of(str(MODULUS - 1)) == MODULUS - 1
    assert [seconds_of(text) for text in ("", "0", "60", "-1")] == [None, None, 60, None]


def test_what_is_known_to_be_safe_is_not_dealt_with_again_behind_a_take_over() -> None:
    """5: the client repeats what is not in `h`; the router that had it is gone."""
    before = Inbound()
    before.enable()
    numbers = [send(before, id_) for id_ in "abc"]
    before.settle(numbers[1])
    before.resume()
    kept = [sent._replace(safe=before.is_known_done(sent)) for sent in before.kept()]
    assert [sent.safe for sent in kept] == [False, True, False]
    after = Inbound()
    after.enable()
    after.number = 3
    after.carry_on(kept, doubtful=True)
    assert [after.is_known_done(sent) for sent in after.kept()] == [False, True, False], "nor by the next one"
    revived = []
    for id_ in "abc":
        number, after.revived = send(after, id_), 0
        revived.append(number in after.unsafe())
    assert revived == [True, False, True]
    after.settle(1)
    assert after.handled == 2


def test_what_has_its_answer_in_a_record_is_not_dealt_with_again_though_it_is_not_safe_yet() -> None:
    """Drills, seed 0: those that had the copies were silent, and the next one began behind the answer. The request got
    a second one from the router that took over (RFC 6120 8.2.3: one)."""
    before = Inbound()
    before.enable()
    first, second = send(before, "a"), send(before, "b")
    before.answered(second)
    assert before.unsafe() == [first, second]
    before.resume()
    after = Inbound()
    after.enable()
    after.number = 2
    after.carry_on([sent._replace(safe=before.is_known_done(sent)) for sent in before.kept()], doubtful=True)
    assert [send(after, id_) for id_ in "ab"] == [first, second]
    assert after.unsafe() == [first]


def test_what_was_answered_and_is_dealt_with_anew_is_not_done_before_its_next_answer() -> None:
    inbound = Inbound()
    inbound.enable()
    number = send(inbound, "a")
    inbound.answered(number)
    inbound.settle(number)
    inbound.answered(number)
    inbound.carry_on([Sent(number, 1, "a", "", b"<iq/>")], doubtful=True)
    assert inbound.repeated(1, "a", "", b"<iq/>") == number
    assert not inbound.is_done(number)


def test_what_was_dealt_with_behind_a_take_over_is_not_dealt_with_again_when_its_client_resumes() -> None:
    """A request would be answered by its receiver once, and then by its deadline."""
    inbound = Inbound()
    inbound.enable()
    inbound.carry_on([], doubtful=True)
    first, second = send(inbound, "a"), send(inbound, "b")
    inbound.settle(second)
    inbound.resume()
    assert (send(inbound, "a"), send(inbound, "b")) == (first, second)
    assert inbound.revived == 0
    assert inbound.unsafe() == [first]


def test_what_was_repeated_once_behind_a_take_over_is_known_from_then_on() -> None:
    before = Inbound()
    before.enable()
    for id_ in "ab":
        send(before, id_)
    before.resume()
    after = Inbound()
    after.enable()
    after.number = 2
    after.carry_on(before.kept(), doubtful=True)
    for id_ in "ab":
        send(after, id_)
    assert after.revived == 2
    after.settle(2)
    after.resume()
    after.revived = 0
    for id_ in "ab":
        send(after, id_)
    assert after.revived == 0
