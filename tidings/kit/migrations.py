"""Migrations: each service brings its tables up to date at its start, by Alembic.

Any number of nodes may start at once. A lease row lets one of them work while the others wait and look
again; the holder raises a number while it works, and who sees the number stand still takes over. MySQL
changes tables outside of transactions, so a migration must be written so that a half-done one can be run
again.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.kit.db import Database, DatabaseAway, Text, is_gone
from tidings.kit.logging import get_logger

log = get_logger("database")

# Seconds that a holder's number may stand still, between two looks, and in which all must be done.
LEASE = 15.0
LOOK = 0.2
PATIENCE = 300.0

_metadata = sa.MetaData()
_leases = sa.Table(
    "migration_leases",
    _metadata,
    sa.Column("service", Text(64), primary_key=True),
    sa.Column("holder", Text(64), nullable=False),
    sa.Column("beat", sa.Integer, nullable=False),
)


class MigrationError(Exception):
    """The tables can't be brought up to date; the text says why."""


async def migrate(database: Database, service: str, location: str) -> None:
    """Brings a service's tables up to date.

    `location`: "package:folder" with Alembic's version files. Raises MigrationError, DatabaseAway.
    """
    package, _, folder = location.partition(":")
    scripts = _scripts(str(files(package).joinpath(folder)))
    head = scripts.get_current_head()

    async def done() -> bool:
        current = await _current(database, service)
        if current is None or current == head:
            return current == head
        # A newer release has been here: what it did leaves room for this one, or they could not run side by side.
        newer = current not in {script.revision for script in scripts.walk_revisions()}
        if newer:
            log.info("tables_are_newer", service=service, at=current, known=head)
        return newer

    if await done():
        return
    await _make_lease_table(database)
    lease = _Lease(database, service, done)
    if not await lease.acquire():
        return  # another process has done it
    beating = asyncio.get_running_loop().create_task(lease.keep(), name=f"migration lease of {service}")
    try:
        log.info("migrating", service=service, to=head)
        async with database.write(timeout=PATIENCE) as connection:
            with _explained(f"the tables of {service} can't be brought up to date"):
                await connection.run_sync(_upgrade, scripts, service)
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await lease.release()


def _scripts(folder: str) -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.set_main_option("version_locations", folder.replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    return ScriptDirectory.from_config(config)


def _version_table(service: str) -> str:
    return f"alembic_version_{service}"


def _upgrade(connection: sa.Connection, scripts: ScriptDirectory, service: str) -> None:
    def steps(revision: Any, _context: Any) -> Any:
        return scripts._upgrade_revs("head", revision)

    environment = EnvironmentContext(Config(), scripts, fn=steps)
    environment.configure(connection=connection, version_table=_version_table(service), transactional_ddl=False)
    with environment:
        environment.run_migrations()


async def _current(database: Database, service: str) -> str | None:
    """The version that the tables are at; None before the first."""

    def look(connection: sa.Connection) -> str | None:
        table = _version_table(service)
        if not sa.inspect(connection).has_table(table):
            return None
        value = connection.execute(sa.text(f"select version_num from {table}")).scalar()  # noqa: S608
        return value.decode() if isinstance(value, bytes) else value

    async with database.read() as connection:
        return await connection.run_sync(look)


async def _make_lease_table(database: Database) -> None:
    async with database.write() as connection:
        with _explained("can't make tables in this database"):
            await connection.execute(sa.schema.CreateTable(_leases, if_not_exists=True))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Makes a MigrationError of what a statement is refused for, unless it is the server that is away."""
    try:
        yield
    except DBAPIError as error:
        if is_gone(error):
            raise
        raise MigrationError(f"{what}: {error.orig}") from error


class _Lease:
    """The right to migrate one service's tables."""

    def __init__(self, database: Database, service: str, done: Callable[[], Awaitable[bool]]) -> None:
        """`done`: whether nothing is left to do."""
        self._database = database
        self._service = service
        self._done = done
        self._holder = secrets.token_hex(8)

    async def acquire(self) -> bool:
        """Waits for the right; False when meanwhile there is nothing left to do."""
        seen: tuple[str, int] | None = None
        since = time.monotonic()
        give_up = since + PATIENCE
        while time.monotonic() < give_up:
            if await self._done():
                return False
            found = await self._try(seen if time.monotonic() - since >= LEASE else None)
            if found is None:
                if await self._done():
                    await self.release()
                    return False
                return True
            if found != seen:
                seen, since = found, time.monotonic()
            await asyncio.sleep(LOOK)
        raise MigrationError(f"another process has been migrating {self._service} for {PATIENCE:.0f} s; is it hung?")

    async def _try(self, stale: tuple[str, int] | None) -> tuple[str, int] | None:
        """Takes the lease when it is free, or `stale` still has it. Returns who has it, None: we have."""

        async def work(connection: AsyncConnection) -> tuple[str, int] | None:
            mine = sa.and_(_leases.c.service == self._service)
            row = (await connection.execute(sa.select(_leases.c.holder, _leases.c.beat).where(mine))).first()
            if row is None:
                await connection.execute(_leases.insert().values(service=self._service, holder=self._holder, beat=0))
                return None
            found = (row.holder, row.beat)
            if found != stale:
                return found
            taken = await connection.execute(
                _leases.update()
                .where(mine, _leases.c.holder == found[0], _leases.c.beat == found[1])
                .values(holder=self._holder, beat=found[1] + 1)
            )
            return None if taken.rowcount else found

        try:
            return await self._database.transaction(work)
        except (DBAPIError, DatabaseAway):
            return ("", -1)  # another process was faster with the same insert; or the next look says what is wrong

    async def keep(self) -> None:
        """Raises the number until cancelled. On SQLite the work itself locks others out."""
        while not self._database.sqlite:
            await asyncio.sleep(LEASE / 5)
            try:
                async with self._database.write() as connection:
                    await connection.execute(
                        _leases.update()
                        .where(_leases.c.service == self._service, _leases.c.holder == self._holder)
                        .values(beat=_leases.c.beat + 1)
                    )
            except (DBAPIError, DatabaseAway):
                log.warning("migration_lease_not_renewed", service=self._service)

    async def release(self) -> None:
        async with self._database.write() as connection:
            await connection.execute(
                _leases.delete().where(_leases.c.service == self._service, _leases.c.holder == self._holder)
            )
