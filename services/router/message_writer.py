"""Group commit: messages go into the database in groups; one commit costs what many would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router import messages_statements as statements
from services.router.message_queue import WriteQueue
from services.router.messages import Done, Message
from tidings.kit.db import Database, DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.tasks import Tasks

log = get_logger("database")

# Of one commit: messages, bytes of their stanzas, marks.
GROUP = 1000
GROUP_BYTES = 2_097_152
GROUP_MARKS = 2000
# Seconds from the beginning of one group to that of the next, if that is not full, or has only marks. A group costs
# 1 ms of this process, whatever its size: under load everybody waits a little longer, so that there are fewer.
PAUSE = 0.02
MARKS_PAUSE = 0.05
# Seconds between two tries while the database is away; and until marks are written again that found no message.
RETRY = 0.5
EARLY = 1.0
# Seconds between two moments that the writer knows of when nothing is to be written; and from one to the next for the
# router to have stood still.
TICK = 0.5
STILL = 2.0
UNSURE = "the cluster has not said for long that this node is a member"

# What the database, or the making of a statement, says of a message that can never be written.
BAD_DATA = (DataError, IntegrityError, ValueError, OverflowError)


class Membership(Protocol):
    """What the writer asks of `tidings.kit.membership.Member`."""

    @property
    def unsure(self) -> bool: ...

    async def is_in(self) -> bool: ...


class Alone:
    """A node that nobody puts out."""

    unsure = False

    async def is_in(self) -> bool:
        return True


class MessageWriter:
    """Writes the messages of some accounts, one group at a time. What comes before `start` waits for it.

    A router that may have been put out, for it stood still, writes nothing until it knows that it was not: the others
    have dealt with what it had, and would meet it again.
    """

    def __init__(self, database: Database, member: Membership | None = None) -> None:
        self._database = database
        self._member = member or Alone()
        self.queue = WriteQueue()
        self._tasks = Tasks()
        # Something has come that the writer may not know of.
        self._woken = asyncio.Event()
        # One group, or removal of an account, at a time.
        self.turn = asyncio.Lock()
        self._began = 0.0
        # The last commit failed.
        self.away = False
        # The last moment that the writer knows of; and it has stood still since the last beat of its node.
        self._awake = time.monotonic()
        self._stood_still = False
        self._stopping = False
        self._stopped = False

    async def start(self) -> None:
        self._tasks.spawn(self._write_groups(), "message store: group commit")

    async def stop(self, deadline: float) -> None:
        """Writes what waits, until a moment of the loop's clock, then ends."""
        self._stopping = True
        self._woken.set()
        try:
            async with asyncio.timeout_at(deadline):
                while self.queue.waiting_bytes:  # noqa: ASYNC110 - bounded
                    await asyncio.sleep(PAUSE)
        except TimeoutError:
            pass  # the database is away; who waits for a commit is told so
        self._stopped = True
        await self._tasks.stop()
        self.queue.give_up(DatabaseAway("the router stops"))

    def put(self, message: Message, done: Done, urgent: bool) -> None:
        """`urgent`: who waits is told at the first commit that fails."""
        if self._stopped:
            done(DatabaseAway("the router stops"))
            return
        self.queue.put(message, done, time.monotonic(), urgent)
        if self.queue.messages in (1, GROUP):
            self._woken.set()

    def mark(self, ids: Iterable[bytes]) -> None:
        wake = not self.queue.marks
        self.queue.mark(ids)
        if wake and self.queue.marks:
            self._woken.set()

    def _mark_again(self, ids: Iterable[bytes]) -> None:
        self.mark(self.queue.still_early(ids))

    async def _write_groups(self) -> None:
        most = GROUP
        while True:
            await self._until_due()
            async with self.turn:
                self._began = asyncio.get_running_loop().time()
                fits = await self._write_group(most)
            # One that can't be written is tried again in halves: something in it may be refused, or meet others.
            most = min(2 * most, GROUP) if fits else max(1, most // 2)
            if self.away:
                await asyncio.sleep(RETRY)

    async def _until_due(self) -> None:
        """Waits until there is something to write, and till the next group may begin."""
        while True:
            self._is_unsure()
            due, now = self._due(), asyncio.get_running_loop().time()
            if due is not None and due <= now:
                return
            self._woken.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(now + TICK if due is None else min(due, now + TICK)):
                    await self._woken.wait()

    def _due(self) -> float | None:
        waiting = self.queue.messages
        if waiting >= GROUP or (self._stopping and self.queue.waiting_bytes):
            return 0.0
        if waiting:
            return self._began + PAUSE
        return self._began + MARKS_PAUSE if self.queue.marks else None

    async def _write_group(self, most: int) -> bool:
        """Whether it is written."""
        group, marks = self.queue.take(most, GROUP_BYTES, GROUP_MARKS)
        if not group and not marks:
            return True

        async def work(connection: AsyncConnection) -> set[bytes]:
            if group:
                await statements.insert(connection, group)
            missing = await statements.mark(connection, marks) if marks else set()
            if self._is_unsure():
                raise DatabaseAway(UNSURE)  # it has stood still in the midst of this
            return missing

        try:
            if self._is_unsure() and not await self._member.is_in() and not self._stopping:
                raise DatabaseAway(UNSURE)
            # A mark must not miss a message that another server of Galera has committed.
            missing = await self._database.transaction(work, causal=bool(marks))
        except BAD_DATA as error:
            if len(group) == 1:
                log.error("message_refused", account=str(group[0].account), reason=_reason(error))
                self.queue.refused(_driver_error(error))
            else:
                self.queue.put_back()
            return False
        except Exception as error:
            if not self.away:
                say = log.warning if isinstance(error, DatabaseAway) else log.error
                say("messages_wait", error=type(error).__name__, reason=_reason(error))
            self.away = True
            self.queue.put_back()
            self.queue.give_up_urgent(DatabaseAway(_reason(error)))
            return False
        if self.away:
            log.info("messages_are_written_again")
        self.away = False
        for wait, early in self.queue.early(missing).items():
            asyncio.get_running_loop().call_later(EARLY * wait, self._mark_again, early)
        self.queue.written(missing)
        return True

    def _is_unsure(self) -> bool:
        """Notices a standstill. Whether the node may have been put out: it stood still, or has not reached the
        database. That no registry takes its beats is alone no reason to write nothing. What is left when the router
        stops is written in any case: nobody else has it then (`MessageStore.supersede`)."""
        still, self._awake = time.monotonic() - self._awake, time.monotonic()
        unsure = self._member.unsure
        self._stood_still = unsure and (self._stood_still or still > STILL)
        return unsure and (self._stood_still or self.away) and not self._stopping


def _driver_error(error: Exception) -> Exception:
    """The error without the statement, which has the messages in it: they are nobody's business, and long."""
    driver = error.orig if isinstance(error, DBAPIError) else None
    return driver if isinstance(driver, Exception) else error


def _reason(error: Exception) -> str:
    return str(_driver_error(error)).partition("\n")[0]
