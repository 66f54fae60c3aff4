"""The checker: for each sentence of the promise a history that must fail it, and a twin that must pass."""

from __future__ import annotations

import pytest

from tests.drills.checker import (
    ANSWERED_TWICE,
    DISORDERED,
    DOUBLED,
    ENDED_EARLY,
    LOST,
    PHANTOM,
    UNANSWERED,
    WRONG_PRESENCE,
    check,
)
from tests.drills.history import (
    Acknowledged,
    Answered,
    Asked,
    Available,
    Began,
    Bounced,
    Confirmed,
    Cut,
    Dropped,
    Ended,
    Event,
    Fault,
    Managed,
    Received,
    Resumed,
    Saw,
    Sent,
)


class Story:
    """A history written by hand. Each event is a tenth of a second behind the one before."""

    def __init__(self) -> None:
        self.at = 0.0
        self.events: list[Event] = []
        self._jids: dict[str, str] = {}
        self._sent: dict[str, Sent] = {}

    def wait(self, seconds: float) -> Story:
        self.at += seconds
        return self

    def _tell(self, kind: type[Event], session: str, *rest: object, **more: object) -> Story:
        self.at += 0.1
        self.events.append(kind(self.at, session, *rest, **more))
        return self

    def begin(
        self, session: str, jid: str, resumption: float = 300.0, priority: int = 0, available: bool = True
    ) -> Story:
        self._jids[session] = jid
        self._tell(Began, session, jid, priority)
        if resumption:
            self._tell(Managed, session, resumption)
        return self._tell(Available, session) if available else self

    def cut(self, session: str) -> Story:
        return self._tell(Cut, session)

    def resume(self, session: str) -> Story:
        return self._tell(Resumed, session)

    def end(self, session: str, clean: bool = False, refused: bool = False) -> Story:
        return self._tell(Ended, session, clean, refused)

    def send(self, session: str, key: str, to: str, type_: str = "chat") -> Story:
        self._tell(Sent, session, key, to, type_, f"body of {key}")
        self._sent.setdefault(key, self.events[-1])  # type: ignore[arg-type]
        return self

    def acknowledge(self, session: str, *keys: str) -> Story:
        return self._tell(Acknowledged, session, keys)

    def deliver(self, session: str, *keys: str) -> Story:
        for key in keys:
            sent = self._sent[key]
            self._tell(Received, session, key, self._jids[sent.session], sent.body)
        return self

    def confirm(self, session: str, *keys: str) -> Story:
        return self._tell(Confirmed, session, keys)

    def tell(self, kind: type[Event], session: str, *rest: object) -> Story:
        return self._tell(kind, session, *rest)

    def found(self, durable: bool = True, patient: bool = True) -> list[str]:
        self._tell(Acknowledged, "", ())  # the time until which it was watched
        return [finding.kind for finding in check(self.events, durable, patient).findings]


A, B, B2 = "a@x/1", "b@x/1", "b@x/2"


def both() -> Story:
    return Story().begin("a", A).begin("b", B)


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


# --- order ---


def test_what_came_out_of_order_to_one_session_is_found_and_between_two_senders_there_is_none() -> None:
    assert both().send("a", "1", B).send("a", "2", B).deliver("b", "2", "1").found() == [DISORDERED]
    assert both().send("a", "1", B).send("a", "2", B).deliver("b", "1", "2").found() == []
    story = both().begin("c", "c@x/1").send("a", "1", B).send("c", "2", B)
    assert story.deliver("b", "2", "1").found() == []


def test_bare_and_full_jids_are_one_order() -> None:
    assert both().send("a", "1", "b@x").send("a", "2", B).deliver("b", "2", "1").found() == [DISORDERED]


def test_a_live_message_that_overtakes_stored_ones_at_log_in_is_found() -> None:
    def story() -> Story:
        return both().send("a", "1", "b@x").cut("b").end("b").begin("b2", B).send("a", "2", "b@x")

    assert story().deliver("b2", "2", "1").found() == [DISORDERED]
    assert story().deliver("b2", "1", "2").found() == []


def test_what_falls_to_a_session_from_another_device_has_no_order_any_more() -> None:
    def story() -> Story:
        sent = both().begin("b2", B2).send("a", "1", B).send("a", "2", B).send("a", "3", "b@x").deliver("b2", "3")
        return sent.cut("b").end("b")

    assert story().deliver("b2", "1", "2").found() == []
    assert story().deliver("b2", "2", "1").found() == []


