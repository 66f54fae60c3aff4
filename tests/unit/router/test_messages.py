"""What is pure about messages: their ids, which of them are kept, and the queue of the store."""

from __future__ import annotations

import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router import message_queue
from services.router.message_queue import WriteQueue
from services.router.messages import TOGETHER, Message, id_bytes, id_text, message_id, wanted
from tidings.xmpp.jid import Jid

KEY = bytes(range(32))
ROMEO = Jid.parse("romeo@example.org")
JULIET = Jid.parse("juliet@example.org")
LIMITS = (100, 1_000_000, 100)


def hint(name: str) -> str:
    return f"{{urn:xmpp:hints}}{name}"


def state(name: str) -> str:
    return f"{{http://jabber.org/protocol/chatstates}}{name}"


# --- ids ---


def test_an_id_is_the_same_for_whoever_makes_it_and_unknown_to_who_has_no_key() -> None:
    """XEP-0313 3: unpredictable."""
    id_ = message_id(KEY, "romeo@example.org", "session", 7)
    assert len(id_) == 16
    assert id_ == message_id(bytes(KEY), "romeo@example.org", "session", 7)
    assert id_ != message_id(KEY[::-1], "romeo@example.org", "session", 7)


@given(
    st.tuples(st.text(), st.text(min_size=1), st.integers(1)),
    st.tuples(st.text(), st.text(min_size=1), st.integers(1)),
)
def test_ids_of_different_messages_differ(one: tuple[str, str, int], other: tuple[str, str, int]) -> None:
    # Neither part of an address can have a zero byte.
    one, other = ((account.replace("\0", ""), origin, number) for account, origin, number in (one, other))
    try:
        assert (message_id(KEY, *one) == message_id(KEY, *other)) == (one == other)
    except UnicodeEncodeError:
        pass  # no text that XML has


def test_ids_of_a_session_s_messages_begin_alike_for_a_while_so_that_they_are_near_each_other_in_the_index() -> None:
    ids = [message_id(KEY, "romeo@example.org", "session", number) for number in range(TOGETHER, 3 * TOGETHER)]
    assert len({id_[:4] for id_ in ids[:TOGETHER]}) == 1
    assert len({id_[:4] for id_ in ids}) == 2
    assert len({id_[4:] for id_ in ids}) == len(ids)
    assert message_id(KEY, "juliet@example.org", "session", TOGETHER)[:4] != ids[0][:4]
    assert message_id(KEY, "romeo@example.org", "other", TOGETHER)[:4] != ids[0][:4]


def test_messages_without_origin_or_number_have_ids_of_their_own() -> None:
    assert message_id(KEY, "a@b", "", 0) != message_id(KEY, "a@b", "", 0)
    assert message_id(KEY, "a@b", "component", 0) != message_id(KEY, "a@b", "component", 0)


@given(st.binary(min_size=16, max_size=16))
def test_the_text_of_an_id_can_stand_in_a_url_and_is_read_back(id_: bytes) -> None:
    text = id_text(id_)
    assert len(text) == 22
    assert text.replace("-", "").replace("_", "").isalnum()
    assert text.isascii()
    assert id_bytes(text) == id_


@given(st.text() | st.from_regex(r"[A-Za-z0-9+/_=-]{20,24}", fullmatch=True))
def test_one_id_has_one_text(text: str) -> None:
    id_ = id_bytes(text)
    assert id_ is None or id_text(id_) == text


# --- what is kept ---

BOTH, PENDING, ARCHIVED, NEITHER = (True, True), (True, False), (False, True), (False, False)


