"""A session that was only just bound: its messages wait for its first presence, behind which it gets what was stored
before. One that sends none gets them after a moment."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.router.sessions import Session

# Seconds for which a new session's messages wait for its first presence.
FIRST_PRESENCE = 1.0
# How many times as long when the client has sent nothing at all: it may not have been told yet that it is bound.
PATIENCE = 2


class FirstPresence:
    """Waits for those of one router's sessions. While it does, a session is settling: what is for it is in
    `Session.held`, and it has no `holds`."""

    def __init__(self, let_through: Callable[[Session], None]) -> None:
        """`let_through`: gives a session what has waited."""
        self._let_through = let_through
        # The same for a session that was taken over: what its former router has stored as given to it goes first.
        self.let_doubtful_through = let_through

    def settle(self, session: Session) -> None:
        """Keeps messages back from a session that was only just bound."""
        session.held = deque()

    def told(self, session: Session) -> None:
        """Its connector knows that it is bound, or its client has come back: the waiting begins."""
        if is_settling(session) and session.settling is None:
            self._wait(session, PATIENCE)

    def settle_again(self, session: Session) -> None:
        """Ends a `hold` of a session that was taken over, and has sent no presence as far as its copy knows: its
        messages go on waiting for that."""
        session.holds -= 1
        if not session.holds and session.link is not None:
            self.told(session)

    def _wait(self, session: Session, left: int) -> None:
        session.settling = asyncio.get_running_loop().call_later(FIRST_PRESENCE, self._waited, session, left)

    def _waited(self, session: Session, left: int) -> None:
        session.settling = None
        if session.holds or (session.link is None and session.resume_seconds):
            return  # its client sends its presence when it comes back, if it had sent any
        if session.lane.waiting is not None:
            self._wait(session, left)  # it may be among what the session has sent
        elif left and not session.inbound.number:
            self._wait(session, left - 1)  # its client may not know yet that it is bound
        elif session.doubtful:
            self.let_doubtful_through(session)
        else:
            self._let_through(session)


def is_settling(session: Session) -> bool:
    """Whether a session was only just bound: messages for it wait for its first presence."""
    return session.held is not None and not session.holds


def stop_settling(session: Session) -> None:
    """It has come, or the session is over."""
    if session.settling is not None:
        session.settling.cancel()
        session.settling = None
