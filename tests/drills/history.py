"""What clients saw in one life of a cluster, event by event, in the manner of Jepsen: the checker judges nothing else.

All times are monotonic seconds of one clock. `key` names a message or a request; it is its stanza's id, and nobody uses
one twice. `session` names one bind of one client: a session that resumes (XEP-0198 5) is the same one, a new bind is another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    at: float
    session: str


# --- sessions ---


@dataclass(frozen=True, slots=True)
class Began(Event):
    """A resource was bound; presence follows at once."""

    jid: str
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Available(Event):
    """RFC 6121 4.2.2: its own presence came to the session, for the first time: the server has dealt with it."""


@dataclass(frozen=True, slots=True)
class Managed(Event):
    """XEP-0198 3: <enabled/>, with the seconds that the server keeps the session; 0 where it does not."""

    resumption: float


@dataclass(frozen=True, slots=True)
class Cut(Event):
    """The stream was lost; the session may come back."""


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """XEP-0198 5: <resumed/>."""


@dataclass(frozen=True, slots=True)
class Ended(Event):
    """The session will not come back: its stream was closed properly, or resumption failed, or was not tried."""

    clean: bool
    # XEP-0198 5: the server answered <failed/>.
    refused: bool = False


# --- messages ---


@dataclass(frozen=True, slots=True)
class Sent(Event):
    """A message was written for the first time in this session. Sending again after resumption is no event; sending
    again after a failed one is: the same key in another session."""

    key: str
    to: str
    type: str
    body: str


@dataclass(frozen=True, slots=True)
class Acknowledged(Event):
    """The server took responsibility: by <a h=…/>, or, without XEP-0198, by the answer to a later stanza of the stream."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Received(Event):
    """All bytes of a message have come."""

    key: str
    from_: str
    body: str


@dataclass(frozen=True, slots=True)
class Confirmed(Event):
    """The receiver said so: by <a h=…/> or <resume h=…/>, or, without XEP-0198, by the answer to a later ping of the
    server."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bounced(Event):
    """A message came back to its sender as an error."""

    key: str
    condition: str


# --- requests ---


@dataclass(frozen=True, slots=True)
class Asked(Event):
    """An IQ request was written."""

    key: str
    to: str


@dataclass(frozen=True, slots=True)
class Answered(Event):
    """Its result or error came."""

    key: str
    from_: str


@dataclass(frozen=True, slots=True)
class Dropped(Event):
    """The client gives up what was not acknowledged and does not send it again."""

    keys: tuple[str, ...]


# --- presence ---


@dataclass(frozen=True, slots=True)
class Saw(Event):
    """Presence of somebody else's session came."""

    of: str
    available: bool


# --- what was done to the cluster ---


@dataclass(frozen=True, slots=True)
class Fault(Event):
    """From `at` to `healed` something was broken; it belongs to no session."""

    what: str
    healed: float


class History:
    """Events in the order in which they happened."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        self.events.append(event)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)
