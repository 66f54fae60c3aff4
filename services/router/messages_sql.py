"""The message store in the shared database. Messages are written in groups: one commit costs what many would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router import messages_statements as statements
from services.router.archive_sql import KEPT, SqlArchive, kept, of
from services.router.message_queue import WriteQueue, telling
from services.router.messages import CLAIMED, Done, Kept, Message
from services.router.schema import archive_preferences, message_positions, messages, sessions
from tidings.kit.db import Database, DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.tasks import Tasks
from tidings.xmpp.jid import Jid

log = get_logger("database")

# Of one commit: messages, bytes of their stanzas, marks.
GROUP = 1000
GROUP_BYTES = 2_097_152
GROUP_MARKS = 2000
# Seconds from the beginning of one group to that of the next, if that is not full, or has only marks. A group costs
# 1 ms of this process, whatever its size: under load everybody waits a little longer, so that there are fewer.
PAUSE = 0.02
MARKS_PAUSE = 0.05
# Seconds between two tries while the database is away, and for what waits when the router stops.
RETRY = 0.5
STOP_TIMEOUT = 5.0
# A message must fit into one packet of the database (MariaDB: 16 MiB, if nobody tells it otherwise), with two bytes
# for each of its own. Stops one message from holding up all others.
MAX_STANZA_BYTES = 7_340_032
# Positions from the settled one on from which it is worth a commit to raise that.
SETTLE_STEP = 200

# What the database, or the making of a statement, says of a message that can never be written.
BAD_DATA = (DataError, IntegrityError, ValueError, OverflowError)


class SqlMessageStore(SqlArchive):
    """Satisfies `services.router.messages.MessageStore`. What is written before `start` waits for it."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._queue = WriteQueue()
        self._tasks = Tasks()
        # Something has come that the writer may not know of.
        self._woken = asyncio.Event()
        # One group, or removal of an account, at a time.
        self._turn = asyncio.Lock()
        self._began = 0.0
        self._away = False
        self._stopping = False
        self._stopped = False

    async def start(self) -> None:
        self._tasks.spawn(self._write_groups(), "message store: group commit")

    async def stop(self) -> None:
        """Writes what waits, then ends."""
        self._stopping = True
        self._woken.set()
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                while self._queue.waiting_bytes:  # noqa: ASYNC110 - bounded
                    await asyncio.sleep(PAUSE)
        except TimeoutError:
            pass  # the database is away; who waits for a commit is told so
        self._stopped = True
        await self._tasks.stop()
        self._queue.give_up(DatabaseAway("the router stops"))

    @property
    def waiting_bytes(self) -> int:
        return self._queue.waiting_bytes

    @property
    def away(self) -> bool:
        return self._away

    @property
    def marks(self) -> tuple[int, int]:
        return self._queue.marks_put, self._queue.marks_written

    @property
    def oldest_waiting(self) -> float:
        return self._queue.oldest

    # --- writing ---

    def write(self, message: Message, done: Done) -> None:
        self._put(message, done, urgent=False)

    async def keep(self, message: Message) -> None:
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(message, telling(committed), urgent=True)
        await committed

    def _put(self, message: Message, done: Done, urgent: bool) -> None:
        if self._stopped:
            done(DatabaseAway("the router stops"))
        elif len(message.stanza) > MAX_STANZA_BYTES:
            done(ValueError(f"a message of more than {MAX_STANZA_BYTES} bytes"))
        else:
            self._queue.put(message, done, time.monotonic(), urgent)
            if self._queue.messages in (1, GROUP):
                self._woken.set()

    def delivered(self, account: Jid, ids: Iterable[bytes]) -> None:
        wake = not self._queue.marks
        self._queue.mark(ids)
        if wake and self._queue.marks:
            self._woken.set()

    async def _write_groups(self) -> None:
        most = GROUP
        while True:
            await self._until_due()
            async with self._turn:
                self._began = asyncio.get_running_loop().time()
                fits = await self._write_group(most)
            # One that can't be written is tried again in halves: something in it may be refused, or meet others.
            most = min(2 * most, GROUP) if fits else max(1, most // 2)
            if self._away:
                await asyncio.sleep(RETRY)

    async def _until_due(self) -> None:
        """Waits until there is something to write, and till the next group may begin."""
        while True:
            due = self._due()
            if due is not None and due <= asyncio.get_running_loop().time():
                return
            self._woken.clear()
            try:
                async with asyncio.timeout_at(due):
                    await self._woken.wait()
            except TimeoutError:
                return

    def _due(self) -> float | None:
        waiting = self._queue.messages
        if waiting >= GROUP or (self._stopping and self._queue.waiting_bytes):
            return 0.0
        if waiting:
            return self._began + PAUSE
        return self._began + MARKS_PAUSE if self._queue.marks else None

    async def _write_group(self, most: int) -> bool:
        """Whether it is written."""
        group, marks = self._queue.take(most, GROUP_BYTES, GROUP_MARKS)
        if not group and not marks:
            return True

        async def work(connection: AsyncConnection) -> None:
            if group:
                await statements.insert(connection, group)
            if marks:
                await statements.mark(connection, marks)

        try:
            # A mark must not miss a message that another server of Galera has committed.
            await self._database.transaction(work, causal=bool(marks))
        except BAD_DATA as error:
            if len(group) == 1:
                log.error("message_refused", account=str(group[0].account), reason=_reason(error))
                self._queue.refused(_driver_error(error))
            else:
                self._queue.put_back()
            return False
        except Exception as error:
            if not self._away:
                say = log.warning if isinstance(error, DatabaseAway) else log.error
                say("messages_wait", error=type(error).__name__, reason=_reason(error))
            self._away = True
            self._queue.put_back()
            self._queue.give_up_urgent(DatabaseAway(_reason(error)))
            return False
        if self._away:
            log.info("messages_are_written_again")
        self._away = False
        self._queue.written()
        return True

    # --- what is pending ---

    async def pending(self, account: Jid, session: str, limit: int, after: int = 0) -> list[Kept]:
        while True:
            low = await self._before_pending(account, after)
            if low is None:
                return []  # as for most who come: they need no transaction
            claimed, after = await self._claim(account, session, limit, low)
            if claimed or not after:
                return claimed

    async def _claim(self, account: Jid, session: str, limit: int, low: int) -> tuple[list[Kept], int]:
        """The messages, and behind which position there may be more; 0: nowhere."""
        acknowledged = self._queue.marked()
        claim = CLAIMED + session
        living = sa.select(sessions.c.session).where(*of(sessions, account), sessions.c.session != session)
        here = (*of(messages, account), messages.c.position > low, messages.c.pending.is_(True))
        wanted = sa.select(*KEPT, messages.c.holder).where(*here).order_by(messages.c.position).limit(limit)

        async def work(connection: AsyncConnection) -> list[Kept]:
            others = [row.session for row in await connection.execute(living)]
            held = [name for other in others for name in (other, CLAIMED + other)]
            # Who claims at the same moment waits here for our commit, and then finds what is left. (Locks of Galera
            # are one server's own: the later commit of two at different ones fails, and is tried again.)
            free = wanted.where(messages.c.holder.not_in(held)).with_for_update()
            rows = list(await connection.execute(free))
            positions = [row.position for row in rows if row.holder not in (session, claim)]
            if positions:
                these = (*of(messages, account), messages.c.position.in_(positions))
                # What others were given stays that.
                stored = (*these, sa.or_(messages.c.holder == "", messages.c.holder.like(CLAIMED + "%")))
                await connection.execute(messages.update().where(*stored).values(holder=claim))
                await connection.execute(
                    messages.update().where(*these, messages.c.holder != claim).values(holder=session)
                )
            return [kept(row)._replace(given=bool(row.holder) and not row.holder.startswith(CLAIMED)) for row in rows]

        claimed = await self._database.transaction(work, causal=True)
        acknowledged |= self._queue.marked()
        more = claimed[-1].position if len(claimed) == limit else 0
        return [message for message in claimed if message.id not in acknowledged], more

    async def pending_count(self, account: Jid) -> int:
        unsettled = messages.join(
            message_positions,
            sa.and_(
                messages.c.host == message_positions.c.host,
                messages.c.local == message_positions.c.local,
                messages.c.position > message_positions.c.settled,
            ),
        )
        wanted = (
            sa.select(sa.func.count())
            .select_from(unsettled)
            .where(*of(message_positions, account), messages.c.pending.is_(True))
        )
        async with self._database.read(causal=True) as connection:
            return int((await connection.execute(wanted)).scalar_one())

    async def _before_pending(self, account: Jid, after: int) -> int | None:
        """A position behind `after` up to which nothing is pending; None when nothing is at all.

        There is no index of what is pending: every message would be written into it and taken out again. Instead the
        account has a settled position, up to which nothing is pending any more, so that nothing is looked through
        twice. It is raised here, where somebody wants to know. No message behind `last`, read before, can come up to
        it later: positions are given in the order of commits.
        """
        counters = sa.select(message_positions.c.last, message_positions.c.settled)
        async with self._database.read(causal=True) as connection:
            row = (await connection.execute(counters.where(*of(message_positions, account)))).first()
            if row is None:
                return None
            last, settled = row
            low = max(settled, after)
            first = (
                sa.select(messages.c.position)
                .where(*of(messages, account), messages.c.position > low, messages.c.pending.is_(True))
                .order_by(messages.c.position)
                .limit(1)
            )
            found = (await connection.execute(first)).scalar()
        reached = last if found is None else found - 1
        if after <= settled and reached >= settled + SETTLE_STEP:
            await self._settle(account, reached)
        return found - 1 if found is not None else None

    async def _settle(self, account: Jid, position: int) -> None:
        raised = (
            message_positions.update()
            .where(*of(message_positions, account), message_positions.c.settled < position)
            .values(settled=position)
        )

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(raised)

        await self._database.transaction(work)

    async def delete_all(self, account: Jid) -> None:
        async def work(connection: AsyncConnection) -> None:
            await connection.execute(messages.delete().where(*of(messages, account)))
            await connection.execute(archive_preferences.delete().where(*of(archive_preferences, account)))
            # The counter stays: an account of the same name later goes on behind it.

        async with self._turn:
            self._queue.forget(account)
            await self._database.transaction(work, causal=True)


def _driver_error(error: Exception) -> Exception:
    """The error without the statement, which has the messages in it: they are nobody's business, and long."""
    driver = error.orig if isinstance(error, DBAPIError) else None
    return driver if isinstance(driver, Exception) else error


def _reason(error: Exception) -> str:
    return str(_driver_error(error)).partition("\n")[0]
