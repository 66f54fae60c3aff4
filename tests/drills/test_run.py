"""What a run says at its end, and what it exits with."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.drills.checker import ENDED_EARLY, KINDS
from tests.drills.drill import UNACKNOWLEDGED, Count
from tests.drills.run import LEAST_MESSAGES, Result


def result(**more: object) -> Result:
    good = Result(seeds=2, messages=LEAST_MESSAGES, counts=[Count("kill node", 1.0, UNACKNOWLEDGED, [0.5, 1.5, 4.0])])
    for name, value in more.items():
        setattr(good, name, value)
    return good


def test_the_last_two_lines_are_for_a_program() -> None:
    few = Count("kill node", 2.0, UNACKNOWLEDGED - 1)
    told = result(found=Counter({"lost": 1, "phantom": 3}), counts=[few, *result().counts]).lines()
    assert told[-2] == "faults: 1 counted, 3 phantoms"
    assert told[-1] == "drills: 2 seeds, 1000 messages, 1 lost, 0 doubled, 0 out of order"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ENDED_EARLY])
def test_any_finding_fails_the_run(kind: str) -> None:
    assert not result().failed()
    assert result(found=Counter({kind: 1})).failed()


def test_sessions_that_died_with_their_router_are_told_and_fail_nothing() -> None:
    told = result(found=Counter({ENDED_EARLY: 3}))
    assert not told.failed()
    assert f"3 {ENDED_EARLY}" in told.lines()[0]


def test_a_complaint_and_too_few_messages_fail_the_run() -> None:
    assert result(complaints=1).failed()
    assert result(messages=LEAST_MESSAGES - 1).failed()


def test_pauses_are_told_by_fault() -> None:
    assert result().pauses()[-1] == "| kill node | 1 | 3 | 1.50 | 4.00 |"
