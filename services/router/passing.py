"""Messages whose senders hear that they are safe when the copies of a session have them: with `memory`, and those
that are stored for nobody (RFC 6121 8.5: headlines, those of groups, errors). What waits here till the session gets
it would be lost if this router died."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from services.router.sessions import Session, Sessions, when_all_have_it

# Seconds between two looks at whether something still waits.
LOOK = 0.05


class Passing:
    """Waits until sessions have been given what came for them. One for each router."""

    def __init__(self, sessions: Sessions, spawn: Callable[[Any, str], Any]) -> None:
        self._sessions = sessions
        self._spawn = spawn
        # By session: what is to be called.
        self._waiting: dict[str, list[Callable[[bool], None]]] = {}

    def when_passed(self, session: Session, then: Callable[[bool], None]) -> None:
        """Calls `then` when a session has been given what came for it till now, and its copies have that, with
        whether there are any (`when_all_have_it`); or when it is here no longer: then that has gone where the
        session has."""
        if (waiting := self._waiting.get(session.id)) is not None:
            waiting.append(then)
        elif keeps_back(session):
            self._waiting[session.id] = [then]
            self._spawn(self._wait(session), "what a session is not given yet")
        else:
            when_all_have_it(session, then)

    def when_all_have_passed(self, sessions: Iterable[Session], then: Callable[[bool], None]) -> None:
        """The same for several that were given the same, with whether each has a copy: one that goes on elsewhere
        without it would get it behind what its sender writes next."""
        for session in sessions:
            then = partial(self._if_copied, session, then)
        then(True)

    def _if_copied(self, session: Session, then: Callable[[bool], None], copied: bool) -> None:
        if copied:
            self.when_passed(session, then)
        else:
            then(False)

    async def _wait(self, session: Session) -> None:
        try:
            while self._is_here(session) and keeps_back(session):  # noqa: ASYNC110 - soon, or it ends
                await asyncio.sleep(LOOK)
        finally:
            for then in self._waiting.pop(session.id):
                if self._is_here(session):
                    when_all_have_it(session, then)
                else:
                    then(False)

    def _is_here(self, session: Session) -> bool:
        return self._sessions.get(session.id) is session


def goes_on(session: Session) -> bool:
    """Whether what is given to a session now is in a copy of it, soon. One that is behind may not read for long:
    nobody waits for that."""
    return session.holder is not None and session.behind is None and not session.closed


def keeps_back(session: Session) -> bool:
    """Whether what comes for a session waits: for its first presence, behind what is stored, or while it moves."""
    return session.held is not None or session.early is not None or session.frozen is not None
