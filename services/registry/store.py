"""Where the nodes are kept: the port, and what every implementation must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from tidings.cluster.node import Node, NodeState


class ChangeKind(Enum):
    """What happened to a node. The values stand in the table."""

    JOINED = "joined"
    BACK = "back"
    SUSPECT = "suspect"
    FAILED = "failed"
    DRAINING = "draining"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Change:
    """One numbered change."""

    version: int
    kind: ChangeKind
    hostname: str
    incarnation: str


# Looks at the rows beside which a node is to stand; it raises when it must not.
Check = Callable[[Sequence[Node]], None]


_STATES = {
    ChangeKind.JOINED: NodeState.JOINING,
    ChangeKind.BACK: NodeState.UP,
    ChangeKind.SUSPECT: NodeState.SUSPECT,
    ChangeKind.FAILED: NodeState.FAILED,
    ChangeKind.DRAINING: NodeState.DRAINING,
}


def after(change: Change, node: Node) -> Node:
    """The node as it was right after a change, whatever has become of it since; after LEFT, as given."""
    return replace(node, state=_STATES.get(change.kind, node.state))


class NodeStore(Protocol):
    """The table `cluster_nodes` and its changes.

    Every method is atomic: it MUST happen whole or not at all, also when several registries call at once, and
    MUST number its change in the same step. Versions rise with each change; gaps are allowed. Raises
    DatabaseAway when nothing can be known; then it may or may not have happened.
    """

    async def join(self, node: Node, replaces: Node | None, check: Check) -> int | None:
        """Enters a node. `replaces`: the failed row of its name that must be there (by incarnation), None for no row.
        `check` gets the rows of all other names while nobody else can join; what it raises ends the join.

        Returns the version; None when the row of that name is another one by now, or has not failed, or when another
        row has the node's incarnation.
        """

    async def beat(
        self,
        hostname: str,
        incarnation: str,
        state: NodeState,
        cpu: float,
        memory: float,
        cleaned: int = 0,
        unreachable: tuple[str, ...] = (),
    ) -> bool:
        """Raises a node's beat and writes its load, up to which view it has cleaned up, and which incarnations it
        does not reach; numbers a change when its state changed.

        False when its row is gone, failed, or another incarnation's. A suspect row is taken back.
        """

    async def leave(self, hostname: str, incarnation: str) -> None:
        """Removes a node's row; nothing happens when it is another incarnation's, or gone."""

    async def mark(self, hostname: str, incarnation: str, beat: int, state: NodeState) -> bool:
        """Sets FAILED, or SUSPECT on a node that is UP, if incarnation and beat are still those. False when not."""

    async def remove_failed(self, hostname: str, incarnation: str) -> None:
        """Removes the row of a failed node, of this incarnation only."""

    async def nodes(self) -> tuple[int, list[Node]]:
        """The version, and all nodes as they are at it, by name."""

    async def changes(self, since: int) -> list[Change] | None:
        """The changes after a version, oldest first; None when they are no longer all known."""
