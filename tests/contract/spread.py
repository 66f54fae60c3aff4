"""Stores over the servers of a Galera cluster, each call at the next one: as when processes use different servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import cycle
from typing import Any

from tidings.kit.database_url import parse
from tidings.kit.db import Database
from tidings.testing.galera import Galera


class Spread:
    """One port, served by several objects in turn."""

    def __init__(self, objects: Sequence[Any]) -> None:
        self._turns = cycle(objects)

    def __getattr__(self, name: str) -> Any:
        return getattr(next(self._turns), name)


@asynccontextmanager
async def databases(galera: Galera) -> AsyncIterator[list[Database]]:
    """One new database, as it is opened by processes of which each prefers another server."""
    url = parse(galera.create_database())
    opened = [Database(replace(url, hosts=url.hosts[n:] + url.hosts[:n])) for n in range(len(url.hosts))]
    for database in opened:
        await database.start()
    try:
        yield opened
    finally:
        for database in opened:
            await database.stop()
