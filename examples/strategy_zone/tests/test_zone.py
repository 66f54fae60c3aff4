"""The rule of zones, and the contract of all strategies over it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from strategy_zone import Zone

from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.testing.strategies import SCENARIOS, run


class Alone:
    """A `tidings.cluster.strategy.Context`: this router has no sessions, and nobody listens."""

    def tell(self, node: str, note: bytes) -> None:
        """Notes go nowhere."""

    def sessions(self) -> Iterable[str]:
        return []


def view_of(*names: str) -> ClusterView:
    """Routers of these names; the incarnation of each is its name and a number, as if started once."""
    return ClusterView(1, [Node(name, f"{name}#1", "127.0.0.1", 5777, ("router",), NodeState.UP) for name in names])


def keepers(view: ClusterView, host: str) -> set[str]:
    """Who keeps a hundred accounts of a virtual host, by the names of the routers."""
    strategy = Zone("r1.example.org#1", Alone())
    strategy.view_changed(view)
    return {strategy.keeper(f"user{number}@{host}").partition("#")[0] for number in range(100)}


def test_the_accounts_of_a_virtual_host_spread_over_its_own_routers() -> None:
    view = view_of("r1.example.org", "r2.example.org", "r1.example.net")
    assert keepers(view, "example.org") == {"r1.example.org", "r2.example.org"}
    assert keepers(view, "example.net") == {"r1.example.net"}


def test_a_name_belongs_to_a_zone_by_whole_labels() -> None:
    view = view_of("r1.example.org", "r1.otherexample.org")
    assert keepers(view, "example.org") == {"r1.example.org"}


def test_a_virtual_host_without_routers_is_kept_by_all() -> None:
    view = view_of("r1.example.org", "r2.example.org")
    assert keepers(view, "example.net") == {"r1.example.org", "r2.example.org"}


class ManyZones(Zone):
    """Zones for the simulation, whose accounts are user0@… to user5@… and whose routers n1 to n5: each of four
    routers is a zone, so that in every scenario zones empty, fill and change."""

    def zone(self, account: str) -> str:
        return f"n{1 + int(account[len('user')]) % 4}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("strategy", [Zone, ManyZones])
def test_the_contract_of_strategies(strategy: type[Zone], scenario: str, seed: int) -> None:
    """No loss, no double, no loop, order kept: right after join, leave, crash and restart, with late views."""
    report = run(strategy, scenario, seed)
    assert report.messages > 100


def test_a_stanza_costs_one_copy_at_most() -> None:
    assert run(ManyZones, "quiet", 1).copies_per_message <= 1.0
