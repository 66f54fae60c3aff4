"""The client streams of a connector, by number and by session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from services.connector.copies import Copies
from tidings.kit.logging import get_logger

if TYPE_CHECKING:
    from services.connector.client_stream import ClientStream
    from services.connector.limits import Addresses
    from services.connector.router_link import RouterLink

log = get_logger("connector")


class Streams:
    """All of them."""

    def __init__(
        self,
        choose: Callable[[ClientStream], RouterLink | None],
        link_to: Callable[[str], Awaitable[RouterLink | None]],
        other_link: Callable[[str], Awaitable[RouterLink | None]],
        link_now: Callable[[str], RouterLink | None],
        addresses: Addresses,
        spawn: Callable[[Any, str], Any],
    ) -> None:
        self.choose = choose
        # The link to a router, by its incarnation; waits a while for one that is only just coming.
        self.link_to = link_to
        # The link to any router but one that is gone; waits a while for one.
        self.other_link = other_link
        # The link to a router, if there is one now.
        self.link_now = link_now
        self.addresses = addresses
        self.spawn = spawn
        self._next = 0
        self._by_number: dict[int, ClientStream] = {}
        self.by_session: dict[str, ClientStream] = {}
        # Copies of sessions that have no stream here.
        self.copies = Copies(self)
        # Totals for metrics.
        self.opened = 0
        self.refused = 0
        self.slowed = 0

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Any:
        return iter(list(self._by_number.values()))

    def next_number(self) -> int:
        self._next += 1
        return self._next

    def add(self, stream: ClientStream) -> None:
        self.opened += 1
        self._by_number[stream.number] = stream

    def number_anew(self, stream: ClientStream) -> None:
        """What routers say of it by the number that it had goes nowhere."""
        if self._by_number.pop(stream.number, None) is not None:
            stream.number = self.next_number()
            self._by_number[stream.number] = stream

    def get(self, number: int) -> ClientStream | None:
        return self._by_number.get(number)

    def after(self, number: int, most: int) -> list[ClientStream]:
        """The streams with higher numbers, at most so many."""
        numbers = sorted(candidate for candidate in self._by_number if candidate > number)
        return [self._by_number[candidate] for candidate in numbers[:most]]

    def bound(self, stream: ClientStream) -> None:
        """It has its session from now on. Its router is told of the end of the stream that had the session before
        anything of the new one: it takes nothing of the session until then."""
        self.copies.forget(stream.session)
        before = self.by_session.get(stream.session)
        self.by_session[stream.session] = stream
        if before is not None and before is not stream and before.link is stream.link:
            before.superseded()

    def remove(self, stream: ClientStream, reason: str) -> None:
        if self._by_number.pop(stream.number, None) is None:
            return
        self.addresses.leave(stream.peer[0])
        if self.by_session.get(stream.session) is stream:
            del self.by_session[stream.session]
        log.debug("stream_ended", stream=stream.number, jid=stream.jid, reason=reason)
