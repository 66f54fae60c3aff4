"""What the holders of copies are told of this router's sessions (DESIGN 9).

A connector in another process has a copy of each session whose stream it serves. It learns of what its client sends
and gets by passing it on; of all else it is told here. A session that waits for its client, or whose stream is in
this very process, and that may be resumed, has its copy at another connector: what its client sends and gets goes
there first. When this router dies, the connector brings the copy to another router (reattachment.py).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from services.router.messages import MessageStore, marked
from services.router.old_copies import OldCopies
from services.router.session_record import record_of, state_of
from services.router.sessions import when_copied
from tidings.cluster.hashing import rendezvous
from tidings.kit.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from services.router.connector_link import ConnectorLink
    from services.router.iq_deadlines import IqDeadlines
    from services.router.sessions import Session, Sessions
    from services.router.tickets import Tickets
    from tidings.api.common.v1.session_pb2 import SessionRecord
    from tidings.cluster.view import ClusterView

log = get_logger("cluster")

# Seconds between two looks for sessions without a second holder.
LOOK = 0.5
# Seconds by which a look may be late: if it is by more, this router has stood still, and nobody else was silent.
LATE = 0.5
# Seconds for a connector to have what it is to copy: then another one takes its place, which is given twice the time,
# for when all are slow a change helps nobody; and where there is none, until the session goes on without.
SILENT = 1.0
ALONE = 3.0
# Seconds between two looks at what is confirmed and written.
MARKED = 0.05
_NEVER = (0, 0.0)


class Copies:
    """Makes what goes into copies. One for each router."""

    def __init__(
        self, own: str, tickets: Tickets, deadlines: IqDeadlines, view: Callable[[], ClusterView],
        spawn: Callable[[Any, str], Any], wanted: bool = True,
    ) -> None:  # fmt: skip
        """`wanted`: whether there are to be any."""
        self._own = own
        self.old = OldCopies(spawn)
        self.wanted = wanted
        self._tickets = tickets
        self._deadlines = deadlines
        self._view = view
        # Sessions that have confirmed something, and up to which delivery.
        self._unmarked: dict[str, tuple[Session, int]] = {}
        # By session: how many connectors have taken the place of another one, since one had all in time; and when the
        # last one did.
        self._replaced: dict[str, tuple[int, float]] = {}
        # The links of connectors.
        self.links: Callable[[], Iterable[ConnectorLink]] = tuple

    # --- what clients have confirmed ---

    def confirmed(self, session: Session, ids: Iterable[bytes] = ()) -> None:
        """Copies keep what a client has confirmed until that is written: who takes the session over must not offer it
        again. `ids`: of the messages among it; copies that begin meanwhile have these too, and what is read back here
        by ids."""
        if session.holder is not None or session.doubtful:
            number = session.outbound.acknowledged
            self._unmarked[session.id] = session, number
            session.unmarked.extend((number, id_) for id_ in ids)

    async def tell_marked(self, messages: MessageStore) -> None:
        while True:
            await asyncio.sleep(MARKED)
            unmarked, self._unmarked = self._unmarked, {}
            if not unmarked:
                continue
            await marked(messages)
            unmatched = messages.unmatched
            for session, number in unmarked.values():
                places = (place for place, id_ in session.unmarked if id_ in unmatched)
                if unmatched and (first := next(places, None)) is not None:
                    # Whoever takes the session over must know, should the message come. It was delivered behind what
                    # was confirmed before; up to `first` others may be that were confirmed with it.
                    self._unmarked.setdefault(session.id, (session, number))
                    number = max((place for place, _ in session.unmarked if place < first), default=session.marked)
                session.marked = max(session.marked, number)
                while session.unmarked and session.unmarked[0][0] <= number:
                    session.unmarked.popleft()
                session.changed()

    # --- who holds them ---

    def served(self, session: Session, link: ConnectorLink) -> None:
        """A connector serves the session's stream from now on."""
        if not self.wanted:
            return
        before = session.holder if session.holder is not link else None
        suffices = not link.local and not self.is_near(link)
        if before is not None and not suffices and not self.is_near(before) and before.handling is not None:
            before.hold(session)
            when_copied(session, before, _nothing)
            return
        session.holder = None if link.local else link
        if before is not None:
            self.old.let_go(session, before)
        if not suffices:
            self.cover(session, before)
        self._go_on(session)

    def _replace(self, session: Session, silent: ConnectorLink) -> None:
        """The connector that holds the copy of a session says nothing: another one takes its place, and has all
        before anything that has waited for it goes on."""
        log.info("copy_not_kept", session=session.id, connector=silent.incarnation, reason="it is silent")
        session.holder = None
        self.old.let_go(session, silent, 0.0)
        self.cover(session, silent)
        if session.holder is None or session.holder is session.link:
            self._go_on(session)

    def _go_on(self, session: Session) -> None:
        """What has waited for the holder before waits for the one that is now."""
        session.holding = object()
        waiting, session.uncopied = session.uncopied, deque()
        holder = session.holder
        for _, then in waiting:
            if holder is None or holder is session.link:
                then()
            else:
                when_copied(session, holder, then)
        session.look_again()

    def lost(self, session: Session) -> None:
        """The link of a connector that had a copy has ended, and the session has no stream there, or no longer. While
        nobody has a better copy that one still counts."""
        self.cover(session)
        if session.holder is None:
            self._go_on(session)
        else:
            self.old.outdate_behind(session, session.holder)

    def cover(self, session: Session, silent: ConnectorLink | None = None) -> None:
        """Has another connector hold the copy of a session that may be resumed and has no second holder, or none on
        another host though there is one. `silent`: not that one."""
        if self.wanted and session.holder is None and session.link is not None and not session.link.local:
            session.holder = session.link  # what passes there keeps its copy up in any case
        holder, own = session.holder, self._host_of(self._own)
        if (
            not self.wanted
            or not session.resume_seconds
            or session.closed
            or not self.old.is_here(session)
            or (holder is not None and not self.is_near(holder))
        ):
            return
        links = self._candidates(session, silent)
        away = [name for name in links if self._host_of(name) != own]
        others = away or [name for name in links if holder is None]
        if others:
            taker = links[rendezvous(session.id, others)]
            taker.hold(session)
            self.old.outdate_behind(session, taker)
            self._go_on(session)
            if holder is not None and holder is not session.link:
                self.old.let_go(session, holder)

    def _candidates(self, session: Session, silent: ConnectorLink | None) -> dict[str, ConnectorLink]:
        """Who could hold the copy of a session, by incarnation."""
        return {
            link.incarnation: link
            for link in self.links()
            if link is not session.link and link is not silent and not link.local and link.handling is not None
        }

    def is_near(self, link: ConnectorLink) -> bool:
        """Whether a connector would die with this router's host, and there is one that would not."""
        own = self._host_of(self._own)
        return self._host_of(link.incarnation) == own and any(
            self._host_of(other.incarnation) != own for other in self.links() if not other.local
        )

    def _host_of(self, incarnation: str) -> str:
        node = self._view().by_incarnation(incarnation)
        return node.host if node is not None else ""

    async def run(self, sessions: Sessions) -> None:
        """Covers those whose holders are gone, and those for whom there was no good one."""
        looked = awake = time.monotonic()
        while True:
            await asyncio.sleep(LOOK)
            now = time.monotonic()
            if now - looked > LOOK + LATE:
                awake = now  # it was this router that stood still
            looked = now
            self._replaced = {
                id_: (times, last) for id_, (times, last) in self._replaced.items() if _waits(sessions.get(id_), last)
            }
            for session in sessions:
                if session.holder is not None and self._is_silent(session, session.holder, now, awake):
                    times, _ = self._replaced.get(session.id, _NEVER)
                    self._replace(session, session.holder)
                    self._replaced[session.id] = times + 1, time.monotonic()
                elif session.resume_seconds:
                    self.cover(session)

    def _is_silent(self, session: Session, holder: ConnectorLink, now: float, awake: float) -> bool:
        waited = now - max(awake, session.uncopied[0][0]) if session.uncopied else 0.0
        patience = SILENT * 2 ** self._replaced.get(session.id, _NEVER)[0]
        return waited > patience and (waited > ALONE or bool(self._candidates(session, holder)))

    # --- what goes into them ---

    def whole(self, session: Session, link: ConnectorLink) -> SessionRecord:
        """The session as it is now."""
        session.copied[link] = _key(session)
        left = session.waits.when() - asyncio.get_running_loop().time() if session.waits is not None else 0.0
        return record_of(session, self._deadlines.left(session), max(0.0, left))

    def ticket(self, session: Session, connector: str) -> bytes:
        """The right of a connector's present start to bring the session to another router."""
        return self._tickets.seal(connector, session.account, session.id, session.epoch)

    def changed(self, session: Session, link: ConnectorLink) -> SessionRecord | None:
        """What the copy there does not learn by itself, if it is not what it was told last."""
        key = _key(session)
        if key == session.copied.get(link):
            return None
        session.copied[link] = key
        return state_of(session)


def _key(session: Session) -> object:
    return (
        session.presence, session.priority, session.interested, session.inbound.counts, session.resume_seconds,
        session.epoch, frozenset(session.directed) if session.directed else None,
        tuple(session.notes.items()) if session.notes else None,
    )  # fmt: skip


def _waits(session: Session | None, last: float) -> bool:
    """Whether something still waits that did when the session's holder was replaced."""
    return session is not None and bool(session.uncopied) and session.uncopied[0][0] <= last


def _nothing() -> None: ...