@pytest.mark.parametrize(
    ("type_", "children", "kept"),
    [
        # RFC 6121 8.5.2.2.1, XEP-0160 3: by type; 5.2.2: an unknown one counts as normal.
        ("chat", ["body"], BOTH),
        ("normal", ["subject", "body"], BOTH),
        ("", ["body"], BOTH),
        ("greeting", ["body"], BOTH),
        ("headline", ["body"], NEITHER),
        ("groupchat", ["body"], NEITHER),
        ("error", ["body"], NEITHER),
        # XEP-0160 3: only chat states.
        ("chat", [state("composing")], NEITHER),
        ("chat", [state("gone"), "thread", hint("no-store"), hint("no-copy"), "{urn:xmpp:sid:0}origin-id"], NEITHER),
        ("chat", [state("active"), "body"], BOTH),
        ("chat", [state("active"), "{some:other}thing"], PENDING),
        ("chat", ["thread"], PENDING),
        ("chat", [], PENDING),
        # XEP-0313 6.1.1: what is archived.
        ("chat", ["subject"], PENDING),
        ("chat", ["{urn:xmpp:receipts}received"], BOTH),
        ("chat", ["{urn:xmpp:receipts}request"], PENDING),
        ("chat", ["{urn:xmpp:chat-markers:0}displayed"], BOTH),
        ("chat", ["{eu.siacs.conversations.axolotl}encrypted", "{urn:xmpp:hints}store"], BOTH),
        ("chat", ["{eu.siacs.conversations.axolotl}encrypted"], BOTH),
        ("chat", ["{urn:xmpp:omemo:2}encrypted"], BOTH),
        ("chat", ["{urn:xmpp:openpgp:0}openpgp"], BOTH),
        # XEP-0334 4.1, 4.2, 4.4.
        ("chat", ["body", hint("no-store")], PENDING),
        ("chat", ["body", hint("no-permanent-store")], PENDING),
        ("chat", ["body", hint("no-store"), hint("store")], PENDING),
        ("chat", ["body", hint("no-copy")], BOTH),
        ("chat", ["{some:other}thing", hint("store")], BOTH),
        ("chat", [state("active"), hint("store")], BOTH),
        ("error", [hint("store")], NEITHER),
    ],
)
def test_what_waits_and_what_is_archived_goes_by_type_and_content(
    type_: str, children: list[str], kept: tuple[bool, bool]
) -> None:
    assert wanted(type_, children) == kept
    assert wanted(type_, tuple(children)) == kept


@given(st.sampled_from(["chat", "normal", "", "headline", "groupchat", "error"]), st.lists(st.text()))
def test_what_is_not_stored_by_type_is_not_archived(type_: str, children: list[str]) -> None:
    pending, archived = wanted(type_, children)
    assert pending or not archived


def test_to_ask_whether_a_message_is_kept_costs_next_to_nothing() -> None:
    assert min(timeit.repeat(lambda: wanted("chat", ["body"]), number=1000, repeat=20)) < 1000 * 5e-6


# --- the queue ---


class Told:
    """Who waits for messages, and what they were told, in order."""

    def __init__(self) -> None:
        self.queue = WriteQueue()
        self.told: list[tuple[int, Exception | None]] = []
        self._number = 0

    def put(
        self, id_: int, pending: bool = True, archived: bool = True, urgent: bool = False, account: Jid = ROMEO
    ) -> int:
        number = self._number
        self._number += 1
        message = Message(account, bytes([id_]), "p", "o", id_, "f", 0, b"12345", pending, archived)
        self.queue.put(message, lambda error: self.told.append((number, error)), 10.0 + number, urgent)
        return number


def test_a_group_is_bounded_by_number_and_bytes_but_has_one_at_least() -> None:
    told = Told()
    for id_ in range(5):
        told.put(id_)
    assert len(told.queue.take(2, 1000, 0)[0]) == 2
    told.queue.written()
    assert len(told.queue.take(10, 11, 0)[0]) == 2
    told.queue.written()
    assert len(told.queue.take(10, 1, 0)[0]) == 1
    told.queue.written()
    assert told.told == [(number, None) for number in range(5)]
    assert told.queue.waiting_bytes == 0


def test_what_could_not_be_written_goes_back_to_the_front_and_waits_since_then() -> None:
    told = Told()
    for id_ in range(4):
        told.put(id_)
    told.queue.take(2, 1000, 0)
    told.queue.put_back()
    assert told.queue.oldest == 10.0
    assert [message.number for message in told.queue.take(*LIMITS)[0]] == [0, 1, 2, 3]


