"""The end of a session, told to the modules: each learns of it, also when the database is away meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger

if TYPE_CHECKING:
    from services.router.sessions import Session
    from tidings.kit.module import EndHandler, Hooks

log = get_logger("router")

# Seconds between two tries while the database is away.
RETRY = 1.0


class Endings:
    """Tells the modules of one router."""

    def __init__(
        self,
        hooks: Hooks,
        step: Callable[[], AbstractAsyncContextManager[None]],
        spawn: Callable[[Any, str], Any],
    ) -> None:
        """`step`: what a handler sends within it has arrived when it ends."""
        self._hooks = hooks
        self._step = step
        self._spawn = spawn
        # Modules that have not been told yet, because the database is away.
        self.owed = 0

    async def tell(self, session: Session, was_available: bool) -> None:
        """Returns when all modules know, but for those that need the database while it is away: these are told when
        it is back, for who saw the session must not see it for ever."""
        for handler in self._hooks.session_ended:
            if not await self._told(handler, session, was_available):
                self.owed += 1
                self._spawn(self._tell_later(handler, session, was_available), "the end of a session")

    async def _told(self, handler: EndHandler, session: Session, was_available: bool) -> bool:
        try:
            async with self._step():
                result = handler(session, was_available)
                if result is not None:
                    await result
        except DatabaseAway:
            return False
        except Exception:
            log.exception("session_end_failed", session=session.id)
        return True

    async def _tell_later(self, handler: EndHandler, session: Session, was_available: bool) -> None:
        try:
            while True:
                await asyncio.sleep(RETRY)
                if await self._told(handler, session, was_available):
                    return
        finally:
            self.owed -= 1
