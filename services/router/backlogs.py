"""Routers at which messages wait for the database for longer than a moment: it was away, or is slow. Nobody can read
what waits there. So a session that comes to another router reads what is stored for it when they have written what
they have for its account; what is newer waits for that.

Each router tells the others when its backlog begins and ends: of those that have none, nobody is asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from services.router.messages import written
from tidings.kit.logging import get_logger
from tidings.xmpp.jid import Jid

if TYPE_CHECKING:
    from services.router.messages import MessageStore
    from services.router.notes import Notes
    from tidings.cluster.view import ClusterView

log = get_logger("router")

# The names of the notes: that the router by whose incarnation they go, in the place of an account, has a backlog
# (with content) or has it no longer; and those that ask for what waits for an account to be written.
BACKLOG = "=backlog"
WRITTEN = "=written"

# Seconds from which on something waits for long; and between two looks at that.
LONG = 0.25
LOOK = 0.05
# Seconds for what waits to be written when a session comes; behind that it comes when it is. And for a router to say
# that it has not come to that yet: one that says nothing in `notes.KNOWN_TIMEOUT` hangs, and is not waited for.
WITHIN = 5.0
PATIENCE = 1.0
NOT_YET = b"not yet"


class Backlogs:
    """The backlog of one router, and what it knows of the others'."""

    def __init__(self, own: str, messages: MessageStore, notes: Notes) -> None:
        self._own = own
        self._messages = messages
        self._notes = notes
        self._others: frozenset[str] = frozenset()
        # The other routers that have one; and those that were told that this one has.
        self._behind: set[str] = set()
        self._told: frozenset[str] = frozenset()

    def view_changed(self, view: ClusterView) -> None:
        self._others = frozenset(node.incarnation for node in view.with_router_sessions()) - {self._own}
        self._behind &= self._others
        self._told &= self._others

    # --- this router's ---

    async def run(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(LOOK)

    def _look(self) -> None:
        oldest = self._messages.oldest_waiting
        behind = self._others if oldest and time.monotonic() - oldest > LONG else frozenset()
        if behind != self._told:
            for content, routers in ((b"1", behind - self._told), (b"", self._told - behind)):
                self._notes.tell_routers(sorted(routers), BACKLOG, self._own, content)
            self._told = behind

    def asked(self, account: Jid, _note: bytes) -> bytes | Awaitable[bytes]:
        """Another router wants what waits here for an account to be written."""
        return self._when_written() if self._messages.is_writing_for(account) else b""

    async def _when_written(self) -> bytes:
        return b"" if await written(self._messages, PATIENCE) else NOT_YET

    # --- all routers' ---

    def noted(self, router: Jid, note: bytes) -> bytes:
        if note:
            self._behind.add(router.domain)
        else:
            self._behind.discard(router.domain)
        return b""

    async def written(self, account: Jid) -> None:
        """Waits, within bounds, until what waits to be stored for an account is there, at whichever router."""
        waiting: list[Awaitable[object]] = []
        if self._messages.is_writing_for(account):
            waiting.append(written(self._messages, WITHIN))
        if self._behind:
            log.debug("backlogs_are_waited_for", account=str(account), routers=sorted(self._behind))
            waiting.append(self._written_elsewhere(str(account)))
        if waiting:
            await asyncio.gather(*waiting)

    async def _written_elsewhere(self, account: str) -> None:
        ends = time.monotonic() + WITHIN
        while self._behind and time.monotonic() < ends:
            if NOT_YET not in await self._notes.ask_routers(sorted(self._behind), WRITTEN, account, b""):
                return