def test_a_message_that_is_acknowledged_before_it_was_tried_is_written_as_such_or_not_at_all() -> None:
    told = Told()
    archived, other = told.put(1), told.put(2, archived=False)
    told.queue.mark([bytes([1]), bytes([2])])
    assert told.told == [(other, None)]
    group, marks = told.queue.take(*LIMITS)
    assert [(message.id, message.pending) for message in group] == [(bytes([1]), False)]
    assert marks == [bytes([1]), bytes([2])], "another router may have written the same"
    told.queue.written()
    assert told.told == [(other, None), (archived, None)]
    assert (told.queue.marks, told.queue.waiting_bytes) == (0, 0)


@pytest.mark.parametrize("archived", [True, False])
def test_a_message_that_may_be_written_gets_its_mark_when_it_is_known_to_be(archived: bool) -> None:
    """Its first commit failed, and nobody knows how: the row may be there, as pending."""
    told = Told()
    told.put(1, archived=archived)
    told.queue.take(*LIMITS)
    told.queue.put_back()
    told.queue.mark([bytes([1])])
    group, marks = told.queue.take(*LIMITS)
    assert [message.pending for message in group] == [True]
    assert marks == []
    told.queue.written()
    assert told.queue.take(*LIMITS) == ([], [bytes([1])])


def test_a_message_that_is_written_twice_is_acknowledged_twice() -> None:
    told = Told()
    for _ in range(2):
        told.put(1, archived=False)
    told.queue.mark([bytes([1])])
    assert told.told == [(0, None), (1, None)]
    assert (told.queue.messages, told.queue.marks) == (0, 1)


def test_a_message_without_any_mark_needs_no_writing() -> None:
    told = Told()
    told.put(1, pending=False, archived=False)
    assert told.told == [(0, None)]
    assert (told.queue.messages, told.queue.oldest) == (0, 0.0)


def test_who_does_not_want_to_wait_is_told_and_the_others_wait_on() -> None:
    told = Told()
    told.put(1)
    for id_ in (2, 3):
        told.put(id_, urgent=True)
    told.queue.take(2, 1000, 0)
    told.queue.put_back()
    away = ConnectionError()
    told.queue.give_up_urgent(away)
    assert sorted(told.told) == [(1, away), (2, away)]
    assert [message.number for message in told.queue.take(*LIMITS)[0]] == [1]


def test_what_is_refused_goes_and_the_marks_beside_it_stay() -> None:
    told = Told()
    told.put(1)
    told.queue.mark([bytes([9])])
    told.queue.take(*LIMITS)
    error = ValueError()
    told.queue.refused(error)
    assert told.told == [(0, error)]
    assert told.queue.take(*LIMITS) == ([], [bytes([9])])
    told.queue.written()
    assert told.queue.waiting_bytes == 0


def test_a_waiter_that_fails_does_not_keep_the_others_from_being_told() -> None:
    told = Told()
    told.put(1)
    told.queue.put(Message(ROMEO, b"x", "p", "o", 1, "f", 0, b"", True, True), lambda _error: 1 // 0, 0.0)
    told.put(2)
    told.queue.take(*LIMITS)
    told.queue.written()
    assert told.told == [(0, None), (1, None)]
    assert told.queue.waiting_bytes == 0


def test_the_messages_of_a_removed_account_are_not_written_any_more() -> None:
    told = Told()
    told.put(1)
    told.put(2, account=JULIET)
    told.queue.forget(ROMEO)
    assert told.told == [(0, None)]
    assert [message.number for message in told.queue.take(*LIMITS)[0]] == [2]


STEP = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 5), st.booleans(), st.booleans(), st.booleans()),
    st.tuples(st.just("mark"), st.integers(0, 5)),
    st.tuples(st.just("take"), st.integers(1, 3), st.integers(0, 2)),
    st.tuples(st.sampled_from(["written", "lost", "half-written", "urgent"])),
)


