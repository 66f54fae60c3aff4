"""The sessions of this router."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tidings.kit.link import Lane
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream_management import Inbound, Outbound

if TYPE_CHECKING:
    from services.router.connector_link import ConnectorLink
    from services.router.iq_deadlines import Asked
    from services.router.withheld import Withheld
    from tidings.api.common.v1.stanza_pb2 import Envelope

# The note of a session that is behind: messages wait for it in the store, wherever it goes (see deliveries.py).
BEHIND = "=behind"
# The note of a session that is doubtful (see Session), wherever it goes.
DOUBTFUL = "=doubtful"

NOBODY: Mapping[str, Session] = MappingProxyType({})


def new_id() -> str:
    """An id that nobody can guess: 128 random bits, URL-safe."""
    return secrets.token_urlsafe(16)


class Session:
    """A bound full JID. Satisfies `tidings.kit.module.Session`, which says what its values mean."""

    __slots__ = (
        "account", "asked", "asks", "behind", "closed", "connector", "copied", "directed", "doubtful", "early",
        "epoch", "fresh", "frozen", "held", "holder", "holding", "holds", "id", "inbound", "interested", "jid",
        "jid_text", "lane", "lang", "last_look", "left", "link", "marked", "moving", "notes", "old_copies",
        "outbound", "pinged", "presence", "priority", "resume_seconds", "seen_available", "settling", "since",
        "stream", "taken", "uncopied", "unmarked", "unsure", "waits", "withheld",
    )  # fmt: skip

    def __init__(
        self, jid: Jid, lang: str, link: ConnectorLink | None, stream: int, spawn: Callable[[Any, str], Any]
    ) -> None:
        self.id = new_id()
        self.epoch = 1
        self.jid = jid
        self.jid_text = str(jid)
        self.account = str(jid.bare)
        self.lang = lang
        # The connector's link; None while it has not attached the stream of a session that was handed over.
        self.link = link
        self.stream = stream
        # The stream is closed; the end of the session waits for what it has sent before.
        self.closed = False
        # The incarnation of its connector.
        self.connector = link.incarnation if link is not None else ""
        # The link to the connector that holds its copy; None: nobody does. A connector in another process that serves
        # its stream holds one in any case. And the state that each of them was told last.
        self.holder: ConnectorLink | None = None
        self.copied: dict[ConnectorLink, object] = {}
        # Connectors that may have an older copy, under the epoch that still counts: if this router has been put out
        # and does not know yet, they bring that one to another router.
        self.old_copies: frozenset[ConnectorLink] = frozenset()
        # Who waits until there are none (`when_all_have_it`).
        self.unsure: list[Callable[[bool], None]] = []
        # Up to which delivery it has confirmed, and that is written, as far as it needs to be.
        self.marked = 0
        # Messages that it has confirmed, and of which that is not known to be written: the delivery with which they
        # were confirmed, and their ids.
        self.unmarked: deque[tuple[int, bytes]] = deque()
        # What waits until the holder, being another connector than its own, has all till then: since when, and what
        # is to be called, in order. And what stands for that holder: another object for another one.
        self.uncopied: deque[tuple[float, Callable[[], None]]] = deque()
        self.holding: object = None
        self.priority = 0
        self.presence: bytes | None = None
        self.interested = False
        self.directed: set[str] = set()
        self.notes: dict[str, bytes] = {}
        # Stanzas taken from it, and written to it (XEP-0198).
        self.inbound = Inbound()
        self.outbound: Outbound[Envelope | bytes] = Outbound()
        # Its client has asked what is handled, and will be told when more is.
        self.asks = False
        # Seconds for which it waits for its client; 0: it ends with its stream. And what ends that waiting.
        self.resume_seconds = 0
        self.waits: asyncio.TimerHandle | None = None
        # Of a client without XEP-0198: the delivery that a ping has asked about; and answers that wait until what it
        # has sent before is safe.
        self.pinged = 0
        self.withheld: Withheld | None = None
        # The last number that it took from each session that sent it something, so that hops may repeat.
        self.taken: dict[str, int] = {}
        # And the first one: what that one has sent before was not given to this session.
        self.since: dict[str, int] = {}
        # IQ requests that wait for an answer (see iq_deadlines.py).
        self.asked: dict[tuple[str, str], Asked] = {}
        # What the row of the session says.
        self.seen_available = True
        # It is being handed over; what is delivered to it meanwhile; and, where it goes, what is routed to it before
        # the router that gives it has passed on what came there (see hand_over.py).
        self.moving = False
        self.frozen: deque[Envelope] | None = None
        self.early: deque[Envelope] | None = None
        # What it sends is worked off in order.
        self.lane = Lane(spawn)
        # What is routed to it while stored messages go first.
        self.held: deque[Envelope] | None = None
        self.holds = 0
        # It does not read as fast as others write: messages for it stay in the store (how many so far), and what else
        # is routed to it waits here behind them; None: it is not behind. While the store is looked at for the last
        # time, messages wait here too: if some were left there at every look, none would be the last.
        self.behind: deque[Envelope] | None = None
        self.left = 0
        self.last_look = False
        # It has just been bound: messages wait a moment for its first presence (see deliveries.py).
        self.settling: asyncio.TimerHandle | None = None
        # No message has been delivered to it as it came.
        self.fresh = True
        # It was taken over from a router that may have taken messages for it, or not taken what others of its account
        # were given: what the store says was given to it may not have been.
        self.doubtful = False

    def doubt(self) -> None:
        """It is doubtful from now on, wherever it goes."""
        self.doubtful = True
        self.notes[DOUBTFUL] = b"1"

    def are_forgotten(self, links: Collection[ConnectorLink]) -> None:
        """Of these connectors the older copies count no more."""
        self.old_copies = self.old_copies.difference(links)
        if not self.old_copies:
            self.look_again()

    def look_again(self) -> None:
        """Who waits until nobody has an older copy may go on, or waits for another holder from now on."""
        unsure, self.unsure = self.unsure, []
        for then in unsure:
            when_all_have_it(self, then)

    def changed(self) -> None:
        """Its copies, if there are any, are to follow."""
        holder, link = self.holder, self.link
        if holder is None:
            return
        holder.progress(self)
        if link is not None and link is not holder:
            link.progress(self)


def when_copied(session: Session, holder: ConnectorLink, then: Callable[[], None]) -> None:
    """Calls `then` when the connector that holds a session's copy has what it was sent last; when another one takes
    its place meanwhile, that one."""
    session.uncopied.append((time.monotonic(), then))
    holder.when_copied(partial(_copied, session, session.holding))


def when_all_have_it(session: Session, then: Callable[[bool], None]) -> None:
    """Calls `then` when all that have a copy of a session have what was given to it last, or are gone, and nobody has
    an older one; or when the session is here no longer. With whether there is one, here: then the session goes on
    with that, should this router be gone."""
    holder, link = session.holder, session.link
    if holder is None:
        then(False)
        return
    done = partial(_all_have_it, session, then)
    if link is holder:
        holder.when_copied(done)
    elif link is None or link.local:
        when_copied(session, holder, done)
    else:
        # Two have one: the stream's connector gets it when the other one has it.
        when_copied(session, holder, partial(link.when_copied, done))


def _all_have_it(session: Session, then: Callable[[bool], None]) -> None:
    if session.old_copies and session.holder is not None:
        session.unsure.append(then)
    else:
        then(session.holder is not None)


def _copied(session: Session, holding: object) -> None:
    if session.holding is holding and session.uncopied:
        session.uncopied.popleft()[1]()


class Sessions:
    """Finds sessions by id and by account. A full JID has one session at most."""

    def __init__(self) -> None:
        self._by_id: dict[str, Session] = {}
        self._by_account: dict[str, dict[str, Session]] = {}
        # By account: how many of its sessions are arriving, and what is set when they have, or have not.
        self._arriving: dict[str, tuple[int, asyncio.Event]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_id.values()))

    def get(self, session_id: str) -> Session | None:
        return self._by_id.get(session_id)

    def of(self, account: str) -> Mapping[str, Session]:
        """The sessions of a bare JID, by resource."""
        return self._by_account.get(account, NOBODY)

    @contextmanager
    def arriving(self, account: str) -> Iterator[None]:
        """A session comes from another router: its row may say so before it is here."""
        count, arrived = self._arriving.get(account, (0, asyncio.Event()))
        self._arriving[account] = count + 1, arrived
        try:
            yield
        finally:
            count, _ = self._arriving[account]
            if count > 1:
                self._arriving[account] = count - 1, arrived
            else:
                del self._arriving[account]
                arrived.set()

    def arrival(self, account: str) -> asyncio.Event | None:
        """What is set when the sessions are here that come for an account just now; None when none does."""
        return self._arriving[account][1] if account in self._arriving else None

    async def arrived(self, account: str, seconds: float) -> None:
        """Waits until no session comes for an account, for so long at the most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while (arrival := self.arrival(account)) is not None:
                    await arrival.wait()

    def add(self, session: Session) -> None:
        sessions = self._by_account.setdefault(session.account, {})
        if session.jid.resource in sessions:
            raise ValueError(f"{session.jid} has a session already")
        sessions[session.jid.resource] = session
        self._by_id[session.id] = session

    def remove(self, session: Session) -> bool:
        """Takes a session out; False when it was out already."""
        if self._by_id.get(session.id) is not session:
            return False
        del self._by_id[session.id]
        sessions = self._by_account[session.account]
        del sessions[session.jid.resource]
        if not sessions:
            del self._by_account[session.account]
        session.old_copies = frozenset()
        unsure, session.unsure = session.unsure, []
        for then in unsure:
            then(False)
        return True
