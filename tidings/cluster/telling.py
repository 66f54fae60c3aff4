"""Notes of the strategy that other routers have not taken yet, and who waits for them. Pure; see `forwarding`."""

from __future__ import annotations

from collections.abc import Callable

from tidings.cluster.flows import Sent


class Telling:
    """Those of one router."""

    def __init__(self) -> None:
        self._under_way: set[Sent] = set()
        # Who waits, each for those that were under way when it began to.
        self._waiting: list[tuple[set[Sent], Callable[[], None]]] = []

    def add(self, sent: Sent) -> None:
        """A note is under way."""
        self._under_way.add(sent)

    def over(self, sent: Sent) -> None:
        """It is taken, or its receiver is no more."""
        self._under_way.discard(sent)
        for notes, _ in self._waiting:
            notes.discard(sent)
        ready = [then for notes, then in self._waiting if not notes]
        self._waiting = [entry for entry in self._waiting if entry[0]]
        for then in ready:
            then()

    def when_over(self, then: Callable[[], None]) -> None:
        """Calls `then` when the notes that are under way now are over; at once when there are none."""
        if self._under_way:
            self._waiting.append((set(self._under_way), then))
        else:
            then()
