"""The checker: for each sentence of the promise a history that must fail it, and a twin that must pass. Order and
presence have files of their own.
"""

from __future__ import annotations

import pytest

from tests.drills.checker import ANSWERED_TWICE, DOUBLED, ENDED_EARLY, LOST, PHANTOM, UNANSWERED, check
from tests.drills.history import Acknowledged, Answered, Asked, Available, Bounced, Dropped, Event, Received
from tests.drills.story import B2, A, B, Story, both

# --- delivered, or stored, or bounced ---


def test_an_acknowledged_message_that_nobody_got_is_lost() -> None:
    assert both().send("a", "m", B).acknowledge("a", "m").found() == [LOST]
    assert both().send("a", "m", B).acknowledge("a", "m").deliver("b", "m").found() == []


def test_a_message_that_was_not_acknowledged_is_not_promised() -> None:
    assert both().send("a", "m", B).found() == []


def test_a_message_that_came_back_as_an_error_is_not_lost() -> None:
    story = both().send("a", "m", B).acknowledge("a", "m")
    assert story.tell(Bounced, "a", "m", "service-unavailable").found() == []


def test_a_message_that_one_session_of_the_account_has_confirmed_is_delivered() -> None:
    story = both().begin("b2", B2).send("a", "m", "b@x").acknowledge("a", "m").deliver("b2", "m").confirm("b2", "m")
    assert story.end("b2").end("b").begin("b3", B).found() == []


def test_what_a_session_had_not_confirmed_is_offered_again_to_the_next_one() -> None:
    def story() -> Story:
        return both().send("a", "m", B).acknowledge("a", "m").deliver("b", "m").cut("b").end("b").begin("b2", B)

    assert story().found() == [LOST]
    assert story().deliver("b2", "m").found() == []


def test_what_the_next_session_had_not_confirmed_either_is_offered_to_the_one_after_it() -> None:
    def story() -> Story:
        given = both().send("a", "m", B).acknowledge("a", "m").deliver("b", "m").end("b")
        return given.begin("b2", B).deliver("b2", "m").end("b2").begin("b3", B)

    assert story().found() == [LOST]
    assert story().deliver("b3", "m").found() == []


def test_closing_the_stream_properly_confirms_nothing_by_itself() -> None:
    """Without XEP-0198 it takes the answer to a later ping."""

    def story() -> Story:
        return both().begin("p", B2, 0).send("a", "m", B2).acknowledge("a", "m").deliver("p", "m")

    assert story().end("p", clean=True).found() == [LOST]
    assert story().confirm("p", "m").end("p", clean=True).found() == []


def test_what_is_still_stored_at_the_end_is_read_by_the_session_that_looks() -> None:
    def story() -> Story:
        return Story().begin("a", A).send("a", "m", "b@x").acknowledge("a", "m").begin("reader", B)

    assert story().found() == [LOST]
    assert story().deliver("reader", "m").found() == []


def test_what_a_session_holds_that_waits_for_its_resumption_is_not_lost_yet() -> None:
    def story() -> Story:
        return both().send("a", "m", B).acknowledge("a", "m").cut("b")

    assert story().found() == []
    assert story().found(patient=False) == [LOST]
    assert story().resume("b").found() == [LOST]


def test_a_receiver_of_negative_priority_leaves_messages_to_the_account_stored() -> None:
    def story() -> Story:
        return Story().begin("a", A).begin("n", B, priority=-1).send("a", "m", "b@x").acknowledge("a", "m")

    assert story().begin("reader", B2).found() == [LOST]
    assert story().begin("reader", B2).deliver("reader", "m").found() == []


@pytest.mark.parametrize("type_", ["headline", "groupchat", "error"])
def test_a_type_that_is_not_stored_is_gone_when_its_receiver_is_absent(type_: str) -> None:
    """RFC 6121 8.5.2.2.1, 8.5.3.2.1: but it is lost when the receiver is there all the time."""
    assert both().send("a", "m", B, type_).acknowledge("a", "m").end("b").found() == []
    assert both().send("a", "m", B2, type_).acknowledge("a", "m").found() == []
    assert both().send("a", "m", B, type_).acknowledge("a", "m").found() == [LOST]


def test_a_headline_to_an_account_that_is_there_with_negative_priority_only_is_gone() -> None:
    def story(priority: int) -> Story:
        begun = Story().begin("a", A).begin("n", B, priority=priority)
        return begun.send("a", "m", "b@x", "headline").acknowledge("a", "m")

    assert story(-1).found() == []
    assert story(0).found() == [LOST]


def test_a_headline_to_an_account_is_gone_until_the_server_has_dealt_with_the_presence_of_a_session() -> None:
    """RFC 6121 8.5.2.2.1; and 8.5.3.1: its full JID is there as soon as it is bound. Drills, seed 44."""

    def story(to: str, available: bool) -> Story:
        begun = Story().begin("a", A).begin("b", B, available=available)
        begun.send("a", "m", to, "headline").acknowledge("a", "m")
        return begun if available else begun.tell(Available, "b")

    assert story("b@x", False).found() == []
    assert story("b@x", True).found() == [LOST]
    assert story(B, False).found() == [LOST]


def test_the_error_for_a_sender_who_has_gone_is_not_stored() -> None:
    """RFC 6121 8.5.3.2.1: type normal to a full JID that is not there is bounced, and errors are not stored."""

    def story() -> Story:
        return Story().begin("a", A).send("a", "m", B, "normal").acknowledge("a", "m")

    assert story().found() == [LOST]
    assert story().end("a").found() == []
    assert Story().begin("a", A).send("a", "m", "b@x", "normal").acknowledge("a", "m").end("a").found() == [LOST]


