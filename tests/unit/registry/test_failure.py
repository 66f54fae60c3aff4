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


def test_only_who_is_up_becomes_suspect() -> None:
    for state in (NodeState.JOINING, NodeState.DRAINING):
        observer = Observer("own", 5.0)
        node = replace(NODE, state=state)
        assert [states(observer, [node], now) for now in (0.0, 2.4, 2.5, 4.8, 5.0)] == [[], [], [], [], ["failed"]]


def test_how_long_a_beat_has_stood_is_known() -> None:
    observer = Observer("own", 5.0)
    assert observer.stood(NODE, 1.0) == 0.0
    observer.look([NODE], 1.0)
    assert observer.stood(NODE, 2.5) == 1.5
    assert observer.stood(replace(NODE, beat=8), 2.5) == 0.0, "it has beaten meanwhile"
    observer.unread()
    assert observer.stood(NODE, 3.0) == 0.0


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
    assert states(observer, [NODE], 2.0) == []
    assert states(observer, [NODE], 4.0) == []
    assert states(observer, [NODE], 4.5) == ["suspect"]


def test_an_observer_that_was_stopped_itself_judges_nobody_for_that_time() -> None:
    observer = Observer("own", 5.0)
    observer.look([NODE], 0.0)
    assert states(observer, [NODE], 100.0) == []
    assert states(observer, [NODE], 102.0) == []
    assert states(observer, [NODE], 102.5) == ["suspect"]


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


# --- cuts: nodes that beat, and do not reach each other ---


class Cluster:
    """Rows of nodes that beat; n1 has joined first."""

    def __init__(self, count: int, own: str = "own") -> None:
        self.observer = Observer(own, 5.0)
        self.rows = [replace(NODE, hostname=f"n{n}", incarnation=f"i{n}", joined=10 + n) for n in range(1, count + 1)]

    def cut(self, one: int, *others: int) -> None:
        for other in others:
            for here, there in ((one, other), (other, one)):
                row = self.rows[here - 1]
                self.rows[here - 1] = replace(row, unreachable=(*row.unreachable, f"i{there}"))

    def verdicts(self, start: float, seconds: float) -> list[tuple[float, str, str]]:
        """What is said while time goes on: (when, about whom, what)."""
        found = []
        for step in range(int(seconds / 0.5) + 1):
            now = start + step * 0.5
            self.rows = [replace(row, beat=row.beat + step) for row in self.rows]
            for verdict in self.observer.look(self.rows, now)[0]:
                found.append((now, verdict.node.hostname, verdict.state.value))
                self.rows = [
                    replace(row, state=NodeState.FAILED) if row.hostname == verdict.node.hostname else row
                    for row in self.rows
                ]
        return found


def test_of_two_nodes_that_do_not_reach_each_other_the_later_one_goes() -> None:
    cluster = Cluster(3)
    cluster.cut(1, 2)
    assert cluster.verdicts(0.0, 10.0) == [(3.0, "n2", "failed")]


def test_the_one_that_is_reached_by_fewer_goes_though_it_came_first() -> None:
    cluster = Cluster(3)
    cluster.cut(1, 2, 3)
    assert cluster.verdicts(0.0, 10.0) == [(3.0, "n1", "failed")]


def test_of_two_halves_one_is_left_whole() -> None:
    cluster = Cluster(4)
    for one in (1, 2):
        cluster.cut(one, 3, 4)
    assert [name for _, name, _ in cluster.verdicts(0.0, 10.0)] == ["n4", "n3"]


def test_what_a_connector_says_alone_puts_no_router_out() -> None:
    cluster = Cluster(3)
    cluster.rows[0] = replace(cluster.rows[0], services=("connector",), unreachable=("i3",))
    assert cluster.verdicts(0.0, 10.0) == [(3.0, "n1", "failed")]


def test_of_a_connector_and_a_router_the_connector_goes_though_it_came_first() -> None:
    cluster = Cluster(2)
    cluster.rows[0] = replace(cluster.rows[0], services=("connector",))
    cluster.cut(1, 2)
    assert cluster.verdicts(0.0, 10.0) == [(3.0, "n1", "failed")]


def test_a_router_that_reaches_nobody_takes_no_connector_along() -> None:
    """Though a connector may notice it before the other routers do."""
    cluster = Cluster(4)
    cluster.rows[3] = replace(cluster.rows[3], services=("connector",))
    cluster.cut(3, 4)
    assert cluster.verdicts(0.0, 1.0) == []
    cluster.cut(3, 1, 2)
    assert cluster.verdicts(1.5, 10.0) == [(4.5, "n3", "failed")]


def test_a_cut_that_ends_in_time_puts_nobody_out() -> None:
    cluster = Cluster(2)
    cluster.cut(1, 2)
    assert cluster.verdicts(0.0, 2.5) == []
    cluster.rows = [replace(row, unreachable=()) for row in cluster.rows]
    assert cluster.verdicts(3.0, 1.0) == []
    cluster.cut(1, 2)
    assert cluster.verdicts(4.5, 2.5) == []


def test_one_way_is_enough_for_a_cut() -> None:
    cluster = Cluster(2)
    cluster.rows[0] = replace(cluster.rows[0], unreachable=("i2",))
    assert cluster.verdicts(0.0, 10.0) == [(3.0, "n2", "failed")]


def test_a_registry_does_not_put_its_own_node_out_nor_another_one_in_its_place() -> None:
    cluster = Cluster(3, own="i1")
    cluster.cut(1, 2, 3)
    assert cluster.verdicts(0.0, 10.0) == []


def test_who_does_not_reach_a_node_that_stands_still_is_not_cut_off() -> None:
    cluster = Cluster(2)
    cluster.rows[0] = replace(cluster.rows[0], unreachable=("i2",))
    for step in range(12):
        cluster.rows[0] = replace(cluster.rows[0], beat=100 + step)
        verdicts, _ = cluster.observer.look(cluster.rows, step / 2)
        assert {verdict.node.hostname for verdict in verdicts} <= {"n2"}
