"""The message store in the shared database. Messages are written in groups: one commit costs what many would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from zlib import crc32

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.router.archive_sql import KEPT, SqlArchive, kept, of
from services.router.message_queue import telling
from services.router.message_writer import GROUP, Membership, MessageWriter
from services.router.messages import CLAIMED, Done, Kept, Message
from services.router.schema import archive_preferences, message_positions, messages, sessions
from tidings.kit.db import Database
from tidings.xmpp.jid import Jid

__all__ = ["GROUP", "SqlMessageStore"]

# Each writes the messages of its part of the accounts, so that their commits do not wait for each other: while the
# database works for one, this process works for the other. SQLite has one.
WRITERS = 2
# Seconds for what waits when the router stops.
STOP_TIMEOUT = 5.0
# A message must fit into one packet of the database (MariaDB: 16 MiB, if nobody tells it otherwise), with two bytes
# for each of its own. Stops one message from holding up all others.
MAX_STANZA_BYTES = 7_340_032
# Positions from the settled one on from which it is worth a commit to raise that.
SETTLE_STEP = 200


class SqlMessageStore(SqlArchive):
    """Satisfies `services.router.messages.MessageStore`. What is written before `start` waits for it."""

    def __init__(self, database: Database, member: Membership | None = None) -> None:
        """`member`: of a node in a cluster, which may be put out (`MessageWriter`)."""
        super().__init__(database)
        self._writers = [MessageWriter(database, member) for _ in range(1 if database.sqlite else WRITERS)]

    async def start(self) -> None:
        for writer in self._writers:
            await writer.start()

    async def stop(self) -> None:
        """Writes what waits, then ends."""
        deadline = asyncio.get_running_loop().time() + STOP_TIMEOUT
        await asyncio.gather(*(writer.stop(deadline) for writer in self._writers))

    def _writer(self, account: Jid) -> MessageWriter:
        return self._writers[crc32(account.bare_text.encode()) % len(self._writers)]

    @property
    def waiting_bytes(self) -> int:
        return sum([writer.queue.waiting_bytes for writer in self._writers])

    @property
    def away(self) -> bool:
        return any(writer.away for writer in self._writers)

    def is_writing_for(self, account: Jid) -> bool:
        return self._writer(account).queue.has_pending(account)

    @property
    def marks(self) -> list[tuple[int, int]]:
        return [(writer.queue.marks_put, writer.queue.marks_written) for writer in self._writers]

    @property
    def unmatched(self) -> Collection[bytes]:
        return set[bytes]().union(*(writer.queue.unmatched for writer in self._writers))

    @property
    def oldest_waiting(self) -> float:
        return min([writer.queue.oldest for writer in self._writers if writer.queue.oldest], default=0.0)

    # --- writing ---

    def write(self, message: Message, done: Done) -> None:
        self._put(message, done, urgent=False)

    async def keep(self, message: Message) -> None:
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(message, telling(committed), urgent=True)
        await committed

    def _put(self, message: Message, done: Done, urgent: bool) -> None:
        if len(message.stanza) > MAX_STANZA_BYTES:
            done(ValueError(f"a message of more than {MAX_STANZA_BYTES} bytes"))
        else:
            self._writer(message.account).put(message, done, urgent)

    def delivered(self, account: Jid, ids: Iterable[bytes]) -> None:
        self._writer(account).mark(ids)

    def supersede(self, is_others: Callable[[str], bool]) -> None:
        for writer in self._writers:
            writer.queue.supersede(is_others)

    # --- what is pending ---

    async def pending(
        self, account: Jid, session: str, limit: int, after: int = 0, alone: bool = False, over: Collection[str] = ()
    ) -> list[Kept]:
        while True:
            low = await self._before_pending(account, after)
            if low is None:
                return []  # as for most who come: they need no transaction
            claimed, after = await self._claim(account, session, limit, low, alone, over)
            if claimed or not after:
                return claimed

    async def _claim(
        self, account: Jid, session: str, limit: int, low: int, alone: bool, over: Collection[str]
    ) -> tuple[list[Kept], int]:
        """The messages, and behind which position there may be more; 0: nowhere."""
        claim = CLAIMED + session
        living = sa.select(sessions.c.session).where(*of(sessions, account), sessions.c.session != session)
        here = (*of(messages, account), messages.c.position > low, messages.c.pending.is_(True))
        wanted = sa.select(*KEPT, messages.c.holder).where(*here).order_by(messages.c.position).limit(limit)

        async def work(connection: AsyncConnection) -> list[Kept]:
            others = [row.session for row in await connection.execute(living) if row.session not in over]
            held = [name for other in others for name in (other, CLAIMED + other)]
            # Who claims at the same moment waits here for our commit, and then finds what is left. (Locks of Galera
            # are one server's own: the later commit of two at different ones fails, and is tried again.)
            free = messages.c.holder.in_((session, claim)) if alone else messages.c.holder.not_in(held)
            rows = list(await connection.execute(wanted.where(free).with_for_update()))
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

        with self._writer(account).queue.watch() as acknowledged:
            claimed = await self._database.transaction(work, causal=True)
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

        writer = self._writer(account)
        async with writer.turn:
            writer.queue.forget(account)
            await self._database.transaction(work, causal=True)