@given(st.lists(STEP, max_size=40))
def test_whatever_happens_each_is_told_once_and_no_mark_comes_before_its_message(
    steps: list[tuple[object, ...]],
) -> None:
    """Against a database that is a dict: in the end it has each message as it should be."""
    told, rows = Told(), {}
    acknowledged: set[bytes] = set()
    # Written after their acknowledgement: they may wait anew.
    again: set[bytes] = set()
    archived_ids: dict[bytes, bool] = {}
    group: list[Message] = []
    marks: list[bytes] = []
    puts = 0

    def write() -> None:
        for message in group:
            rows.setdefault(message.id, message)
        for id_ in rows.keys() & marks:
            rows[id_] = rows[id_]._replace(pending=False)
            if not rows[id_].archived:
                del rows[id_]

    def end(outcome: str) -> None:
        nonlocal group, marks
        if outcome != "lost":
            write()
        if outcome == "written":
            told.queue.written()
        else:
            told.queue.put_back()
        group, marks = [], []

    under_way = False
    for step in steps:
        match step:
            case ("put", int(id_), bool(pending), bool(archived), bool(urgent)):
                # All copies of a message are alike.
                archived = archived_ids.setdefault(bytes([id_]), archived)
                again |= {bytes([id_])} & acknowledged
                told.put(id_, pending, archived, urgent)
                puts += 1
            case ("mark", int(id_)):
                if bytes([id_]) in archived_ids:
                    acknowledged.add(bytes([id_]))
                    told.queue.mark([bytes([id_])])
            case ("take", int(most), int(most_marks)) if not under_way:
                group, marks = told.queue.take(most, 1000, most_marks)
                group, marks = list(group), list(marks)
                under_way = True
                assert not set(marks) & {message.id for message in group if message.pending} - again
            case ("urgent",):
                told.queue.give_up_urgent(ConnectionError())
            case (str(outcome),) if under_way:
                end(outcome)
                under_way = False
        waiting = [one.message for one in (*told.queue._under_way, *told.queue._messages) if not one.settled]
        assert told.queue.has_pending(ROMEO) == any(message.pending for message in waiting)
    if under_way:
        end("written")
    while told.queue.messages or told.queue.marks:
        group, marks = told.queue.take(*LIMITS)
        end("written")
    assert sorted(number for number, _ in told.told) == list(range(puts))
    assert told.queue.waiting_bytes == 0
    assert told.queue.oldest == 0.0
    assert not told.queue.has_pending(ROMEO)
    for id_ in acknowledged & rows.keys() - again:
        assert not rows[id_].pending, "its mark was written before it"


def test_a_mark_that_finds_no_message_is_tried_again_for_two_minutes() -> None:
    """A router that hangs for one writes the message when it wakes."""
    queue, id_ = WriteQueue(), b"i" * 16
    queue.mark([id_])
    waits: list[int] = []
    while queue.marks:
        queue.take(1, 1, 1)
        again = queue.early([id_])
        queue.written([id_])
        for wait, ids in again.items():
            waits.append(wait)
            assert id_ in queue.unmatched, "who takes the session over must know"
            assert id_ in queue.marked(), "it is not offered here meanwhile"
            queue.mark(queue.still_early(ids))
    assert waits == [1] * 10 + [2, 4, 8, 16, 32, 64]


def test_marks_that_were_forgotten_among_too_many_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would come round for ever, and make others be forgotten."""
    monkeypatch.setattr(message_queue, "MAX_EARLY", 2)
    queue, ids = WriteQueue(), [bytes([n]) * 16 for n in range(3)]
    queue.mark(ids)
    queue.take(1, 1, 3)
    again = queue.early(ids)
    queue.written(ids)
    assert again == {1: ids}
    queue.mark(queue.still_early(again[1]))
    assert queue.take(1, 1, 3)[1] == ids[1:]


def test_a_message_that_was_confirmed_before_it_had_to_be_written_is_looked_for_once() -> None:
    """Another router may have written it, with its archive; mostly nobody has."""
    told = Told()
    told.put(1, archived=False)
    told.queue.mark([b"\1"])
    assert told.told == [(0, None)]
    assert told.queue.take(*LIMITS) == ([], [b"\1"])
    assert told.queue.early([b"\1"]) == {}
    told.queue.written([b"\1"])
    told.put(1)
    (again,), _ = told.queue.take(*LIMITS)
    assert not again.pending, "it may come again"
