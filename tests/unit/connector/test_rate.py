"""Who sends more than the limits is read later, by as much as it has sent more."""

from __future__ import annotations

from services.connector.limits import ClientLimits
from services.connector.rate import Rate


def test_within_the_limits_nobody_waits() -> None:
    rate = Rate(ClientLimits(0, 10, 1000, 0))
    assert [rate.count(5.0, 100, 1) for _ in range(10)] == [0.0] * 10
    assert rate.count(6.0, 1000, 10) == 0.0, "another second"


def test_three_seconds_worth_waits_three_seconds() -> None:
    assert Rate(ClientLimits(0, 10, 0, 0)).count(5.0, 1, 30) == 8.0
    assert Rate(ClientLimits(0, 0, 1000, 0)).count(5.0, 3000, 1) == 8.0
    assert Rate(ClientLimits(0, 10, 1000, 0)).count(5.0, 4000, 20) == 9.0, "the worse of both"


def test_0_switches_a_limit_off() -> None:
    assert Rate(ClientLimits(0, 0, 0, 0)).count(5.0, 1 << 30, 1 << 20) == 0.0
