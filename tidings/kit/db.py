"""The shared database: SQLAlchemy Core over SQLite (one node) or MySQL and MariaDB (clusters)."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from random import random
from typing import Any, Literal, TypeVar

import aiomysql
import aiosqlite
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tidings.kit.database_hosts import CAUSAL, CONNECT_TIMEOUT, NOT_READY, Hosts
from tidings.kit.database_url import DatabaseUrl
from tidings.kit.logging import get_logger
from tidings.kit.tasks import Tasks

log = get_logger("database")
# Of a connection that can't be put back, or closed, because its server is gone, those who used it have been told.
logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)

T = TypeVar("T")

# Seconds to get a connection of the pool, and for one transaction; and for the one who tries whether a database that
# did not answer in time does so again.
POOL_TIMEOUT = 10.0
STATEMENT_TIMEOUT = 8.0
TRY_TIMEOUT = 2.0
# Seconds for which a transaction waits for the locks of another one, which may hang: then it is tried again. And for
# which MariaDB lets one stand still that holds them: a process that was stopped in the midst must not hold up others.
LOCK_TIMEOUT = 3
IDLE_TIMEOUT = 2
# The latter no other database knows; they take it for a comment.
_BOUNDS = (
    f"set session innodb_lock_wait_timeout = {LOCK_TIMEOUT} "
    f"/*M!100303 , session idle_transaction_timeout = {IDLE_TIMEOUT} */"
)
# Seconds between two transactions of one process on SQLite.
SQLITE_PAUSE = 0.002
# Seconds between two tries to take a lock for which SQLite does not wait.
LOOK = 0.01
# For the others it waits so long; for the lock to write a few milliseconds at a time, in which it looks four times.
_WAIT = f"pragma busy_timeout = {int(CONNECT_TIMEOUT * 1000)}"
_BEGIN = f"pragma busy_timeout = 10; begin immediate; {_WAIT}"
POOL_SIZE = 8

# Transactions that met another one are tried again, so often, after a pause of up to so many seconds, which doubles:
# two servers of Galera that change one row at the same time would meet again and again.
TRIES = 8
AGAIN = 0.005

# MySQL: deadlock, which is also what Galera says when another server's transaction was first; lock wait timeout;
# a server that was not in step with its cluster. All mean: again from the start.
_AGAIN = frozenset((1213, 1205, NOT_READY))
# MySQL: the server is not there, is going, or has gone; or it takes no more users (1040, 1203), is not in step with
# its Galera cluster (1047), or takes no writes while another one becomes the primary (1290, 1836).
_GONE = frozenset(
    (1040, 1047, 1053, 1152, 1158, 1159, 1160, 1161, 1203, 1290, 1836, 1927, 2002, 2003, 2006, 2013, 2055)
)


class DatabaseAway(Exception):
    """The database does not answer. What was asked may or may not have happened; it may be asked again."""


class Text(sa.types.TypeDecorator[str]):
    """Text that is compared byte by byte, up to `size` bytes of UTF-8: JIDs and ids.

    On MySQL it is VARBINARY, so that two parts of a JID (1,023 bytes each) fit into one key of InnoDB (3,072
    bytes), and no collation makes different names equal.
    """

    impl = sa.String
    cache_ok = True

    def __init__(self, size: int = 255) -> None:
        super().__init__(size)
        self.size = size

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "mysql":
            return dialect.type_descriptor(mysql.VARBINARY(self.size))
        return dialect.type_descriptor(sa.String(self.size))

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> Any:
        return value.encode() if value is not None and dialect.name == "mysql" else value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> str | None:
        return value.decode() if isinstance(value, bytes) else value


# One part of a JID (RFC 7622): 1,023 bytes at most. And a whole bare JID.
JidPart = Text(1023)
JidText = Text(2047)
# 16 MiB on MySQL, where a plain BLOB holds only 64 KiB.
Blob = sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql")
BigInt = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class Database:
    """The database of one process, shared by its services."""

    def __init__(self, url: DatabaseUrl, connections: int = 2 * POOL_SIZE) -> None:
        """`connections`: how many at the most, to MySQL."""
        self.url = url
        self._connections = connections
        self._engine: AsyncEngine | None = None
        # For what is committed statement by statement.
        self._at_once: AsyncEngine | None = None
        self._tasks = Tasks()
        # SQLite has one writer; here they wait in order instead of trying again and again.
        self._writer = asyncio.Lock()
        self._written = 0.0
        # It has not answered in time; and somebody tries now whether it does.
        self._silent = False
        self._trying = False

    @property
    def sqlite(self) -> bool:
        return self.url.backend == "sqlite"

    async def start(self) -> None:
        """Opens the pool. Connections are made when they are needed."""
        if self.sqlite:
            self._engine = _sqlite_engine(self.url)
            return
        hosts = Hosts(self.url, self._moved)
        self._engine = _mysql_engine(self.url, self._connections)
        self._at_once = _mysql_engine(self.url, 1, "AUTOCOMMIT")
        hosts.attach(self._engine)
        hosts.attach(self._at_once)
        if len(self.url.hosts) > 1:
            self._tasks.spawn(hosts.watch(), "database: watch its hosts")

    def _moved(self) -> None:
        """Another host is used: what is known of the one before does not count."""
        self._silent = False

    async def stop(self) -> None:
        await self._tasks.stop()
        for engine in (self._engine, self._at_once):
            if engine is not None:
                await engine.dispose()
        self._engine = self._at_once = None

    async def ping(self) -> None:
        """Raises DatabaseAway when the database does not answer."""
        async with self.read() as connection:
            await connection.execute(sa.text("select 1"))

    @asynccontextmanager
    async def read(self, causal: bool = False) -> AsyncIterator[AsyncConnection]:
        """A connection to read with. Raises DatabaseAway.

        `causal`: on Galera, nothing is missed that was committed before at any server. So it waits while the servers
        do not agree who is one of them, and costs a round trip between them; elsewhere it costs nothing.
        """
        assert self._engine is not None, "the database is not started"
        with _translated():
            async with self._in_time(STATEMENT_TIMEOUT), self._engine.connect() as connection:
                if self.sqlite:
                    connection = await connection.execution_options(tidings_write=False)
                if causal:
                    connection = await connection.execution_options(**{CAUSAL: True})
                yield connection
                # Here, for what closes the connection has no time limit.
                await connection.rollback()

    @asynccontextmanager
    async def at_once(self) -> AsyncIterator[AsyncConnection]:
        """A connection of MySQL to write with; the server commits each statement with itself, so that nothing stays
        locked when nobody hears of us any more. Raises DatabaseAway.

        It has a pool of one: to change a connection's way back and forth costs three round trips, and one that fails
        at that would be lost to its pool.
        """
        assert self._at_once is not None, "the database is not started, or is SQLite"
        with _translated():
            async with self._in_time(STATEMENT_TIMEOUT), self._at_once.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self, timeout: float = STATEMENT_TIMEOUT, causal: bool = False) -> AsyncIterator[AsyncConnection]:
        """A transaction: committed at the end, rolled back on an error. Raises DatabaseAway.

        `causal`: as for `read`, for its first statement.
        """
        assert self._engine is not None, "the database is not started"
        with _translated():
            if self.sqlite:
                async with self._writer:
                    await self._let_others_write()
                    async with self._in_time(timeout), self._engine.begin() as connection:
                        yield connection
                    self._written = asyncio.get_running_loop().time()
            else:
                async with self._in_time(timeout), self._engine.begin() as connection:
                    if causal:
                        connection = await connection.execution_options(**{CAUSAL: True})
                    yield connection

    async def _let_others_write(self) -> None:
        """SQLite's lock is not fair: who writes without a pause keeps other processes of the machine out, and then
        they can't even say that they live."""
        pause = self._written + SQLITE_PAUSE - asyncio.get_running_loop().time()
        if pause > 0:
            await asyncio.sleep(pause)

    @asynccontextmanager
    async def _in_time(self, timeout: float) -> AsyncIterator[None]:
        """Bounds the time for an answer. While the database is silent one caller at a time tries it, briefly, and the
        others are told at once: they must not all wait, and those behind them, for what will not come."""
        if not self._silent:
            try:
                async with asyncio.timeout(timeout):
                    yield
            except TimeoutError:
                self._silent = True
                raise
            return
        if self._trying:
            raise DatabaseAway("it has not answered for a while")
        self._trying = True
        try:
            async with asyncio.timeout(min(timeout, TRY_TIMEOUT)):
                yield
            self._silent = False
        finally:
            self._trying = False

    async def transaction(self, work: Callable[[AsyncConnection], Awaitable[T]], causal: bool = False) -> T:
        """Runs `work` in a transaction, whole and again when it met another one. Raises DatabaseAway, and then it may
        have happened all the same. `causal`: as for `write`."""
        for attempt in range(1, TRIES + 1):
            try:
                async with self.write(causal=causal) as connection:
                    return await work(connection)
            except DatabaseAway as away:
                error = away.__cause__
                if attempt == TRIES or not isinstance(error, DBAPIError) or _number(error) not in _AGAIN:
                    raise
                log.debug("transaction_again", attempt=attempt)
                await asyncio.sleep(AGAIN * 2**attempt * random())  # noqa: S311 - it is no secret
        raise AssertionError("unreachable")


