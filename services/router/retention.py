"""How long archives keep messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from services.router.messages import MessageStore
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger

log = get_logger("database")

# Seconds between two sweeps. All routers sweep: who finds nothing left has asked little.
SWEEP_PAUSE = 3600.0
# Messages of one transaction, and seconds to the next one: nobody is to wait for long behind them.
PORTION = 200
PORTION_PAUSE = 0.2
DAY_MS = 86_400_000


class Retention:
    """Takes messages that are too old out of the archives."""

    def __init__(
        self,
        store: MessageStore,
        hosts: Sequence[str],
        days: Callable[[str], int],
        now_ms: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        """`days`: for how many a host's archives keep messages; 0: for ever."""
        self._store = store
        self._hosts = hosts
        self._days = days
        self._now_ms = now_ms

    async def run(self) -> None:
        while True:
            for host in self._hosts:
                if days := self._days(host):
                    await self.sweep(host, days)
            await asyncio.sleep(SWEEP_PAUSE)

    async def sweep(self, host: str, days: int) -> None:
        before = self._now_ms() - days * DAY_MS
        removed = 0
        try:
            while (portion := await self._store.expire(host, before, PORTION)) == PORTION:
                removed += portion
                await asyncio.sleep(PORTION_PAUSE)
            removed += portion
        except DatabaseAway as away:
            log.warning("archive_not_swept", host=host, reason=str(away))
        if removed:
            log.info("archive_swept", host=host, removed=removed)
