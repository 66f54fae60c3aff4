"""What becomes of a new connection to a node: seen from here, and from other nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from tidings.cluster.node import Node, NodeState
from tidings.kit.probe import Outcome

# Seconds for another node to look at a node, and how many are asked for a second opinion.
ASK_TIMEOUT = 1.0
WITNESSES = 3

# Finds out what becomes of a connection to an address and port.
Probe = Callable[[str, int], Awaitable[Outcome]]
# Has a node do it (the one that is asked, the one that is looked at); raises TimeoutError when it can't be asked.
Ask = Callable[[Node, Node], Awaitable[Outcome]]


class Witnesses:
    """Asks this process and others whether they get through to a node."""

    def __init__(self, own_incarnation: str, probe: Probe, ask: Ask) -> None:
        self._own = own_incarnation
        self._probe = probe
        self._ask = ask

    async def here(self, node: Node) -> Outcome:
        """What this process finds."""
        return await self._probe(node.address, node.port)

    async def prove_dead(self, node: Node, nodes: Sequence[Node], refused_reporter: str, late: bool) -> bool:
        """Whether a node is proven dead: this registry, and one more node where there is one, find a new connection
        refused. `refused_reporter`: the incarnation that has found it refused already; '': none. `late`: its beat
        has stood still for so long that it should have come: who has no witness may be behind a firewall that
        refuses everything, and then the others' beats go on."""
        if await self.here(node) is not Outcome.REFUSED:
            return False
        others = self._independent(node, nodes)
        if any(other.incarnation == refused_reporter for other in others):
            return True
        outcomes = await asyncio.gather(*(self._outcome(other, node) for other in others[:WITNESSES]))
        if Outcome.ACCEPTED in outcomes:
            return False
        if any(outcome is not None for outcome in outcomes):
            return Outcome.REFUSED in outcomes
        # None of them can be asked: then they may be dead themselves, each with its own proof. On our own host no
        # firewall is between.
        certain = late or node.host == self._own_host(nodes)
        return certain and all([await self.here(other) is Outcome.REFUSED for other in others[:WITNESSES]])

    def _independent(self, node: Node, nodes: Sequence[Node]) -> list[Node]:
        """The nodes that can see something else than this process does: what refuses us on the way to another host
        refuses everybody on our own host too."""
        here = self._own_host(nodes)
        return [
            other
            for other in nodes
            if other.incarnation not in (self._own, node.incarnation)
            and other.state is NodeState.UP
            and (other.host != here or node.host == here)
        ]

    def _own_host(self, nodes: Iterable[Node]) -> str | None:
        return next((other.host for other in nodes if other.incarnation == self._own), None)

    async def not_reaching(self, node: Node, nodes: Iterable[Node]) -> list[str]:
        """The routers and registries that do not get through to a node that joins, by name. It would be put out again
        in a moment; and a registry must be able to prove its death."""
        if node.incarnation != self._own and await self.here(node) is not Outcome.ACCEPTED:
            return ["the registry"]
        others = [
            other
            for other in nodes
            if other.incarnation not in (self._own, node.incarnation)
            and other.state is NodeState.UP
            and not {"router", "registry"}.isdisjoint(other.services)
        ]
        outcomes = await asyncio.gather(*(self._outcome(other, node) for other in others))
        return [
            other.hostname for other, outcome in zip(others, outcomes, strict=True) if outcome is not Outcome.ACCEPTED
        ]

    async def _outcome(self, asked: Node, node: Node) -> Outcome | None:
        """What another node finds; None when it can't be asked."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT):
                return await self._ask(asked, node)
        except TimeoutError:
            return None
