"""Views and hashing, pure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.cluster.hashing import rendezvous
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView

N1 = Node("n1", "i1", "127.0.0.11", 5777, ("router",), certificate="c1")
N2 = Node("n2", "i2", "127.0.0.12", 5777, ("connector", "pubsub"), certificate="c2")


def test_a_view_finds_nodes_by_all_that_names_them() -> None:
    view = ClusterView(3, [N2, N1])
    assert list(view) == [N1, N2], "by name"
    assert view.node("n1") is view.by_incarnation("i1") is view.by_certificate("c1") is N1
    assert view.with_service("pubsub") == [N2]
    assert view.node("n3") is None
    assert view.by_certificate("") is None


def test_a_change_makes_a_new_view_and_leaves_the_old_one() -> None:
    view = ClusterView(3, [N1])
    changed = view.with_node(4, replace(N1, state=NodeState.UP)).with_node(5, N2)
    assert (view.version, len(view), view.node("n1")) == (3, 1, N1)
    assert (changed.version, len(changed)) == (5, 2)


def test_an_old_start_that_leaves_takes_no_new_one_along() -> None:
    restarted = ClusterView(3, [replace(N1, incarnation="i9")])
    assert len(restarted.without(4, N1)) == 1
    assert len(ClusterView(3, [N1]).without(4, N1)) == 0


names = st.lists(st.text(min_size=1, max_size=80), min_size=2, max_size=8, unique=True)


@given(st.text(), names)
def test_everybody_picks_the_same_whatever_the_order(key: str, several: list[str]) -> None:
    assert rendezvous(key, several) == rendezvous(key, several[::-1])


@given(names)
def test_only_the_keys_of_who_goes_move(several: list[str]) -> None:
    keys = [f"user{n}@example.org" for n in range(50)]
    before = {key: rendezvous(key, several) for key in keys}
    gone, rest = several[0], several[1:]
    assert all(rendezvous(key, rest) == before[key] for key in keys if before[key] != gone)


def test_keys_are_spread_evenly_also_over_names_that_are_long_and_alike() -> None:
    several = ["x" * 100 + str(n) for n in range(4)]
    counts = dict.fromkeys(several, 0)
    for number in range(4000):
        counts[rendezvous(f"user{number}", several)] += 1
    assert all(850 < count < 1150 for count in counts.values())


def test_nobody_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="nobody"):
        rendezvous("x", [])
