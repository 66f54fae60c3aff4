"""The contract of strategies over those that come with Tidings (DESIGN 8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tidings.cluster.strategies.broadcast import Broadcast
from tidings.cluster.strategies.home import Home
from tidings.cluster.strategies.online_users import OnlineUsers
from tidings.cluster.strategy import HERE, Context, Plan
from tidings.testing.strategies import SCENARIOS, run

STRATEGIES = {"broadcast": Broadcast, "home": Home, "online-users": OnlineUsers}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_loss_no_double_no_loop(strategy: str, scenario: str, seed: int) -> None:
    report = run(STRATEGIES[strategy], scenario, seed)
    assert report.messages > 100


def test_copies_are_what_each_strategy_promises() -> None:
    """DESIGN 8: N-1 copies; a copy to the right nodes; one copy at most. Three routers here."""
    assert run(Broadcast, "quiet", 1).copies_per_message == 2.0
    assert run(Home, "quiet", 1).copies_per_message <= 1.0
    assert run(OnlineUsers, "quiet", 1).copies_per_message <= 2.0
    assert run(Broadcast, "quiet", 1).notes == 0
    assert run(OnlineUsers, "log-ins and log-outs", 1).notes > 40


class Forgetful(OnlineUsers):
    """Planted: does not tell others of sessions that come."""

    def _tell(self, line: str) -> None:
        if line.startswith("-"):
            super()._tell(line)


class Deaf(OnlineUsers):
    """Planted: knows of nobody elsewhere."""

    def locate(self, account: str, resource: str) -> Plan:
        return HERE


class Stubborn(Home):
    """Planted: names itself as the one who decides, whatever the view."""

    def keeper(self, account: str) -> str:
        return self._own


@pytest.mark.parametrize(
    ("broken", "scenario"), [(Forgetful, "log-ins and log-outs"), (Deaf, "quiet"), (Stubborn, "a router joins")]
)
def test_the_suite_finds_planted_bugs(broken: Callable[[str, Context], Any], scenario: str) -> None:
    found = 0
    for seed in range(20):
        try:
            run(broken, scenario, seed)
        except AssertionError:
            found += 1
    assert found >= 19
