"""What waits to be written into the message store: pure, but for telling those who wait.

Messages wait in the order in which they came, and are taken in groups. A group that could not be written goes back to
the front; then nobody knows whether its messages were written. Marks of delivery wait apart, and none is put there
while its message waits to be written as pending: so none is ever written before its message.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice

from services.router.messages import Done, Message
from tidings.kit.logging import get_logger
from tidings.xmpp.jid import Jid

log = get_logger("database")

# What counts for a message besides its stanza, and for a mark: about what they take in memory.
MESSAGE_BYTES = 1200
MARK_BYTES = 50
# Marks that are remembered when they are written: of more, the oldest are forgotten. A message may come here behind
# its mark, when the router that had taken it before has died.
MAX_REMEMBERED = 50_000
# How often a mark is written again that found no message: at first after a while, then after twice as long each time,
# together for more than two minutes. And how many such marks may wait for that; of more, the oldest are forgotten. A
# session that was handed over, or taken over from a router that hangs, confirms what that one has still to write.
STEADY_TRIES = 10
MAX_TRIES = 16
MAX_EARLY = 50_000


class Superseded(Exception):
    """Other routers have dealt with a message, and who has waited for it here waits no more."""


class Waiting:
    """A message that waits to be committed."""

    __slots__ = ("acknowledged", "done", "message", "settled", "since", "tried", "urgent")

    def __init__(self, message: Message, done: Done, since: float, urgent: bool) -> None:
        self.message = message
        self.done = done
        self.since = since
        # Who waits is to be told at once when it can't be written now.
        self.urgent = urgent
        # It was in a group once: it may be in the database already.
        self.tried = False
        # A session has acknowledged it since then.
        self.acknowledged = False
        # Who waits has been told what became of it.
        self.settled = False


class WriteQueue:
    """Messages and marks on their way into the database. What is under way counts as waiting."""

    def __init__(self) -> None:
        self._messages: OrderedDict[Waiting, None] = OrderedDict()
        self._marks: dict[bytes, None] = {}
        self._remembered: OrderedDict[bytes, None] = OrderedDict()
        # Marks that found no message, and how often they were tried.
        self._early: OrderedDict[bytes, int] = OrderedDict()
        # The group that is being written.
        self._under_way: list[Waiting] = []
        self._marks_under_way: list[bytes] = []
        # All messages that are not settled, by id; and, when a message is written twice, those behind the first.
        self._by_id: dict[bytes, Waiting] = {}
        # By account: how many that are to be pending are not settled.
        self._pending: dict[str, int] = {}
        self._twins: dict[bytes, list[Waiting]] = {}
        self._urgent: set[Waiting] = set()
        self.waiting_bytes = 0
        # What `watch` gives, as long as somebody looks at it.
        self._watched: dict[object, set[bytes]] = {}
        # Marks that were ever put in, and those of them that are committed.
        self.marks_put = 0
        self.marks_written = 0

    @property
    def messages(self) -> int:
        """Messages that wait for a group."""
        return len(self._messages)

    @property
    def marks(self) -> int:
        """Marks that do."""
        return len(self._marks)

    @property
    def unmatched(self) -> Collection[bytes]:
        """Marks that were written and have found no message, while they are tried again."""
        return self._early.keys()

    @property
    def oldest(self) -> float:
        """Since when the oldest message waits; 0.0 when none does."""
        waiting = chain(self._under_way, islice(self._messages, 1))
        return next((one.since for one in waiting if not one.settled), 0.0)

    def has_pending(self, account: Jid) -> bool:
        """Whether a message of an account waits that is to be pending when it is written."""
        return account.bare_text in self._pending

    def put(self, message: Message, done: Done, since: float, urgent: bool = False) -> None:
        """`urgent`: who waits wants to be told by `give_up_urgent`."""
        if message.pending and message.id in self._remembered:
            message = message._replace(pending=False)
        if not message.pending and not message.archived:
            done(None)
            return
        waiting = Waiting(message, done, since, urgent)
        self._messages[waiting] = None
        if message.pending:
            account = message.account.bare_text
            self._pending[account] = self._pending.get(account, 0) + 1
        if self._by_id.setdefault(message.id, waiting) is not waiting:
            self._twins.setdefault(message.id, []).append(waiting)
        self.waiting_bytes += len(message.stanza) + MESSAGE_BYTES
        if urgent:
            self._urgent.add(waiting)

    def mark(self, ids: Iterable[bytes]) -> None:
        """Messages are pending no longer."""
        for acknowledged in ids:
            for known in self._watched.values():
                known.add(acknowledged)
            found = self._same(acknowledged)
            for waiting in found:
                if waiting.tried:
                    # It may be there as pending: it gets its mark when it is known to be there.
                    waiting.acknowledged = True
                elif waiting.message.archived:
                    if waiting.message.pending:
                        self._pending_no_longer(waiting.message)
                        waiting.message = waiting.message._replace(pending=False)
                else:
                    # Nobody needs to look for it again.
                    self._remembered[acknowledged] = None
                    self._settle(waiting, None)
            if not any(waiting.tried for waiting in found):
                # What was not tried is marked too: another may have written the same message.
                self._mark(acknowledged)

    def still_early(self, ids: Iterable[bytes]) -> list[bytes]:
        """Those that are to be marked again: the others were forgotten since `early`, or have found their message."""
        return [id_ for id_ in ids if id_ in self._early]

    def marked(self) -> set[bytes]:
        """What is acknowledged, and not yet known to be written so."""
        acknowledged = {known for known in self._by_id if any(one.acknowledged for one in self._same(known))}
        return acknowledged | self._marks.keys() | set(self._marks_under_way) | self._early.keys()

    @contextmanager
    def watch(self) -> Iterator[set[bytes]]:
        """The same, and all that is acknowledged till the end of the block, be it written by then or not."""
        watcher = object()
        known = self._watched[watcher] = self.marked()
        try:
            yield known
        finally:
            del self._watched[watcher]

    def early(self, ids: Collection[bytes]) -> dict[int, list[bytes]]:
        """Marks of the group that is under way that find no message. Which of them are to be tried again later, by
        the time till then, 1 for the shortest: not those that were written once, and found it."""
        again: dict[int, list[bytes]] = {}
        for id_ in ids:
            tries = self._early.pop(id_, 0) + 1
            if id_ not in self._remembered and tries <= MAX_TRIES:
                self._early[id_] = tries
                again.setdefault(1 << max(0, tries - STEADY_TRIES), []).append(id_)
        while len(self._early) > MAX_EARLY:
            self._early.popitem(last=False)
        return again

    def _mark(self, id: bytes) -> None:
        if id not in self._marks:
            self._marks[id] = None
            self.waiting_bytes += MARK_BYTES
            self.marks_put += 1

    def take(self, most: int, most_bytes: int, most_marks: int) -> tuple[list[Message], list[bytes]]:
        """The next group: messages (one at least if any waits) and marks. It is under way until `written`, `put_back`
        or `refused` says what became of it."""
        size = 0
        while self._messages and len(self._under_way) < most:
            waiting = next(iter(self._messages))
            size += len(waiting.message.stanza)
            if self._under_way and size > most_bytes:
                break
            del self._messages[waiting]
            waiting.tried = True
            self._under_way.append(waiting)
        self._marks_under_way = list(islice(self._marks, most_marks))
        for acknowledged in self._marks_under_way:
            del self._marks[acknowledged]
        return [waiting.message for waiting in self._under_way], self._marks_under_way

    def written(self, missing: Collection[bytes] = ()) -> None:
        """What is under way is committed; `missing`: marks that have found no message."""
        group, marks = self._under_way, self._marks_under_way
        self._under_way, self._marks_under_way = [], []
        self.waiting_bytes -= MARK_BYTES * len(marks)
        self.marks_written += len(marks)
        for acknowledged in marks:
            if acknowledged not in missing:
                self._remembered[acknowledged] = None
                self._early.pop(acknowledged, None)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        for waiting in group:
            self._settle(waiting, None)

    def put_back(self) -> None:
        """What is under way was not written, or nobody knows: it is to be written again."""
        for waiting in reversed(self._under_way):
            if not waiting.settled:
                self._messages[waiting] = None
                self._messages.move_to_end(waiting, last=False)
        again = len(self._marks.keys() & self._marks_under_way)
        self.waiting_bytes -= MARK_BYTES * again
        self.marks_written += again  # they are put in once
        self._marks = dict.fromkeys(self._marks_under_way) | self._marks
        self._under_way, self._marks_under_way = [], []

    def refused(self, error: Exception) -> None:
        """The one message that is under way can never be written."""
        for waiting in self._under_way:
            self._settle(waiting, error)
        self.put_back()

    def give_up_urgent(self, error: Exception) -> None:
        """The database is away: those who want to know that at once are told."""
        for waiting in tuple(self._urgent):
            self._settle(waiting, error)

    def forget(self, account: Jid) -> None:
        """An account is removed: its messages need no writing any more."""
        for waiting in (*self._under_way, *self._messages):
            if waiting.message.account == account:
                self._settle(waiting, None)

    def supersede(self, is_others: Callable[[str], bool]) -> None:
        """What sessions have sent that are others' by now needs no writing any more; `is_others`: by their ids."""
        for waiting in (*self._under_way, *self._messages):
            if is_others(waiting.message.origin):
                self._settle(waiting, Superseded())

    def give_up(self, error: Exception) -> None:
        """Nothing is written any more."""
        for waiting in (*self._under_way, *self._messages):
            self._settle(waiting, error)
        self._under_way, self._marks_under_way = [], []
        self._marks.clear()
        self.waiting_bytes = 0

    def _same(self, id_: bytes) -> tuple[Waiting, ...]:
        """All under one id."""
        first = self._by_id.get(id_)
        return () if first is None else (first, *self._twins.get(id_, ()))

    def _part(self, id_: bytes, settled: Waiting) -> None:
        """Takes one of several under one id out."""
        first, *others = [waiting for waiting in self._same(id_) if waiting is not settled]
        self._by_id[id_] = first
        if others:
            self._twins[id_] = others
        else:
            del self._twins[id_]

    def _pending_no_longer(self, message: Message) -> None:
        account = message.account.bare_text
        self._pending[account] -= 1
        if not self._pending[account]:
            del self._pending[account]

    def _settle(self, waiting: Waiting, error: Exception | None) -> None:
        if waiting.settled:
            return
        waiting.settled = True
        message = waiting.message
        if message.pending:
            self._pending_no_longer(message)
        if self._twins and message.id in self._twins:
            self._part(message.id, waiting)
        else:
            del self._by_id[message.id]
        self._messages.pop(waiting, None)
        self._urgent.discard(waiting)
        self.waiting_bytes -= len(message.stanza) + MESSAGE_BYTES
        if waiting.acknowledged:
            self._mark(message.id)
        try:
            waiting.done(error)
        except Exception:
            # It is one waiter's fault; the others must be told too.
            log.exception("waiter_failed")


def telling(committed: asyncio.Future[None]) -> Done:
    """Ends the waiting of somebody who waits for a message, if he still does."""

    def done(error: Exception | None) -> None:
        if committed.done():
            return
        if error is None:
            committed.set_result(None)
        elif isinstance(error, Superseded):
            committed.cancel()
        else:
            committed.set_exception(error)

    return done
