"""What routers have refused to each other, so that nothing of a flow goes past what comes back: pure.

Who refuses a stanza refuses all of its flow that was sent before its sender knew of that. Each side counts: the
sender says with each stanza how many refusals it has seen, and on a link nothing overtakes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set


class Refusals:
    """Those of one router, given and taken."""

    def __init__(self) -> None:
        # By router: how many we have taken, and how many it got from us; and the flows of which something was refused
        # to it, with the number of that refusal, oldest first.
        self._taken: dict[str, int] = {}
        self._given: dict[str, int] = {}
        self._flows: dict[str, OrderedDict[tuple[str, ...], int]] = {}

    def take(self, router: str) -> None:
        self._taken[router] = self._taken.get(router, 0) + 1

    def taken(self, router: str) -> int:
        """How many of a router we have seen; it is told so with each stanza."""
        return self._taken.get(router, 0)

    def give(self, router: str, flow: tuple[str, ...], guess: bool = False) -> None:
        """`guess`: it was one of several that were asked. Then what comes behind it is not refused: its sender sends
        nothing before one has taken it, and what another one has taken does not come back."""
        number = self._given[router] = self._given.get(router, 0) + 1
        if guess:
            return
        flows = self._flows.setdefault(router, OrderedDict())
        flows[flow] = number
        flows.move_to_end(flow)

    def goes_behind(self, router: str, flow: tuple[str, ...], seen: int) -> bool:
        """Whether a stanza comes behind one of its flow that was refused, and was sent before its sender knew; that
        one had seen so many refusals."""
        flows = self._flows.get(router)
        if not flows:
            return False
        refusal = flows.get(flow)
        while flows and next(iter(flows.values())) <= seen:
            # Its sender knows, and on a link nothing overtakes: no one needs to be told again.
            flows.popitem(last=False)
        return refusal is not None and refusal > seen

    def keep(self, routers: Set[str]) -> None:
        """Forgets all others."""
        for gone in (self._taken.keys() | self._given.keys()) - routers:
            self._taken.pop(gone, None)
            self._given.pop(gone, None)
            self._flows.pop(gone, None)