def insert_or_update(
    connection: AsyncConnection, table: sa.Table, values: Mapping[str, Any], update: Sequence[str]
) -> sa.Insert:
    """An insert that updates the columns `update` where the row is there already."""
    if connection.dialect.name == "mysql":
        insert = mysql.insert(table).values(values)
        return insert.on_duplicate_key_update({name: insert.inserted[name] for name in update})
    upsert = sqlite_dialect.insert(table).values(values)
    return upsert.on_conflict_do_update(
        index_elements=list(table.primary_key.columns), set_={name: upsert.excluded[name] for name in update}
    )


class _translated:
    """Turns the many ways in which a database is away into one exception."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if error is None or isinstance(error, DatabaseAway):
            return
        if _is_away(error):
            reason = str(error) or "it did not answer in time"
            raise DatabaseAway(reason.splitlines()[0]) from error


def _is_away(error: BaseException) -> bool:
    if isinstance(error, PoolTimeoutError | TimeoutError | ConnectionError):
        return True
    if isinstance(error, RuntimeError) and "handler is closed" in str(error):
        return True  # aiomysql under uvloop, for a connection that the server has closed
    if isinstance(error, aiomysql.OperationalError | aiomysql.InterfaceError):
        return True  # SQLAlchemy lets through what the driver says where no statement of its own is executed
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode != sqlite3.SQLITE_ERROR  # which is a statement that is wrong
    if not isinstance(error, DBAPIError):
        return False
    if isinstance(error, OperationalError | InternalError):
        # Full, read-only, without a quorum, another password: it may pass, and nobody must die of it meanwhile. Only
        # SQLite's driver says the same of statements that are wrong.
        return not isinstance(error.orig, sqlite3.OperationalError) or _is_away(error.orig)
    return error.connection_invalidated


def is_gone(error: DBAPIError) -> bool:
    """Whether the server was lost, or can't serve now, so that the statement is not at fault."""
    return error.connection_invalidated or _number(error) in _GONE


