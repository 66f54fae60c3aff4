"""Which host of a MySQL, MariaDB or Galera database a process uses: one at a time, the first that serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import aiomysql
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine

from tidings.kit.database_url import DatabaseUrl
from tidings.kit.logging import get_logger

log = get_logger("database")

# Seconds to connect to a host and to learn whether it serves: where there is one; where there are several (less than
# `db.TRY_TIMEOUT`: who tries a silent database must get to the next one); and where the one in use is looked at: it
# is left when it does not answer in that time.
CONNECT_TIMEOUT = 5.0
CHOOSE_TIMEOUT = 1.5
ANSWER_TIMEOUT = 2.5
# Seconds between two looks at the host in use, and at those that are to be preferred to it.
LOOK = 0.5
RETURN_LOOK = 10.0

# MySQL: the host can't be reached. Galera: it is not in step with the others, or they are too few.
UNREACHABLE = 2003
NOT_READY = 1047
# What a look is answered with by a host that is to be left: these, or it is going, or has gone meanwhile.
_LEFT = frozenset((UNREACHABLE, NOT_READY, 1053, 1927, 2006, 2013, 2055))
# The option of a connection whose statements wait for what was committed at other servers, and what stands before
# them then, on Galera: 7 is for every kind of statement. Within a transaction only the first one waits.
CAUSAL = "tidings_causal"
CAUSALLY = "set statement wsrep_sync_wait = 7 for "

Place = tuple[str, int]


class Silent(aiomysql.OperationalError):  # type: ignore[misc]
    """A host did not answer in time."""


@dataclass(frozen=True, slots=True)
class Server:
    """What stands behind a connection."""

    place: Place
    galera: bool
    # In step with its cluster, and not busy with giving another node a copy.
    synced: bool


class Hosts:
    """The hosts of one database.

    All connections of a process go to one, so that it reads what it has written. A host that refuses, hangs or is
    not in the primary component of its Galera cluster is left for the first one that serves, with all connections of
    the pool; those that are in use are cut off if it hangs. When an earlier host serves again the process goes back:
    all processes are to use the same one, for then nothing fails certification.
    """

    def __init__(self, url: DatabaseUrl, moved: Callable[[], None]) -> None:
        """`moved` is called when another host than before is used."""
        self._url = url
        self._moved = moved
        # None: it is to be chosen.
        self.present: Place | None = url.hosts[0] if len(url.hosts) == 1 else None
        # Which one was left, until another one is used.
        self._left: Place | None = None
        self._choosing = asyncio.Lock()
        # When nobody was found to serve, by the loop's clock, and why.
        self._nobody: tuple[float, Exception] | None = None
        self._servers: WeakKeyDictionary[Any, Server] = WeakKeyDictionary()

    # --- connections of the pool ---

    def attach(self, engine: AsyncEngine) -> None:
        """Has an engine's pool connect by way of this."""
        pool = engine.sync_engine

        @event.listens_for(pool, "do_connect")
        def _connect(dialect: Any, _record: Any, arguments: Any, parameters: Any) -> Any:
            return dialect.connect(*arguments, **{**parameters, "async_creator_fn": self._connect})

        @event.listens_for(pool, "checkout")
        def _checked_out(connection: Any, record: Any, _proxy: Any) -> None:
            fresh = not record.info.get("used")
            record.info["used"] = True
            if not fresh and not self._usable(connection.driver_connection):
                connection.driver_connection.close()
                raise DisconnectionError("its server is gone, or another one is used now")

        @event.listens_for(pool, "before_cursor_execute", retval=True)
        def _execute(connection: Any, _cursor: Any, statement: str, parameters: Any, _: Any, many: bool) -> Any:
            if not many and connection.get_execution_options().get(CAUSAL) and self._server(connection).galera:
                statement = CAUSALLY + statement
            return statement, parameters

        @event.listens_for(pool, "handle_error")
        def _failed(context: Any) -> None:
            if _number(context.original_exception) == NOT_READY and context.connection is not None:
                context.is_disconnect = True
                self._leave(self._server(context.connection).place)

    def _server(self, connection: Any) -> Server:
        return self._servers[connection.connection.driver_connection]

    def _usable(self, connection: Any) -> bool:
        # A server that has gone has closed its connections: nobody needs to fail to find that out.
        reader = connection._reader
        gone = reader is None or reader.at_eof() or reader.exception() is not None
        return self._servers[connection].place == self.present and not gone

    async def _connect(self, **parameters: Any) -> Any:
        """A new connection to the host in use. Raises the driver's errors."""
        several = len(self._url.hosts) > 1
        error: Exception | None = None
        # Often enough to be there when `watch` has left one that hangs.
        for _ in range(1 + len(self._url.hosts) if several else 1):
            place = self.present or await self._choose()
            try:
                return await self._open(place, CHOOSE_TIMEOUT if several else CONNECT_TIMEOUT, **parameters)
            except Silent as failed:
                # Only `watch` leaves one that hangs, so that all processes do it at the same time: a node whose
                # registry does it later than others must take itself for cut off from the database.
                error = failed
            except aiomysql.Error as failed:
                if _number(failed) not in _LEFT:
                    raise
                self._leave(place)
                error = failed
        assert error is not None
        raise error

    async def _open(self, place: Place, timeout: float, **parameters: Any) -> Any:
        """Connects to a host that serves. Raises the driver's errors."""
        wanted = {**parameters, "host": place[0], "port": place[1]}
        try:
            async with asyncio.timeout(timeout):
                connection = await aiomysql.connect(**wanted)
                try:
                    self._servers[connection] = await _server(connection, place)
                except BaseException:
                    connection.close()
                    raise
                return connection
        except TimeoutError:
            raise Silent(UNREACHABLE, f"{_text(place)} does not answer") from None
        except (OSError, RuntimeError) as error:
            raise aiomysql.OperationalError(UNREACHABLE, f"{_text(place)} is gone: {error}") from None

    # --- which one ---

    def _leave(self, place: Place) -> None:
        """Has another one chosen: by the next who connects, or by `watch`, for all connections may be in use."""
        if self.present == place and len(self._url.hosts) > 1:
            log.warning("database_host_left", host=_text(place))
            self.present, self._left = None, place

    def _use(self, place: Place) -> None:
        """From now on all use this one; who still waits for the one that was left is told that it is gone."""
        log.info("database_host", host=_text(place))
        left, self.present, self._left = self._left, place, None
        if left not in (None, place):
            for connection, server in list(self._servers.items()):
                if server.place == left and not connection.closed:
                    connection._writer.transport.abort()
        self._moved()

    async def _choose(self) -> Place:
        """The first host that serves. Raises the driver's errors when there is none."""
        clock = asyncio.get_running_loop().time
        asked = clock()
        async with self._choosing:
            if self.present is not None:
                return self.present  # somebody else has chosen
            if self._nobody is None or self._nobody[0] < asked:
                errors: list[Exception] = []
                # The one that was left comes last: it would be waited for again.
                for place in sorted(self._url.hosts, key=lambda place: place == self._left):
                    try:
                        await self._look(place, CHOOSE_TIMEOUT)
                    except aiomysql.Error as error:
                        errors.append(error)
                    else:
                        self._use(place)
                        return place
                self._nobody = clock(), errors[0]
            why = self._nobody[1]
            raise type(why)(*why.args)

    async def _look(self, place: Place, timeout: float, causal: bool = False) -> Server:
        """Whether a host serves, by a connection of its own. Raises the driver's errors."""
        own = {"user": self._url.user, "password": self._url.password, "db": self._url.database}
        connection = await self._open(place, timeout, **own)
        server = self._servers[connection]
        try:
            async with asyncio.timeout(timeout):
                if causal and server.galera:
                    # It can answer this only in step with the others: one that has just woken may not know better.
                    await connection.query(f"{CAUSALLY}select 1")
                await connection.ensure_closed()
        except (OSError, RuntimeError) as error:
            raise aiomysql.OperationalError(UNREACHABLE, f"{_text(place)} is not in step: {error}") from None
        finally:
            connection.close()
        return server

    async def watch(self) -> None:
        """Looks, again and again, whether the host in use answers, and whether an earlier one serves again. Only for
        several hosts."""
        clock = asyncio.get_running_loop().time
        looked = clock()
        while True:
            await asyncio.sleep(LOOK)
            if (place := self.present) is not None:
                try:
                    await self._look(place, ANSWER_TIMEOUT)
                except aiomysql.Error as error:
                    if _number(error) in _LEFT:
                        self._leave(place)
                else:
                    if clock() >= looked + RETURN_LOOK:
                        looked = clock()
                        await self._return_from(place)
            if self.present is None:
                with suppress(aiomysql.Error):
                    await self._choose()

    async def _return_from(self, place: Place) -> None:
        """Goes back to the first of the earlier hosts that is in step. What is under way here goes on."""
        for earlier in self._url.hosts[: self._url.hosts.index(place)]:
            try:
                server = await self._look(earlier, CHOOSE_TIMEOUT, causal=True)
            except aiomysql.Error:
                continue
            if server.synced and self.present == place:
                self._use(earlier)
            return


async def _server(connection: Any, place: Place) -> Server:
    """What answers there. Raises OperationalError for a Galera node that is not ready: it still takes connections."""
    async with connection.cursor() as cursor:
        await cursor.execute("show global variables like 'wsrep_on'")
        row = await cursor.fetchone()
        if row is None or row[1] != "ON":
            return Server(place, galera=False, synced=True)
        await cursor.execute("show global status where variable_name in ('wsrep_ready', 'wsrep_local_state_comment')")
        status = {name.lower(): value for name, value in await cursor.fetchall()}
    if status.get("wsrep_ready") != "ON":
        raise aiomysql.OperationalError(NOT_READY, f"{_text(place)} is not in step with its Galera cluster")
    return Server(place, galera=True, synced=status.get("wsrep_local_state_comment") == "Synced")


def _number(error: BaseException) -> Any:
    return error.args[0] if error.args else 0


def _text(place: Place) -> str:
    return f"{place[0]}:{place[1]}"
