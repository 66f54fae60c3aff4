"""Who stands still, and who is cut off: a pure observer of rows.

It compares a beat only with the same beat read earlier by itself, and time only with its own clock: an
absent database, a restarted registry or a changed clock makes nobody stale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tidings.cluster.node import Node, NodeState

# Seconds after which a beat, due every second, is late.
LATE = 1.4
# Seconds for which one node must say that it does not reach another one. A link notices a cut after 2 to 3
# seconds (tidings.kit.channel), so one of the two is out 6 seconds after it.
CUT = 3.0
# Nodes that run one of these are told apart from those at the edge, which may stand in a DMZ.
INNER = frozenset({"router", "registry"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What should become of a node, if its incarnation and beat are still these."""

    node: Node
    state: NodeState
    # For the log.
    reason: str = ""


class Observer:
    """Watches the beats of all nodes but its own."""

    def __init__(self, own_incarnation: str, lease: float) -> None:
        self._own = own_incarnation
        self._lease = lease
        self._looked = 0.0
        # By incarnation: the beat, and when it was first read.
        self._seen: dict[str, tuple[int, float]] = {}
        self._failed: dict[str, float] = {}
        self._nodes: dict[str, Node] = {}
        # Since when of two nodes one says that it does not reach the other.
        self._cut: dict[frozenset[str], float] = {}

    def look(self, nodes: Iterable[Node], now: float) -> tuple[list[Verdict], list[Node]]:
        """Takes the rows of one successful read at `now` (seconds, monotonic).

        Returns verdicts, and the failed nodes whose rows have stood for another lease and can go.
        """
        if now - self._looked >= self._lease / 2:
            # This process was stopped itself: of the time in which it did not look it knows nothing.
            self.unread()
        self._looked = now
        self._nodes = {node.incarnation: node for node in nodes}
        verdicts: list[Verdict] = []
        removable: list[Node] = []
        for node in self._nodes.values():
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
                verdicts.append(Verdict(node, NodeState.FAILED, "its beat has stood still for the lease"))
            elif now - since >= self._lease / 2 and node.state is NodeState.UP:
                verdicts.append(Verdict(node, NodeState.SUSPECT))
        for gone in set(self._seen) - set(self._nodes):
            del self._seen[gone]
        for gone in set(self._failed) - set(self._nodes):
            del self._failed[gone]
        return verdicts + self._cut_off(now), removable

    def late(self, now: float) -> list[Node]:
        """Nodes whose beat should have come: they are worth a look, which may prove their death at once."""
        return [
            self._nodes[incarnation]
            for incarnation, (_, since) in self._seen.items()
            if now - since >= LATE and self._nodes[incarnation].state is not NodeState.FAILED
        ]

    def stood(self, node: Node, now: float) -> float:
        """Seconds for which the beat of a node has been read as it is now."""
        beat, since = self._seen.get(node.incarnation, (-1, now))
        return now - since if beat == node.beat else 0.0

    def unread(self) -> None:
        """A read failed: what was seen before it proves nothing about the time of the gap."""
        self._seen.clear()
        self._cut.clear()

    # --- cuts ---

    def _cut_off(self, now: float) -> list[Verdict]:
        """Of two nodes that both beat and of which one does not reach the other: the one that runs neither router nor
        registry, or else is cut off from more nodes, or else joined later (DESIGN 7). Every registry that reads the
        same rows says the same."""
        pairs = {
            frozenset((node.incarnation, other))
            for node in self._nodes.values()
            for other in node.unreachable
            if other in self._nodes
            and other != node.incarnation
            and self._beats(node, now)
            and self._beats(self._nodes[other], now)
        }
        self._cut = {pair: self._cut.get(pair, now) for pair in pairs}
        verdicts = []
        while standing := self._decidable({pair for pair in pairs if now - self._cut[pair] >= CUT}, pairs):
            cut_from = Counter(incarnation for pair in pairs for incarnation in pair)
            candidates = {incarnation for pair in standing for incarnation in pair}
            worst = max(candidates, key=lambda one: (self._is_edge(one), cut_from[one], self._nodes[one].joined, one))
            if worst != self._own:
                reason = f"it is cut off from {cut_from[worst]} of {len(self._nodes) - 1} nodes"
                verdicts.append(Verdict(self._nodes[worst], NodeState.FAILED, reason))
            pairs = {pair for pair in pairs if worst not in pair}
        return verdicts

    def _decidable(self, standing: set[frozenset[str]], pairs: set[frozenset[str]]) -> set[frozenset[str]]:
        """The pairs to decide upon. What a connector or a component says alone puts no router and no registry out:
        of such a pair it is the one that goes, and only when the other is cut off from none of its like."""
        inner = {pair for pair in pairs if not any(map(self._is_edge, pair))}
        disputed = {incarnation for pair in inner for incarnation in pair}
        return {pair for pair in standing if pair in inner or disputed.isdisjoint(pair)}

    def _is_edge(self, incarnation: str) -> bool:
        return INNER.isdisjoint(self._nodes[incarnation].services)

    def _beats(self, node: Node, now: float) -> bool:
        if node.state not in (NodeState.UP, NodeState.DRAINING):
            return False
        _, since = self._seen.get(node.incarnation, (0, now))
        return now - since < self._lease / 2
