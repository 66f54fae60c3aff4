"""The message store in memory: for tests, and to show what the port means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from services.router.message_queue import WriteQueue, telling
from services.router.messages import CLAIMED, ArchiveQuery, Done, Kept, Message, Page, Preferences, UnknownId
from services.router.store import SessionTable
from tidings.kit.db import DatabaseAway
from tidings.xmpp.jid import Jid


@dataclass(slots=True)
class _Row:
    kept: Kept
    pending: bool
    archived: bool
    holder: str


class MemoryMessageStore:
    """Satisfies `services.router.messages.MessageStore`. What is written is committed at the next tick of the loop;
    while `away`, nothing is."""

    def __init__(self, sessions: SessionTable) -> None:
        self._sessions = sessions
        self._queue = WriteQueue()
        self._rows: dict[Jid, dict[bytes, _Row]] = {}
        self._last = 0
        self._preferences: dict[Jid, Preferences] = {}
        self._commit_comes = False
        self._away = False

    @property
    def away(self) -> bool:
        return self._away

    @away.setter
    def away(self, away: bool) -> None:
        self._away = away
        self._commit_soon()

    @property
    def waiting_bytes(self) -> int:
        return self._queue.waiting_bytes

    def is_writing_for(self, account: Jid) -> bool:
        return self._queue.has_pending(account)

    @property
    def marks(self) -> list[tuple[int, int]]:
        return [(self._queue.marks_put, self._queue.marks_written)]

    @property
    def unmatched(self) -> Collection[bytes]:
        return self._queue.unmatched

    @property
    def oldest_waiting(self) -> float:
        return self._queue.oldest

    def write(self, message: Message, done: Done) -> None:
        self._queue.put(message, done, time.monotonic())
        self._commit_soon()

    async def keep(self, message: Message) -> None:
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put(message, telling(committed), time.monotonic(), urgent=True)
        self._commit_soon()
        await committed

    def delivered(self, account: Jid, ids: Iterable[bytes]) -> None:
        self._queue.mark(ids)
        self._commit_soon()

    def supersede(self, is_others: Callable[[str], bool]) -> None:
        self._queue.supersede(is_others)

    def _commit_soon(self) -> None:
        if not self._commit_comes:
            self._commit_comes = True
            asyncio.get_running_loop().call_soon(self._commit)

    def _commit(self) -> None:
        self._commit_comes = False
        if self._away:
            self._queue.give_up_urgent(DatabaseAway("it is switched off"))
            return
        messages, marks = self._queue.take(self._queue.messages, 1 << 62, self._queue.marks)
        for message in messages:
            self._insert(message)
        for rows in self._rows.values():
            for acknowledged in rows.keys() & marks:
                rows[acknowledged].pending = False
                if not rows[acknowledged].archived:
                    del rows[acknowledged]
        self._queue.written()

    def _insert(self, message: Message) -> None:
        rows = self._rows.setdefault(message.account, {})
        if message.id not in rows:
            self._last += 1
            kept = Kept(
                self._last, message.id, message.peer, message.origin, message.number, message.from_jid,
                message.received_unix_ms, message.stanza,
            )  # fmt: skip
            rows[message.id] = _Row(kept, message.pending, message.archived, message.holder)

    def _of(self, account: Jid) -> dict[bytes, _Row]:
        if self._away:
            raise DatabaseAway("it is switched off")
        return self._rows.get(account, {})

    async def pending(
        self, account: Jid, session: str, limit: int, after: int = 0, alone: bool = False, over: Collection[str] = ()
    ) -> list[Kept]:
        claim = CLAIMED + session
        others = {row.session for row in await self._sessions.of_account(account)} - {session, *over}
        held = others | {CLAIMED + other for other in others}
        acknowledged = self._queue.marked()
        free = [
            row
            for row in self._of(account).values()
            if row.pending
            and row.kept.position > after
            and (row.holder in (session, claim) if alone else row.holder not in held)
            and row.kept.id not in acknowledged
        ][:limit]
        found = []
        for row in free:
            given = bool(row.holder) and not row.holder.startswith(CLAIMED)
            row.holder = session if given else claim
            found.append(row.kept._replace(given=given))
        return found

    async def pending_count(self, account: Jid) -> int:
        return sum(row.pending for row in self._of(account).values())

    async def page(self, account: Jid, query: ArchiveQuery) -> Page:
        rows = self._of(account)
        if not {query.after, query.before} - {None} <= rows.keys():
            raise UnknownId
        low = rows[query.after].kept.position if query.after is not None else 0
        high = rows[query.before].kept.position if query.before is not None else self._last + 1
        found = [
            row.kept
            for row in rows.values()
            if row.archived and low < row.kept.position < high and _matches(row.kept, query)
        ]
        some = found[-query.limit :] if query.backwards and query.limit else found[: query.limit]
        return Page(some, len(some) == len(found))

    async def expire(self, host: str, before_unix_ms: int, limit: int) -> int:
        removed = 0
        for account in tuple(self._rows):
            rows = self._of(account)
            for row in [row for row in rows.values() if row.archived]:
                if account.domain != host or row.kept.received_unix_ms >= before_unix_ms or removed == limit:
                    break
                removed += 1
                row.archived = False
                if not row.pending:
                    del rows[row.kept.id]
        return removed

    async def preferences(self, account: Jid) -> Preferences | None:
        self._of(account)
        return self._preferences.get(account)

    async def set_preferences(self, account: Jid, preferences: Preferences) -> None:
        self._of(account)
        self._preferences[account] = preferences

    async def delete_all(self, account: Jid) -> None:
        self._of(account)
        self._queue.forget(account)
        self._rows.pop(account, None)
        self._preferences.pop(account, None)


def _matches(kept: Kept, query: ArchiveQuery) -> bool:
    if query.with_ is not None:
        peer = Jid.parse(kept.peer)
        if query.with_ not in (peer, peer.bare):
            return False
    return (query.start is None or query.start <= kept.received_unix_ms) and (
        query.end is None or kept.received_unix_ms <= query.end
    )
