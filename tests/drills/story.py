"""Histories written by hand, for the tests of the checker."""

from __future__ import annotations

from tests.drills.checker import check
from tests.drills.history import (
    Acknowledged,
    Available,
    Began,
    Confirmed,
    Cut,
    Ended,
    Event,
    Managed,
    Received,
    Resumed,
    Sent,
)


class Story:
    """A history written by hand. Each event is a tenth of a second behind the one before."""

    def __init__(self) -> None:
        self.at = 0.0
        self.events: list[Event] = []
        self._jids: dict[str, str] = {}
        self._sent: dict[str, Sent] = {}

    def wait(self, seconds: float) -> Story:
        self.at += seconds
        return self

    def _tell(self, kind: type[Event], session: str, *rest: object, **more: object) -> Story:
        self.at += 0.1
        self.events.append(kind(self.at, session, *rest, **more))
        return self

    def begin(
        self, session: str, jid: str, resumption: float = 300.0, priority: int = 0, available: bool = True
    ) -> Story:
        self._jids[session] = jid
        self._tell(Began, session, jid, priority)
        if resumption:
            self._tell(Managed, session, resumption)
        return self._tell(Available, session) if available else self

    def cut(self, session: str) -> Story:
        return self._tell(Cut, session)

    def resume(self, session: str) -> Story:
        return self._tell(Resumed, session)

    def end(self, session: str, clean: bool = False, refused: bool = False) -> Story:
        return self._tell(Ended, session, clean, refused)

    def send(self, session: str, key: str, to: str, type_: str = "chat") -> Story:
        self._tell(Sent, session, key, to, type_, f"body of {key}")
        self._sent.setdefault(key, self.events[-1])  # type: ignore[arg-type]
        return self

    def acknowledge(self, session: str, *keys: str) -> Story:
        return self._tell(Acknowledged, session, keys)

    def deliver(self, session: str, *keys: str) -> Story:
        for key in keys:
            sent = self._sent[key]
            self._tell(Received, session, key, self._jids[sent.session], sent.body)
        return self

    def confirm(self, session: str, *keys: str) -> Story:
        return self._tell(Confirmed, session, keys)

    def tell(self, kind: type[Event], session: str, *rest: object) -> Story:
        return self._tell(kind, session, *rest)

    def found(self, durable: bool = True, patient: bool = True) -> list[str]:
        self._tell(Acknowledged, "", ())  # the time until which it was watched
        return [finding.kind for finding in check(self.events, durable, patient).findings]


A, B, B2 = "a@x/1", "b@x/1", "b@x/2"


def both() -> Story:
    return Story().begin("a", A).begin("b", B)
