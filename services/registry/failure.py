"""Who stands still: a pure observer of beats.

It compares a beat only with the same beat read earlier by itself, and time only with its own clock: an
absent database, a restarted registry or a changed clock makes nobody stale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tidings.cluster.node import Node, NodeState

# Seconds after which a beat, due every second, is late.
LATE = 1.4


@dataclass(frozen=True, slots=True)
class Verdict:
    """What should become of a node, if its incarnation and beat are still these."""

    node: Node
    state: NodeState


class Observer:
    """Watches the beats of all nodes but its own."""

    def __init__(self, own_incarnation: str, lease: float) -> None:
        self._own = own_incarnation
        self._lease = lease
        # By incarnation: the beat, and when it was first read.
        self._seen: dict[str, tuple[int, float]] = {}
        self._failed: dict[str, float] = {}
        self._nodes: dict[str, Node] = {}

    def look(self, nodes: Iterable[Node], now: float) -> tuple[list[Verdict], list[Node]]:
        """Takes the rows of one successful read at `now` (seconds, monotonic).

        Returns verdicts, and the failed nodes whose rows have stood for another lease and can go.
        """
        self._nodes = {node.incarnation: node for node in nodes}
        verdicts: list[Verdict] = []
        removable: list[Node] = []
        present = set()
        for node in self._nodes.values():
            present.add(node.incarnation)
            if node.incarnation == self._own:
                continue  # nobody judges themselves
            if node.state is NodeState.FAILED:
                if now - self._failed.setdefault(node.incarnation, now) >= self._lease:
                    removable.append(node)
                continue
            beat, since = self._seen.get(node.incarnation, (-1, now))
            if beat != node.beat:
                self._seen[node.incarnation] = (node.beat, now)
            elif now - since >= self._lease:
                verdicts.append(Verdict(node, NodeState.FAILED))
            elif now - since >= self._lease / 2 and node.state is not NodeState.SUSPECT:
                verdicts.append(Verdict(node, NodeState.SUSPECT))
        for gone in set(self._seen) - present:
            del self._seen[gone]
        for gone in set(self._failed) - present:
            del self._failed[gone]
        return verdicts, removable

    def late(self, now: float) -> list[Node]:
        """Nodes whose beat should have come: they are worth a look, which may prove their death at once."""
        return [
            self._nodes[incarnation]
            for incarnation, (_, since) in self._seen.items()
            if now - since >= LATE and self._nodes[incarnation].state is not NodeState.FAILED
        ]

    def unread(self) -> None:
        """A read failed: what was seen before it proves nothing about the time of the gap."""
        self._seen.clear()
