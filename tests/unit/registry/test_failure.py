"""Who stands still (DESIGN 7), with an injected clock."""

from __future__ import annotations

from dataclasses import replace

from services.registry.failure import Observer
from tidings.cluster.node import Node, NodeState

NODE = Node("n1", "i1", "127.0.0.11", 5777, ("router",), NodeState.UP, beat=7)


def states(observer: Observer, nodes: list[Node], now: float) -> list[str]:
    return [verdict.state.value for verdict in observer.look(nodes, now)[0]]


def test_a_beat_that_stands_still_for_the_lease_means_failed_and_for_half_of_it_suspect() -> None:
    observer = Observer("own", 5.0)
    assert states(observer, [NODE], 0.0) == []
    assert states(observer, [NODE], 2.4) == []
    assert states(observer, [NODE], 2.5) == ["suspect"]
    assert states(observer, [replace(NODE, state=NodeState.SUSPECT)], 3.0) == []
    assert states(observer, [replace(NODE, state=NodeState.SUSPECT)], 5.0) == ["failed"]


def test_a_beat_that_moves_starts_the_lease_anew() -> None:
    observer = Observer("own", 5.0)
    for now in range(20):
        assert states(observer, [replace(NODE, beat=now // 2)], float(now)) == []


def test_nobody_judges_themselves() -> None:
    observer = Observer("i1", 5.0)
    assert states(observer, [NODE], 0.0) == []
    assert states(observer, [NODE], 100.0) == []


def test_an_absent_database_makes_nobody_stale() -> None:
    observer = Observer("own", 5.0)
    observer.look([NODE], 0.0)
    observer.unread()
    assert states(observer, [NODE], 100.0) == []
    assert states(observer, [NODE], 104.0) == ["suspect"]


def test_a_restarted_node_has_a_lease_of_its_own() -> None:
    observer = Observer("own", 5.0)
    observer.look([NODE], 0.0)
    assert states(observer, [replace(NODE, incarnation="i2")], 6.0) == []


def test_the_row_of_a_failed_node_goes_after_another_lease() -> None:
    observer = Observer("own", 5.0)
    failed = replace(NODE, state=NodeState.FAILED)
    assert observer.look([failed], 0.0) == ([], [])
    assert observer.look([failed], 4.9) == ([], [])
    assert observer.look([failed], 5.0) == ([], [failed])