def _number(error: DBAPIError) -> int:
    arguments = getattr(error.orig, "args", ())
    return arguments[0] if arguments and isinstance(arguments[0], int) else 0


def _sqlite_engine(url: DatabaseUrl) -> AsyncEngine:
    assert url.path is not None
    url.path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{url.path}", pool_size=POOL_SIZE, pool_timeout=POOL_TIMEOUT,
        connect_args={"timeout": CONNECT_TIMEOUT},
    )  # fmt: skip

    @event.listens_for(engine.sync_engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        # SQLAlchemy begins transactions; the driver must not (it would begin them late).
        connection.isolation_level = None
        cursor = connection.cursor()
        _write_ahead(cursor)
        # Power loss costs nothing that was committed.
        cursor.execute("pragma synchronous = full")
        cursor.execute("pragma foreign_keys = on")
        cursor.execute(_WAIT)
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begun(connection: sa.Connection) -> None:
        # Taking the write lock at once: a transaction that reads first could not take it later. What only
        # reads needs no transaction: each statement sees one state.
        if connection.get_execution_options().get("tidings_write", True):
            driver: Any = connection.connection.dbapi_connection
            driver.run_async(_take_write_lock)

    return engine


async def _take_write_lock(connection: aiosqlite.Connection) -> None:
    """SQLite looks for a lock ever less often, in the end every 100 ms, and hardly ever in the short gaps that other
    processes leave. So it gives up soon here, and begins again."""
    ends = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            await connection.executescript(_BEGIN)
            return
        except sqlite3.OperationalError as error:
            if not _is_locked(error) or time.monotonic() > ends:
                await connection.executescript(_WAIT)
                raise


def _is_locked(error: sqlite3.OperationalError) -> bool:
    # The lowest byte says what it is, those above say why.
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _write_ahead(cursor: Any) -> None:
    """SQLite waits for every lock but for the one that this takes, once for each file: processes that start at once
    on a new one meet there."""
    ends = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            cursor.execute("pragma journal_mode = wal")
            return
        except sqlite3.OperationalError as error:
            if not _is_locked(error) or time.monotonic() > ends:
                raise
            time.sleep(LOOK)


def _mysql_engine(
    url: DatabaseUrl, connections: int, isolation_level: Literal["READ COMMITTED", "AUTOCOMMIT"] = "READ COMMITTED"
) -> AsyncEngine:
    host, port = url.hosts[0]
    return create_async_engine(
        sa.URL.create("mysql+aiomysql", url.user, url.password, host, port, url.database),
        pool_size=min(POOL_SIZE, connections), max_overflow=max(0, connections - POOL_SIZE),
        pool_timeout=POOL_TIMEOUT, pool_recycle=600,
        isolation_level=isolation_level,
        # Each use of a connection ends its transaction itself: a rollback behind a commit would cost a round trip.
        pool_reset_on_return=None,
        connect_args={"charset": "utf8mb4", "init_command": _BOUNDS},
    )  # fmt: skip