def test_a_device_on_a_node_that_hangs_is_gone_before_its_client_knows() -> None:
    def story(what: str) -> Story:
        sent = both().begin("b2", B2).send("a", "1", "b@x").send("a", "2", B2)
        began = sent.at
        sent.wait(8).deliver("b2", "2", "1").wait(4).end("b")
        sent.events.append(Fault(began, "", what, sent.at + 1))
        return sent

    assert story("hang node").found() == []
    assert story("cut clients").found() == [DISORDERED]


def test_what_was_for_the_account_and_falls_to_a_session_is_in_order_itself() -> None:
    sent = both().begin("b2", B2).send("a", "1", "b@x").send("a", "2", "b@x").cut("b").end("b")
    assert sent.deliver("b2", "2", "1").found() == [DISORDERED]


def test_what_was_for_the_account_before_a_session_began_may_fall_to_it_behind_what_came_since() -> None:
    def story() -> Story:
        sent = both().send("a", "1", "b@x").send("a", "2", "b@x").begin("b2", B2).send("a", "3", "b@x")
        return sent.cut("b").end("b")

    assert story().deliver("b2", "3", "1", "2").found() == []
    assert story().deliver("b2", "3", "2", "1").found() == [DISORDERED]


def test_what_was_for_a_session_that_has_gone_may_come_to_its_successor_by_way_of_another_device() -> None:
    """RFC 6121 8.5.3.2.1: it fell to that one, and falls to this one when that has gone too."""

    def story(to_other: bool) -> Story:
        sent = both().begin("b2", B2).end("b").send("a", "1", B)
        if to_other:
            sent.deliver("b2", "1")
        return sent.begin("b3", B).send("a", "2", B).deliver("b3", "2").end("b2").deliver("b3", "1")

    assert story(True).found() == []
    assert story(False).found() == [DISORDERED]


def test_what_another_device_had_falls_to_a_session_when_the_server_knows_that_the_device_has_gone() -> None:
    def story(seconds: float) -> Story:
        sent = both().begin("b2", B2).send("a", "1", "b@x").send("a", "2", B).cut("b").end("b").cut("b2").end("b2")
        return sent.wait(seconds).begin("b3", B).deliver("b3", "2", "1")

    assert story(0).found() == []
    assert story(2).found() == [DISORDERED]


def test_what_another_device_had_may_fall_to_a_session_behind_what_nobody_had_before_it_began() -> None:
    """Drills, seed 307: the sender's router had died, and what was sent again came to the new session as it came."""

    def story(had: bool) -> Story:
        sent = Story().begin("a", A).begin("b2", B2).send("a", "1", "b@x").send("a", "2", "b@x")
        if had:
            sent.deliver("b2", "1")
        return sent.cut("b2").end("b2").begin("b", B).deliver("b", "2", "1")

    assert story(True).found() == []
    assert story(False).found() == [DISORDERED]


def test_what_was_sent_to_a_session_itself_is_no_heritage() -> None:
    def story() -> Story:
        sent = both().begin("b2", B2).send("a", "1", B).send("a", "2", B2).send("a", "3", B2)
        return sent.cut("b").end("b")

    assert story().deliver("b2", "2", "1", "3").found() == []
    assert story().deliver("b2", "3", "1", "2").found() == [DISORDERED]


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
        return both().tell(Asked, "a", "q", B).wait(20).cut("a").wait(60).resume("a")

    assert story().wait(5).tell(Answered, "a", "q", B).found() == []
    assert story().wait(15).found() == [UNANSWERED]


def test_who_has_gone_or_gave_the_request_up_needs_no_answer() -> None:
    assert both().tell(Asked, "a", "q", B).cut("a").wait(400).end("a").wait(99).found(patient=False) == []
    story = both().tell(Asked, "a", "q", B).cut("a").resume("a").tell(Dropped, "a", ("q",))
    assert story.wait(99).found(patient=False) == []


# --- presence ---


def seen(resumption: float = 5.0) -> Story:
    """a sees b."""
    return Story().begin("a", A).wait(20).begin("b", B, resumption).tell(Saw, "a", B, True)


def test_contacts_see_unavailable_once_for_who_did_not_come_back() -> None:
    assert seen().end("b", clean=True).wait(30).found() == [WRONG_PRESENCE]
    assert seen().end("b", clean=True).tell(Saw, "a", B, False).wait(30).found() == []
    twice = seen().end("b", clean=True).tell(Saw, "a", B, False).tell(Saw, "a", B, False)
    assert twice.wait(30).found() == [WRONG_PRESENCE]


