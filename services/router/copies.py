"""What the holders of copies are told of this router's sessions (DESIGN 9).

A connector in another process has a copy of each session whose stream it serves. It learns of what its client sends
and gets by passing it on; of all else it is told here. A session that waits for its client, or whose stream is in
this very process, and that may be resumed, has its copy at another connector: what its client sends and gets goes
there first. When this router dies, the connector brings the copy to another router (reattachment.py).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from services.router.messages import MessageStore, marked
from services.router.session_record import record_of, state_of
from tidings.cluster.hashing import rendezvous
from tidings.kit.db import DatabaseAway

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from services.router.connector_link import ConnectorLink
    from services.router.iq_deadlines import IqDeadlines
    from services.router.sessions import Session, Sessions
    from services.router.tickets import Tickets
    from tidings.api.common.v1.session_pb2 import SessionRecord
    from tidings.cluster.view import ClusterView

# Seconds between two looks for sessions without a second holder.
LOOK = 1.0
# Seconds for a connector to say that it has forgotten a copy.
FORGET_TIMEOUT = 1.0
# Seconds between two looks at what is confirmed and written.
MARKED = 0.05


class Copies:
    """Makes what goes into copies. One for each router."""

    def __init__(
        self, own: str, tickets: Tickets, deadlines: IqDeadlines, view: Callable[[], ClusterView],
        spawn: Callable[[Any, str], Any], wanted: bool = True,
    ) -> None:  # fmt: skip
        """`wanted`: whether there are to be any."""
        self._own = own
        self._spawn = spawn
        self.wanted = wanted
        self._tickets = tickets
        self._deadlines = deadlines
        self._view = view
        # Sessions that have confirmed something, and up to which delivery.
        self._unmarked: dict[str, tuple[Session, int]] = {}
        # Raises a session's epoch in the table; whether this router has a session.
        self.keep: Callable[[Session], Awaitable[bool]] = _yes
        self.is_here: Callable[[Session], bool] = lambda _session: True
        # The links of connectors.
        self.links: Callable[[], Iterable[ConnectorLink]] = tuple

    # --- what clients have confirmed ---

    def confirmed(self, session: Session) -> None:
        """Copies keep what a client has confirmed until that is written: who takes the session over must not offer it
        again."""
        if session.holder is not None:
            self._unmarked[session.id] = session, session.outbound.acknowledged

    async def tell_marked(self, messages: MessageStore) -> None:
        while True:
            await asyncio.sleep(MARKED)
            unmarked, self._unmarked = self._unmarked, {}
            if not unmarked:
                continue
            await marked(messages)
            for session, number in unmarked.values():
                session.marked = max(session.marked, number)
                session.changed()

    # --- who holds them ---

    def served(self, session: Session, link: ConnectorLink) -> None:
        """A connector serves the session's stream from now on."""
        if not self.wanted:
            return
        before = session.holder if session.holder is not link else None
        suffices = not link.local and not self._is_near(link)
        if before is not None and not suffices and not self._is_near(before):
            before.hold(session)
            return
        session.holder = None if link.local else link
        if before is not None:
            self._let_go(session, before)
        if not suffices:
            self.cover(session)

    def cover(self, session: Session) -> None:
        """Has another connector hold the copy of a session that may be resumed and has no second holder, or none on
        another host though there is one."""
        holder, own = session.holder, self._host_of(self._own)
        if (
            not self.wanted
            or not session.resume_seconds
            or session.closed
            or (holder is not None and not self._is_near(holder))
        ):
            return
        links = {link.incarnation: link for link in self.links() if not link.local and link.handling is not None}
        away = [name for name in links if self._host_of(name) != own]
        others = away or [name for name in links if holder is None]
        if others:
            links[rendezvous(session.id, others)].hold(session)
            if holder is not None and holder is not session.link:
                self._let_go(session, holder)

    def _let_go(self, session: Session, link: ConnectorLink) -> None:
        """A connector is to forget its copy. When it does not say that it has, the session's epoch is raised: nobody
        may keep an old copy under an epoch that still counts."""
        told: list[bool] = []
        link.forget(session)
        link.when_copied(partial(told.append, True))
        if not told or link.over:
            asyncio.get_running_loop().call_later(FORGET_TIMEOUT, self._forgotten, session, told)

    def _forgotten(self, session: Session, told: list[bool]) -> None:
        if not told:
            self.outdate(session)

    def outdate(self, session: Session) -> None:
        """Somebody may have an old copy: its epoch is to count no more."""
        if self.is_here(session):
            self._spawn(self._raise_epoch(session), "the epoch of a session with an old copy")

    async def _raise_epoch(self, session: Session) -> None:
        # A router that ends has closed its database.
        with suppress(DatabaseAway, AssertionError):
            if not session.moving:
                await self.keep(session)

    def _is_near(self, link: ConnectorLink) -> bool:
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
        while True:
            await asyncio.sleep(LOOK)
            for session in sessions:
                if session.resume_seconds:
                    self.cover(session)

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


async def _yes(_session: Session) -> bool:
    return True
