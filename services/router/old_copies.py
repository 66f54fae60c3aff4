"""What becomes of a session's older copies: nobody may keep one under an epoch that still counts.

A connector that is to have a copy no longer is told to forget it. One that does not say that it has, because it is
silent or its link has ended, may bring it to another router later (reattachment.py): so the session's epoch is raised
in the table, and what has the older one is refused there.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from tidings.kit.db import DatabaseAway

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from services.router.connector_link import ConnectorLink
    from services.router.sessions import Session

# Seconds for a connector to say that it has forgotten a copy.
FORGET_TIMEOUT = 1.0
# Epochs that are raised at one time: stops the end of a connector with many sessions from filling the database.
RAISED_AT_ONCE = 32
# Seconds for which it counts that the cluster has this router.
KNOWN = 1.0
# Seconds before what could not be done is tried again.
AGAIN = 0.5


class OldCopies:
    """Has them forgotten, or outdated. One for each router."""

    def __init__(self, spawn: Callable[[Any, str], Any]) -> None:
        self._spawn = spawn
        # Raises a session's epoch in the table; whether this router has a session.
        self.keep: Callable[[Session], Awaitable[bool]] = _yes
        self.is_here: Callable[[Session], bool] = lambda _session: True
        # Whether the cluster has this router, asked now.
        self.is_in: Callable[[], Awaitable[bool]] = _yes
        # Sessions whose epochs are to be raised when that is known; and whether it is being asked.
        self._outdated: set[Session] = set()
        self._asking = False
        self._raising = asyncio.Semaphore(RAISED_AT_ONCE)

    def let_go(self, session: Session, link: ConnectorLink, patience: float = FORGET_TIMEOUT) -> None:
        """A connector is to forget its copy. When it does not say that it has, the session's epoch is raised: nobody
        may keep an old copy under an epoch that still counts."""
        if not self.is_here(session):
            link.forget(session)
            return
        session.old_copies |= {link}
        link.forget(session)
        link.when_copied(partial(self._has_forgotten, session, link))
        if link not in session.old_copies:
            return
        if link.over or link.handling is None or not patience:
            self.outdate(session)
        else:
            asyncio.get_running_loop().call_later(patience, self.outdate, session)

    @staticmethod
    def _has_forgotten(session: Session, link: ConnectorLink) -> None:
        # Also called when the link ends: then nobody has said anything.
        if not link.over:
            session.are_forgotten((link,))

    def outdate_behind(self, session: Session, link: ConnectorLink) -> None:
        """The same as `outdate`, when a connector has the good copy."""
        link.when_copied(lambda: None if link.over else self.outdate(session))

    def outdate(self, session: Session) -> None:
        """Somebody may have an old copy: its epoch is to count no more. That needs the cluster to have this router
        still: else the good copies, which other routers are just given, would count no more either."""
        if session.old_copies and self.is_here(session) and not session.closed:
            self._outdated.add(session)
            if not self._asking:
                self._asking = True
                self._spawn(self._outdate(), "the epochs of sessions with old copies")

    async def _outdate(self) -> None:
        try:
            while self._outdated:
                sessions, self._outdated = self._outdated, set()
                while not await self.is_in():  # noqa: ASYNC110 - it is asked anew
                    await asyncio.sleep(AGAIN)
                until = time.monotonic() + KNOWN
                for session in sessions:
                    self._spawn(self._raise_epoch(session, until), "the epoch of a session with an old copy")
        finally:
            self._asking = False

    async def _raise_epoch(self, session: Session, until: float) -> None:
        """`until`: the monotonic time up to which it is known that the cluster has this router."""
        # A router that ends has closed its database.
        with suppress(AssertionError):
            async with self._raising:
                old = session.old_copies
                if not old or session.closed:
                    return
                # One that is frozen goes to another router, with a higher one, or stays.
                if session.frozen is None and time.monotonic() < until:
                    with suppress(DatabaseAway):
                        if self.is_here(session) and await self.keep(session):
                            self._when_known(session, partial(session.are_forgotten, old))
                        return
            await asyncio.sleep(AGAIN)
            self.outdate(session)

    @staticmethod
    def _when_known(session: Session, then: Callable[[], None]) -> None:
        """When those that have good copies know of what has changed."""
        for link in dict.fromkeys((session.holder, session.link)):
            if link is not None:
                link.tell_progress()
                then = partial(link.when_copied, then)
        then()


async def _yes(*_: object) -> bool:
    return True
