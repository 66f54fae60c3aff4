"""The sessions of a history: when each lived, and when its stream worked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.drills.history import (
    Acknowledged,
    Answered,
    Available,
    Began,
    Bounced,
    Confirmed,
    Cut,
    Ended,
    Event,
    Managed,
    Received,
    Resumed,
    Saw,
)


def account_of(jid: str) -> str:
    return jid.partition("/")[0]


@dataclass
class Life:
    """One session. `ended` is None while it lives, or may live: see `waits`."""

    name: str
    jid: str
    priority: int
    began: float
    resumption: float = 0.0
    ended: float | None = None
    clean: bool = False
    refused: bool = False
    # When its client knew that it is there for what is sent to its account.
    available: float = math.inf
    # When its stream was lost, each time, whether it came back or not.
    cuts: list[float] = field(default_factory=list)
    # From when to when it had a working stream; the last one may be open.
    spans: list[tuple[float, float | None]] = field(default_factory=list)
    # When something came on its stream for the last time; and the times behind that until the stream was lost: it may
    # have been dead already, with the process that held it.
    heard: float = -math.inf
    silent: list[tuple[float, float]] = field(default_factory=list)

    @property
    def account(self) -> str:
        return account_of(self.jid)

    @property
    def shown(self) -> float:
        """When its first presence was on its way to others: its client knows when it sees it itself."""
        return self.began if self.available == math.inf else self.available

    @property
    def waits(self) -> bool:
        """It has no stream, and may be resumed."""
        return self.ended is None and self.spans[-1][1] is not None

    @property
    def works(self) -> bool:
        return self.ended is None and self.spans[-1][1] is None

    @property
    def losses(self) -> list[float]:
        """When its stream was lost, each time, and not closed."""
        return [*self.cuts, *(() if self.ended is None or self.clean else (self.ended,))]

    def working(self, since: float, until: float) -> float:
        """The seconds of that time in which it had a working stream."""
        return sum(
            max(0.0, min(until, until if end is None else end) - max(since, start)) for start, end in self.spans
        )

    def served(self, since: float, until: float) -> float:
        """The same, without the times in which nothing came before a stream was lost."""
        silent = (max(0.0, min(until, end) - max(since, start)) for start, end in self.silent)
        return self.working(since, until) - sum(silent)

    def broken_before(self, when: float) -> bool:
        """Its stream was lost, or it ended, before that."""
        return any(cut <= when for cut in self.cuts) or (self.ended is not None and self.ended <= when)

    def lost_within(self, seconds: float, given: float) -> bool:
        """What it was given at that moment, or later, may not have come to its client: its stream was lost, not closed,
        before that, or within so many seconds."""
        return any(given > when - seconds for when in self.losses)

    def close(self, at: float) -> None:
        """The stream works no longer."""
        start, end = self.spans[-1]
        if end is None:
            self.spans[-1] = (start, at)
            self.silent.append((max(start, self.heard), at))


class Lives:
    """All of them, by name."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._lives: dict[str, Life] = {}
        self._by_account: dict[str, list[Life]] = {}
        for event in events:
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case Began():
                life = Life(event.session, event.jid, event.priority, event.at, spans=[(event.at, None)])
                self._lives[event.session] = life
                self._by_account.setdefault(life.account, []).append(life)
            case Available():
                self._lives[event.session].available = event.at
            case Managed():
                self._lives[event.session].resumption = event.resumption
            case Cut():
                self._lives[event.session].close(event.at)
                self._lives[event.session].cuts.append(event.at)
            case Resumed():
                self._lives[event.session].spans.append((event.at, None))
            case Received() | Bounced() | Answered() | Acknowledged() | Confirmed() | Saw() if (
                event.session in self._lives
            ):
                self._lives[event.session].heard = event.at
            case Ended():
                life = self._lives[event.session]
                life.close(event.at)
                life.ended, life.clean, life.refused = event.at, event.clean, event.refused

    def __getitem__(self, name: str) -> Life:
        return self._lives[name]

    def __iter__(self) -> Iterator[Life]:
        return iter(self._lives.values())

    def of(self, account: str) -> list[Life]:
        """The sessions of an account, in the order in which they began."""
        return self._by_account.get(account, [])

    def of_jid(self, jid: str) -> list[Life]:
        return [life for life in self.of(account_of(jid)) if life.jid == jid]