def test_without_durability_only_order_and_no_doubles_are_promised() -> None:
    assert both().send("a", "m", B).acknowledge("a", "m").found(durable=False) == []
    story = both().send("a", "m", B).deliver("b", "m", "m")
    assert story.found(durable=False) == [DOUBLED]


# --- no session gets a message twice ---


def test_a_session_that_got_a_message_twice_is_found_and_two_sessions_may_get_it_once_each() -> None:
    assert both().send("a", "m", B).deliver("b", "m", "m").found() == [DOUBLED]
    assert both().send("a", "m", B).deliver("b", "m").end("b").begin("b2", B).deliver("b2", "m").found() == []


def test_a_session_that_resumed_is_the_same_one() -> None:
    assert both().send("a", "m", B).deliver("b", "m").cut("b").resume("b").deliver("b", "m").found() == [DOUBLED]


def test_a_second_device_that_gets_the_message_again_when_the_first_is_cut_is_found() -> None:
    def story() -> Story:
        return both().begin("b2", B2).send("a", "m", "b@x").deliver("b", "m").deliver("b2", "m").cut("b")

    assert story().found() == []
    assert story().deliver("b2", "m").found() == [DOUBLED]


def test_who_sends_again_after_a_failed_resumption_may_cause_a_double() -> None:
    def story() -> Story:
        sent = both().send("a", "m", B).deliver("b", "m").cut("a").wait(400).end("a", refused=True)
        return sent.begin("a2", A).send("a2", "m", B).deliver("b", "m")

    assert story().found() == []
    assert story().deliver("b", "m").found() == [DOUBLED]


# --- phantoms ---


def test_a_message_from_nowhere_and_one_with_other_bytes_are_found() -> None:
    assert both().tell(Received, "b", "m", A, "body").found() == [PHANTOM]
    assert both().send("a", "m", B).tell(Received, "b", "m", A, "body of").found() == [PHANTOM]
    assert both().send("a", "m", B).tell(Received, "b", "m", "c@x/1", "body of m").found() == [PHANTOM]
    assert both().begin("c", "c@x/1").send("a", "m", B).deliver("c", "m").found() == [PHANTOM]
    assert both().tell(Bounced, "a", "m", "gone").found() == [PHANTOM]
    assert both().tell(Answered, "a", "q", B).found() == [PHANTOM]
    assert both().send("a", "m", B).deliver("b", "m").found() == []


# --- requests ---


def test_a_request_without_an_answer_for_thirty_seconds_is_found() -> None:
    assert both().tell(Asked, "a", "q", B).wait(31).found() == [UNANSWERED]
    assert both().tell(Asked, "a", "q", B).wait(31).tell(Answered, "a", "q", B).found() == [UNANSWERED]
    assert both().tell(Asked, "a", "q", B).wait(29).tell(Answered, "a", "q", B).found() == []


def test_an_answer_that_may_still_come_is_no_fault_but_not_settled() -> None:
    assert both().tell(Asked, "a", "q", B).wait(9).found() == []
    assert both().tell(Asked, "a", "q", B).wait(9).found(patient=False) == [UNANSWERED]


def test_two_answers_are_found() -> None:
    story = both().tell(Asked, "a", "q", B).tell(Answered, "a", "q", B).tell(Answered, "a", "q", B)
    assert story.found() == [ANSWERED_TWICE]


def test_the_time_without_a_working_stream_does_not_count() -> None:
    def story() -> Story:
        asked = both().tell(Asked, "a", "q", B).wait(20)
        return asked.tell(Acknowledged, "a", ()).cut("a").wait(60).resume("a")

    assert story().wait(5).tell(Answered, "a", "q", B).found() == []
    assert story().wait(15).found() == [UNANSWERED]


def test_nor_does_the_time_in_which_nothing_came_before_a_stream_was_lost() -> None:
    """The process that held it stood still, and its client took some time to notice (LONG, seed 13)."""

    def story(before: float, behind: float) -> Story:
        asked = both().tell(Asked, "a", "q", B).wait(before).tell(Acknowledged, "a", ()).wait(60)
        return asked.cut("a").wait(1).resume("a").wait(behind)

    assert UNANSWERED not in story(20, 9).found()
    assert UNANSWERED in story(20, 11).found()
    assert UNANSWERED in story(31, 0).found()
    assert UNANSWERED in both().tell(Asked, "a", "q", B).wait(31).found(), "it was not lost"


def test_who_has_gone_or_gave_the_request_up_needs_no_answer() -> None:
    assert both().tell(Asked, "a", "q", B).cut("a").wait(400).end("a").wait(99).found(patient=False) == []
    story = both().tell(Asked, "a", "q", B).cut("a").resume("a").tell(Dropped, "a", ("q",))
    assert story.wait(99).found(patient=False) == []


# --- sessions ---


def test_a_session_that_ends_before_its_time_is_found() -> None:
    """XEP-0198 5: `max` says how long it waits."""
    assert both().cut("b").wait(10).end("b", refused=True).found() == [ENDED_EARLY]
    assert both().cut("b").wait(300).end("b", refused=True).found() == []
    # The client's own choice.
    assert both().cut("b").wait(10).end("b").found() == []


# --- what is worth a look ---


def test_a_message_that_is_given_out_again_though_it_was_confirmed_is_counted() -> None:
    def story(pause: float) -> list[Event]:
        told = both().send("a", "m", B).deliver("b", "m").confirm("b", "m").wait(pause).cut("b").end("b")
        return told.begin("b2", B).deliver("b2", "m").events

    assert check(story(3)).repeated == 1
    # The confirmation may have been lost with the stream.
    assert check(story(0)).repeated == 0
    assert not check(story(3)).findings
