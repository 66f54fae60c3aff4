"""A full JID has one session in the whole cluster: how a session gets it, and gives it up.

The table of sessions is the truth. Who binds enters a row; when another session is in the way it is ended, at
whichever router it is, and then its place is free. Of two that bind at the same moment one finds the row of
the other, so exactly one is left. Whatever the database leaves open, no row stays without a session: what may be
there is removed, again and again, and what is found without a session is ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from services.router.peers import END_TIMEOUT, Failed, Peers
from services.router.sessions import Session, Sessions
from services.router.store import DirectedChange, SessionRow, SessionTable
from tidings.api.router.v1.router_pb2 import EndSessionRequest
from tidings.cluster.node import NodeState
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid

if TYPE_CHECKING:
    from services.router.orphans import Orphans
    from tidings.kit.membership import Member

log = get_logger("cluster")

# Tries to get a full JID that others want too, and seconds between them.
TRIES = 20
PAUSE = 0.05
# Seconds for those who saw a session available to be told of its end, before the next one of its full JID is bound.
TOLD_TIMEOUT = 1.0
# Seconds between two tries to write what the database did not take.
RETRY = 1.0
# Seconds that a new session may take to send presence, before its row says that it has sent none.
SILENT = 5.0
# Seconds in which changes of availability are collected.
COLLECT = 0.1
# Changes of one session's directed presence that are collected one by one; beyond it, all of it is written anew.
MOST_CHANGES = 1000
# Seconds between two looks for rows of this router without a session; they go when they were seen twice.
SWEEP = 10.0


class Binding:
    """The router's hold on its rows of the table."""

    def __init__(
        self,
        own: str,
        sessions: Sessions,
        table: SessionTable,
        orphans: Orphans,
        member: Member,
        peers: Peers,
        spawn: Callable[[Any, str], Any],
    ) -> None:
        self._own = own
        self._sessions = sessions
        self._table = table
        self._orphans = orphans
        self._member = member
        self._peers = peers
        self._spawn = spawn
        # What is to be written of availability: by session, under which epoch.
        self._seen: dict[str, tuple[Jid, int, bool]] = {}
        # And of directed presence: by session, the receivers of which that has changed; None: all is written anew.
        self._directed: dict[str, tuple[Session, set[str] | None]] = {}
        # By session: what is set when its epoch has been raised.
        self._raised: dict[str, set[asyncio.Event]] = {}
        # Sessions whose rows come or go just now.
        self._unsettled: set[str] = set()

    async def take(self, session: Session, displace: Callable[[Session], Awaitable[None]]) -> None:
        """Gets the full JID for a session; `displace` ends one of this router. Raises StanzaError, DatabaseAway."""
        self._unsettled.add(session.id)
        try:
            await self._take(session, displace)
        except Exception:
            # Its row may be there all the same.
            self.forgo(session)
            raise
        asyncio.get_running_loop().call_later(SILENT, self._still_silent, session)

    def bound(self, session: Session) -> None:
        """The session of a row that was taken is among the others."""
        self._unsettled.discard(session.id)

    async def _take(self, session: Session, displace: Callable[[Session], Awaitable[None]]) -> None:
        untold: SessionRow | None = None
        for attempt in range(TRIES):
            row = await self._table.bind(session.jid, session.id, self._own)
            if row is None:
                if untold is not None:
                    # Its router woke, and has ended it: who saw it is told of that before anything of this one.
                    await self._ended_elsewhere(untold, TOLD_TIMEOUT)
                return
            present = self._sessions.get(row.session)
            if present is not None:
                await displace(present)
            elif row.router == self._own and attempt < TRIES // 2:
                # One that binds at this moment has its row already; else it was left behind.
                await asyncio.sleep(PAUSE)
            elif row.router != self._own and (told := await self._ended_elsewhere(row)) is not None:
                untold = None if told else row
                await asyncio.sleep(PAUSE if attempt else 0)
            else:
                session.epoch = row.epoch + 1
                if await self._table.replace(row, session.id, self._own):
                    # Its router is no more, and nobody else has told so.
                    await self._orphans.tell(row)
                    return
                session.epoch = 1
        raise StanzaError("resource-constraint", "others bind the same resource; try again", type="wait")

    async def end_elsewhere(self, account: Jid) -> None:
        """Has the other routers end their sessions of an account that is removed. Raises DatabaseAway."""
        for row in await self._table.of_account(account):
            if row.router != self._own:
                await self._ended_elsewhere(row, account_removed=True)

    async def _ended_elsewhere(
        self, row: SessionRow, seconds: float = END_TIMEOUT, account_removed: bool = False
    ) -> bool | None:
        """Has another router end its session: whether who saw it has been told, as far as is known here; None when
        that router is no more."""
        node = self._member.view.by_incarnation(row.router)
        if node is None:
            # It may have come a moment ago.
            await self._member.newer_view(PAUSE)
            node = self._member.view.by_incarnation(row.router)
        if node is None or node.state is NodeState.FAILED:
            return None
        try:
            request = EndSessionRequest(session=row.session, jid=str(row.jid), account_removed=account_removed)
            await self._peers.end(node, request, seconds)
        except Failed as error:
            log.info("session_not_ended", router=node.hostname, reason=str(error))
            return False
        return True

    # --- rows that go from router to router (hand_over.py) ---

    async def adopt(self, jid: Jid, session: str, epoch: int, giver: str) -> bool:
        """Takes a session's row from another router, under the next epoch; False when it is not that one's any more.
        May be repeated. Raises DatabaseAway."""
        if session in self._unsettled:
            return False  # it is being ended
        with self._settling(session):
            return await self._table.move(SessionRow(jid, session, epoch, giver), self._own)

    async def keep(self, session: Session) -> bool:
        """Raises the epoch of a session, so that a router which was asked to adopt it can't any more; False when its
        row is not this router's. May be repeated, and called by several at one time. Raises DatabaseAway."""
        raised = asyncio.Event()
        self._raised.setdefault(session.id, set()).add(raised)
        try:
            return await self._keep(session)
        finally:
            raised.set()
            self._raised[session.id].discard(raised)
            if not self._raised[session.id]:
                del self._raised[session.id]

    async def _keep(self, session: Session) -> bool:
        epoch = 0
        while epoch != session.epoch:  # another call has raised it meanwhile
            epoch = session.epoch
            if await self._table.move(SessionRow(session.jid, session.id, epoch, self._own), self._own):
                # Where two have found the same epoch, one move was the repetition of the other.
                session.epoch = max(session.epoch, epoch + 1)
                self._changed(session)
                return True
        return False

    def _changed(self, session: Session) -> None:
        self._note(session, session.seen_available)
        self._note_directed(session)
        session.changed()

    async def take_back(self, session: Session, taker: str) -> bool:
        """Takes the row of a session back from a router that has adopted it and is gone; False when it is another
        one's by now. May be repeated. Raises DatabaseAway."""
        row = SessionRow(session.jid, session.id, session.epoch + 1, taker)
        if not await self._table.move(row, self._own):
            return False
        session.epoch += 2
        self._changed(session)
        return True

    async def is_reachable(self, session: Session) -> bool:
        """Whether the table answers now: then the row of a session can be changed, as far as one can see."""
        try:
            await self._table.of_account(session.jid.bare)
        except DatabaseAway:
            return False
        return True

    @contextmanager
    def _settling(self, session: str) -> Iterator[None]:
        self._unsettled.add(session)
        try:
            yield
        finally:
            self._unsettled.discard(session)

    # --- the end ---

    async def give_up(self, session: Session) -> bool:
        """Removes the row of a session that ends; False when it is another router's by now, or will be: this one was
        put out, and the others end its sessions."""
        self._seen.pop(session.id, None)
        self._directed.pop(session.id, None)
        if self._is_put_out():
            return False
        self._unsettled.add(session.id)
        for raised in list(self._raised.get(session.id, ())):
            await raised.wait()  # the row has the next epoch then
        try:
            removed = await self._table.end(session.jid, session.id, session.epoch)
        except DatabaseAway:
            self.forgo(session)
            return True
        self._unsettled.discard(session.id)
        return removed is not None

    def _is_put_out(self) -> bool:
        own = self._member.view.by_incarnation(self._own)
        return own is None or own.state is NodeState.FAILED

    def forgo(self, session: Session) -> None:
        """Removes the row of a session, if there is one, as soon as the database lets us."""
        self._unsettled.add(session.id)
        self._spawn(self._remove(session), "row of a session that is not there")

    async def _remove(self, session: Session) -> None:
        while True:
            try:
                await self._table.end(session.jid, session.id, session.epoch)
                break
            except DatabaseAway:
                await asyncio.sleep(RETRY)
        self._unsettled.discard(session.id)

    # --- rows without a session ---

    async def tidy(self) -> None:
        """Ends rows of this router for which there is no session."""
        missed: set[str] = set()
        while True:
            await asyncio.sleep(SWEEP)
            try:
                rows: list[SessionRow] = []
                if (await self._table.routers()).get(self._own, 0) > len(self._sessions) + len(self._unsettled):
                    rows = [row for row in await self._table.of_router(self._own) if self._is_left(row)]
                for row in rows:
                    if row.session in missed:
                        await self._end_left(row)
            except DatabaseAway:
                continue
            missed = {row.session for row in rows}

    async def clear(self, jid: Jid, session: str) -> None:
        """Another router needs the place of a session that is not here; its row, if it is ours, was left behind.
        Raises DatabaseAway."""
        if session in self._unsettled:
            return  # it goes just now: what is read of it here may be gone when it is looked at
        for row in await self._table.of_account(jid.bare):
            if row.session == session and row.router == self._own:
                await self._end_left(row)

    def _is_left(self, row: SessionRow) -> bool:
        return self._sessions.get(row.session) is None and row.session not in self._unsettled

    async def _end_left(self, row: SessionRow) -> None:
        if self._is_left(row):
            log.error("row_without_session", jid=str(row.jid), session=row.session)
            with self._settling(row.session):
                await self._orphans.end(row)

    # --- whether contacts may have seen it ---

    def _still_silent(self, session: Session) -> None:
        """A session that has sent no presence for a while: nobody needs to be told of its end."""
        if session.presence is None and self._sessions.get(session.id) is session:
            self.presence_changed(session, b"", "unavailable")

    def presence_changed(self, session: Any, _raw: bytes, type_: str) -> None:
        """Notes whether contacts may have seen a session available, for whoever must tell them of its end."""
        available = type_ == ""
        if session.seen_available is not available:
            self._note(session, available)

    def _note(self, session: Any, available: bool) -> None:
        session.seen_available = available
        self._seen[session.id] = (session.jid, session.epoch, available)

    def adopted(self, session: Session) -> None:
        """What the row says of a session that was taken over is not known here: it is written anew."""
        self._note(session, session.presence is not None)
        self._note_directed(session)

    # --- whom it has sent presence directly ---

    def directed_changed(self, session: Any, receiver: str) -> None:
        """Notes that a receiver has come or gone (''; all of them), for whoever must tell them of its end."""
        _, changed = self._directed.get(session.id, (session, set[str]()))
        if changed is not None and receiver and len(changed) < MOST_CHANGES:
            changed.add(receiver)
        else:
            changed = None
        self._directed[session.id] = session, changed

    def _note_directed(self, session: Session) -> None:
        """What was noted under the epoch before may not be written."""
        if session.directed:
            self.directed_changed(session, "")

    async def run(self) -> None:
        """Writes what was noted, in groups."""
        while True:
            await asyncio.sleep(COLLECT)
            seen, self._seen = self._seen, {}
            directed, self._directed = self._directed, {}
            try:
                if seen:
                    changes = [(jid, id_, epoch, to) for id_, (jid, epoch, to) in seen.items()]
                    await self._table.set_available(changes)
                if directed:
                    await self._table.set_directed([_directed_change(*noted) for noted in directed.values()])
            except DatabaseAway:
                self._seen = {**seen, **self._seen}
                for session, changed in directed.values():
                    for receiver in [""] if changed is None else changed:
                        self.directed_changed(session, receiver)
                await asyncio.sleep(RETRY)


def _directed_change(session: Session, changed: set[str] | None) -> DirectedChange:
    added = session.directed if changed is None else changed & session.directed
    removed = None if changed is None else changed - session.directed
    return DirectedChange(session.jid, session.id, session.epoch, frozenset(added), removed)
