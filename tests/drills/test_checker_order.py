"""What the checker knows of order: for each rule a history that must fail it, and a twin that must pass."""

from __future__ import annotations

from tests.drills.checker import DISORDERED
from tests.drills.history import Fault
from tests.drills.story import B2, A, B, Story, both


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
        return sent.wait(2).cut("b").end("b")

    assert story().deliver("b2", "3", "1", "2").found() == []
    assert story().deliver("b2", "3", "2", "1").found() == [DISORDERED]


def test_what_was_for_a_session_that_has_gone_may_come_to_its_successor_by_way_of_another_device() -> None:
    """RFC 6121 8.5.3.2.1: it fell to that one, and falls to this one when that has gone too."""

    def story(to_other: bool) -> Story:
        sent = both().begin("b2", B2).end("b").send("a", "1", B)
        if to_other:
            sent.deliver("b2", "1")
        return sent.begin("b3", B).send("a", "2", B).deliver("b3", "2").wait(2).end("b2").deliver("b3", "1")

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
        return sent.wait(2).cut("b2").end("b2").begin("b", B).deliver("b", "2", "1")

    assert story(True).found() == []
    assert story(False).found() == [DISORDERED]


def test_a_device_may_have_been_given_what_its_client_never_read() -> None:
    """Drills, seed 32: its connector died just behind its log-in, or just behind a message; the server learnt it later."""

    def story(to: str, lives: float) -> Story:
        sent = both().end("b").send("a", "1", to).send("a", "2", to).begin("b2", B2).wait(lives).end("b2")
        return sent.send("a", "3", to).begin("b3", B)

    for to in (B, "b@x"):
        assert story(to, 0).deliver("b3", "3", "1", "2").found() == []
        assert story(to, 0).deliver("b3", "3", "2", "1").found() == [DISORDERED]
        assert story(to, 2).deliver("b3", "1", "2", "3").found() == []
        # One that worked long enough would have read what it was given.
        assert story(to, 2).deliver("b3", "2", "1", "3").found() == [DISORDERED]
    # What comes later is for this session itself.
    assert story(B, 0).send("a", "4", B).deliver("b3", "4", "1", "2").found() == []


def test_what_comes_to_a_session_itself_is_in_order_whatever_another_device_had() -> None:
    def story() -> Story:
        return both().end("b").send("a", "1", B).begin("b2", B2).end("b2").begin("b3", B)

    assert story().send("a", "2", B).send("a", "3", B).deliver("b3", "3", "1", "2").found() == [DISORDERED]
    assert story().send("a", "2", B).send("a", "3", B).deliver("b3", "2", "1", "3").found() == []


def test_what_was_sent_to_a_session_itself_is_no_heritage() -> None:
    def story() -> Story:
        sent = both().begin("b2", B2).send("a", "1", B).send("a", "2", B2).send("a", "3", B2)
        return sent.cut("b").end("b")

    assert story().deliver("b2", "2", "1", "3").found() == []
    assert story().deliver("b2", "3", "1", "2").found() == [DISORDERED]


def test_a_session_that_was_resumed_while_its_router_stood_still_may_be_passed_over_until_it_is_back_there() -> None:
    """Drills, long seed 0: what was for the account went to its other device alone, and fell to this one when that ended."""

    def story(what: str, later: float = 0.0, resumed: bool = True) -> Story:
        sent = both().begin("b2", B2)
        began = sent.at
        if resumed:
            sent.cut("b").wait(3).resume("b")
        sent.events.append(Fault(began, "", what, sent.at + 1))
        return (
            sent.wait(1 + later).send("a", "1", "b@x").wait(1.5).send("a", "2", "b@x").send("a", "3", "b@x").cut("b2")
        )

    assert story("owner wakes").deliver("b", "2", "3").end("b2").deliver("b", "1").found() == []
    assert story("owner wakes").deliver("b", "1", "2", "3").end("b2").found() == []
    for told in (
        # Nothing stood still; it stayed where it was; it was back.
        story("kill node").deliver("b", "2", "3").end("b2").deliver("b", "1"),
        story("owner wakes", resumed=False).deliver("b", "2", "3").end("b2").deliver("b", "1"),
        story("owner wakes", later=6).deliver("b", "2", "3").end("b2").deliver("b", "1"),
        # What falls to it is in order itself, and so is what comes to it.
        story("owner wakes").deliver("b", "3").end("b2").deliver("b", "2", "1"),
    ):
        assert told.found() == [DISORDERED]