def test_who_was_cut_and_stays_away_is_unavailable_when_its_time_is_over() -> None:
    """Contacts never see unavailable for those who were on the dead node."""
    assert seen().cut("b").wait(3).found() == []
    assert seen().cut("b").wait(30).found() == [WRONG_PRESENCE]
    assert seen().cut("b").wait(6).tell(Saw, "a", B, False).wait(30).found() == []
    # Also when somebody comes under the same name long after.
    assert seen().cut("b").wait(30).end("b").begin("b2", B).found() == [WRONG_PRESENCE]


def test_a_contact_that_has_no_stream_or_a_cluster_that_is_broken_still_has_time() -> None:
    assert seen().end("b", clean=True).cut("a").wait(30).resume("a").wait(3).found() == []
    assert seen().end("b", clean=True).cut("a").wait(30).resume("a").wait(11).found() == [WRONG_PRESENCE]
    broken = seen().end("b", clean=True)
    assert broken.tell(Fault, "", "database away", broken.at + 25).wait(30).found() == []
    assert seen().end("b", clean=True).wait(3).found() == []
    assert seen().end("b", clean=True).wait(3).found(patient=False) == [WRONG_PRESENCE]


@pytest.mark.parametrize("shown", [(False,), (False, True), (True,)])
def test_no_presence_at_all_comes_from_a_session_that_resumes_in_time(shown: tuple[bool, ...]) -> None:
    story = seen(300).wait(20).cut("b")
    for available in shown:
        story.tell(Saw, "a", B, available)
    assert story.resume("b").wait(30).found() == [WRONG_PRESENCE]
    assert seen(300).wait(20).cut("b").resume("b").wait(30).found() == []


def test_no_presence_at_all_comes_from_a_session_that_re_attaches() -> None:
    """Its stream is not even cut."""
    assert seen(300).wait(20).tell(Saw, "a", B, True).found() == [WRONG_PRESENCE]
    assert seen(300).wait(20).tell(Saw, "a", B, False).found() == [WRONG_PRESENCE]


def test_what_a_later_session_may_show_does_not_excuse_an_earlier_one() -> None:
    """Nor the other way round: what came too late for the first session's end came from the second."""
    story = seen(300).end("b", clean=True).begin("b2", B).wait(30)
    assert story.tell(Saw, "a", B, False).tell(Saw, "a", B, True).found() == [WRONG_PRESENCE]


def test_the_server_may_know_earlier_than_a_client_that_its_session_is_over() -> None:
    """A node that hangs is put out; who was there without XEP-0198 notices by the silence."""
    told = seen(0).wait(30).tell(Saw, "a", B, False).wait(15).end("b")
    assert told.begin("b2", B, 0).tell(Saw, "a", B, True).found() == []
    assert seen(0).wait(30).tell(Saw, "a", B, False).wait(60).end("b").found() == [WRONG_PRESENCE]


def test_presence_of_a_session_that_never_was_is_found() -> None:
    assert both().tell(Saw, "a", B2, False).found() == [WRONG_PRESENCE]


def test_two_who_come_at_one_time_may_see_each_other_twice() -> None:
    """RFC 6121 4.2.2 and 4.3.2: by broadcast and by probe."""
    story = Story().begin("a", A).begin("b", B).tell(Saw, "a", B, True).tell(Saw, "a", B, True)
    assert story.found() == []
    assert story.tell(Saw, "a", B, True).found() == [WRONG_PRESENCE]


def test_a_probe_may_be_answered_twice_while_something_breaks() -> None:
    story = Story().begin("a", A).begin("b", B)
    story.events.append(Fault(story.at, "", "drain node", story.at + 1))
    assert story.tell(Saw, "a", B, True).tell(Saw, "a", B, True).tell(Saw, "a", B, True).found() == []
    assert story.tell(Saw, "a", B, True).found() == [WRONG_PRESENCE]


def test_who_logs_in_may_see_contacts_twice_when_its_router_dies_at_once() -> None:
    """Its first presence was under way; the next router deals with it again, and asks its contacts again."""

    def story(after: float) -> Story:
        begun = Story().begin("b", B).wait(60).begin("a", A)
        begun.events.append(Fault(begun.at + after, "", "kill router", begun.at + after + 3))
        return begun.tell(Saw, "a", B, True).tell(Saw, "a", B, True)

    assert story(0.2).found() == []
    assert story(2.0).found() == [WRONG_PRESENCE]
    assert story(0.2).tell(Saw, "a", B, True).found() == [WRONG_PRESENCE]


def test_one_session_that_follows_another_of_the_same_name_may_be_seen_without_a_break() -> None:
    assert seen().cut("b").end("b").begin("b2", B).tell(Saw, "a", B, True).wait(30).found() == []
    story = seen().cut("b").end("b").tell(Saw, "a", B, False).begin("b2", B).tell(Saw, "a", B, True)
    assert story.wait(30).found() == []


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
