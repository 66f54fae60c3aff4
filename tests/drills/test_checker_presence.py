"""What the checker knows of presence: for each rule a history that must fail it, and a twin that must pass."""

from __future__ import annotations

import pytest

from tests.drills.checker import WRONG_PRESENCE
from tests.drills.history import Available, Fault, Saw
from tests.drills.story import B2, A, B, Story, both


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


def test_a_first_presence_that_takes_long_may_be_seen_twice_when_its_router_dies_behind_it_at_once() -> None:
    """Much was stored for the session: its router had not said yet that it had dealt with the presence."""

    def story(after: float) -> Story:
        begun = Story().begin("a", A).wait(60).begin("b", B, available=False).wait(3).tell(Available, "b")
        begun.events.append(Fault(begun.at + after, "", "hang node", begun.at + after + 60))
        return begun.tell(Saw, "a", B, True).tell(Saw, "a", B, True)

    assert story(0.2).found() == []
    assert story(2.0).found() == [WRONG_PRESENCE]
    assert story(0.2).tell(Saw, "a", B, True).found() == [WRONG_PRESENCE]


def test_one_session_that_follows_another_of_the_same_name_may_be_seen_without_a_break() -> None:
    assert seen().cut("b").end("b").begin("b2", B).tell(Saw, "a", B, True).wait(30).found() == []
    story = seen().cut("b").end("b").tell(Saw, "a", B, False).begin("b2", B).tell(Saw, "a", B, True)
    assert story.wait(30).found() == []
