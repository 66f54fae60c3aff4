"""Sessions go from router to router: when the view gives their account another keeper, and when one drains.

The stream stays where it is, nobody sees presence, and a client sees a pause. The steps, from the router that gives
to the one that takes (adoption.py):

1. The giver has the connector stop reading the client, and say so behind all that the client has sent
   (`prepare_move`, `move_ready`). What that has set in motion is waited for.
2. The giver freezes the session: what comes for it is kept. Its record goes to the taker, which takes its row over
   under the next epoch (`AdoptSession`). From then on the session is the taker's; what reaches it there waits.
3. The giver tells the connector (`moved`), which attaches the stream at the taker; and it gives the taker what it
   has kept (`SessionGiven`, a note on their link).
4. The taker has both: the client gets what was given, then what came directly, each sender's in its order.

While no answer to step 2 comes, nobody but the table knows which of the two has the session. So the giver takes the
row itself, under the next epoch. Where that succeeds no late adoption can, and all goes on as before. Where it does
not the session is the taker's, and the giver asks again until that one says so. The session stays frozen so long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from services.router.first_presence import is_settling
from services.router.iq_deadlines import REQUESTS
from services.router.peers import Failed, Peers
from services.router.session_record import record_of
from services.router.sessions import Session, Sessions
from services.router.stranded import rest_first
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import AdoptSessionRequest, SessionGiven
from tidings.cluster.forwarding import Item, Mode
from tidings.cluster.hashing import rendezvous
from tidings.cluster.node import Node, NodeState
from tidings.cluster.strategy import routers
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.link import Lane
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ, MESSAGE, Hooks

if TYPE_CHECKING:
    from services.router.binding import Binding
    from services.router.connector_link import ConnectorLink
    from services.router.routing import Routing

log = get_logger("cluster")

# The name of the notes that carry SessionGiven (no module has it: theirs are those of their entry points), and what
# is answered when the session has ended.
GIVEN = "=session-given"
GONE = b"gone"
# Bytes of stanzas in one of them: with that of others it stays far from the 8 MiB that a link takes at once.
GIVEN_BYTES = 512 * 1024

# Moves at one time: each holds one session still for some milliseconds.
AT_ONCE = 32
# Seconds for the connector to stop reading, and for what is under way.
READY_TIMEOUT = 5.0
QUIET_TIMEOUT = 10.0
# Seconds between two tries, and between two looks at what is under way.
RETRY = 1.0
LOOK = 0.005
# How often a stream that is not bound yet is sent on: routers whose views differ would send it in a circle.
MAX_MOVES = 4


class _Lost(Exception):
    """Neither this router nor the other one has the session any more; the text says why."""


class HandOver:
    """Knows where sessions belong, and gives those of this router that belong elsewhere."""

    def __init__(
        self,
        own: str,
        sessions: Sessions,
        binding: Binding,
        routing: Routing,
        hooks: Hooks,
        peers: Peers,
        spawn: Callable[[Any, str], Any],
    ) -> None:
        self._own = own
        self._sessions = sessions
        self._binding = binding
        self._routing = routing
        self._hooks = hooks
        self._peers = peers
        self._spawn = spawn
        self._view = ClusterView()
        # The other routers that serve, as far as is known, and those of them that take sessions now.
        self._others: list[Node] = []
        self._takers: list[str] = []
        self._draining = False
        self._slots = asyncio.Semaphore(AT_ONCE)
        # By session: which question its connector is to answer, and who waits for that.
        self._asked: dict[str, tuple[int, asyncio.Future[None]]] = {}
        self._questions = 0
        # Sessions of which it is not known yet who has them.
        self._unsettled: dict[str, asyncio.Future[None]] = {}
        # Notes with what came for sessions that are given, and that are not taken yet.
        self.owed = 0
        # Ends a session and its stream.
        self.dismiss: Callable[[Session], Any] = lambda _session: None
        # Total, for metrics.
        self.given = 0

    # --- where sessions belong ---

    def view_changed(self, view: ClusterView) -> None:
        """Called when the strategy knows the view."""
        self._view = view
        self._others = [node for node in routers(view) if node.incarnation != self._own]
        self._takers = [node.incarnation for node in self._others if node.state is NodeState.UP]
        for session in self._sessions:
            self.place(session)

    async def drain(self, more: Callable[[], bool]) -> None:
        """Hands over all sessions; returns when none is left and no `more` are to come, or nobody can take them."""
        self._draining = True
        while self._others and (len(self._sessions) or more()):
            for session in self._sessions:
                self.place(session)
            await asyncio.sleep(LOOK * 4)

    def target(self, account: str) -> Node | None:
        """The other router that is to keep the sessions of an account; None when it is this one, or the other can't
        take them now: a suspect one is back, or has failed, by a view that comes soon."""
        keeper = self._routing.strategy.keeper(account)
        if self._draining and self._takers and keeper not in self._takers:
            keeper = rendezvous(account, self._takers)
        return self._view.by_incarnation(keeper) if keeper in self._takers else None

    def place(self, session: Session) -> None:
        """Starts to hand a session over, if it belongs elsewhere."""
        if session.moving or session.closed or (session.link is None and session.waits is None):
            return
        node = self.target(session.account)
        # Not to one from which it was just taken over: that one does not answer, and may be put out.
        if node is not None and not self._routing.is_unsettled(session.account, node.incarnation):
            session.moving = True
            self._spawn(self._move(session, node), "hand a session over")

    # --- giving ---

    async def _move(self, session: Session, node: Node) -> None:
        async with self._slots:
            link = session.link
            movable = link is not None or session.waits is not None
            moved = movable and self._is_here(session) and await self._try(session, node, link)
        if not moved:
            session.moving = False
            await asyncio.sleep(RETRY)
            if self._is_here(session):
                self.place(session)

    async def _try(self, session: Session, node: Node, link: ConnectorLink | None) -> bool:
        """Whether the session is the other router's now. One without a stream waits for its client there."""
        if is_settling(session):
            return False  # what comes for it waits for its first presence, behind which it gets what is stored
        number = session.stream
        if not await self._binding.is_reachable(session) or not self._is_here(session):
            return False  # without the database it would have to stand still till that is back
        if (session.link, session.stream) != (link, number):
            return False  # its client has come back with another stream meanwhile
        still = await self._is_still(session, link)
        if not still or not self._is_here(session) or (session.link, session.stream) != (link, number):
            self._stay(session, link, number)
            return False
        session.frozen = deque()
        settled = self._unsettled[session.id] = asyncio.get_running_loop().create_future()
        ticket = None
        try:
            ticket = await self._adopted_by(node, session)
        except _Lost as error:
            log.error("session_lost", session=session.id, account=session.account, reason=str(error))
            self._spawn(self.dismiss(session), "end a session that is lost")
        finally:
            if ticket is not None:
                self._give(session, node, link, ticket)
            else:
                self._stay(session, link, number)
            del self._unsettled[session.id]
            settled.set_result(None)
        return ticket is not None

    def _is_alive(self, node: Node) -> bool:
        present = self._view.by_incarnation(node.incarnation)
        return present is not None and present.state is not NodeState.FAILED

    def _is_here(self, session: Session) -> bool:
        return self._sessions.get(session.id) is session

    async def _is_still(self, session: Session, link: ConnectorLink | None) -> bool:
        """Whether, in time, nothing more comes from the client, and all that it has sent is dealt with and safe."""
        try:
            if link is not None:
                await self._is_silent(session, link)
            async with asyncio.timeout(QUIET_TIMEOUT):
                await self._quiet(session)
        except TimeoutError:
            log.warning("session_not_moved", session=session.id, reason="it was not quiet in time")
            return False
        return True

    async def _is_silent(self, session: Session, link: ConnectorLink) -> None:
        """Waits until the connector has said that nothing more comes. Raises TimeoutError."""
        self._questions += 1
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked[session.id] = (self._questions, answered)
        link.command(session.stream).prepare_move.attempt = self._questions
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                await answered
        finally:
            self._asked.pop(session.id, None)

    def ready(self, session: Session, attempt: int) -> None:
        """The connector has stopped reading, as it was asked in this attempt."""
        asked, answered = self._asked.get(session.id, (0, None))
        if answered is not None and asked == attempt and not answered.done():
            answered.set_result(None)

    def ended(self, session: Session) -> None:
        """The session is over: nothing needs to be waited for."""
        self.ready(session, self._asked.get(session.id, (0, None))[0])

    async def _quiet(self, session: Session) -> None:
        """Waits until all that the session has sent is dealt with and safe, and all that was stored for it given to
        it."""
        inbound = session.inbound
        while True:
            await session.lane.idle()
            safe = inbound.safe_through == inbound.number and session.withheld is None
            if (
                safe
                and not session.holds
                and not session.uncopied
                and not self._routing.forwarder.under_way(session.account)
            ):
                return
            await asyncio.sleep(LOOK)

    async def _adopted_by(self, node: Node, session: Session) -> bytes | None:
        """Has another router take a session over: the ticket for its connector, or None when it stays here after all.
        Raises _Lost."""
        left = session.waits.when() - asyncio.get_running_loop().time() if session.waits is not None else 0.0
        record = record_of(session, self._routing.deliveries.deadlines.left(session), max(0.0, left))
        request = AdoptSessionRequest(record=record, stream=session.stream)
        pause = 0.0
        while True:
            try:
                return (await self._peers.adopt(node, request)).ticket
            except Failed as error:
                refusal = error
            log.info("session_not_adopted", session=session.id, by=node.hostname, reason=str(refusal))
            if not pause and refusal.reason == ErrorReason.ERROR_REASON_NOT_SERVING:
                return None  # it has done nothing, nor had it before
            try:
                if await self._binding.keep(session):
                    return None
                if refusal.reason == ErrorReason.ERROR_REASON_STALE_EPOCH:
                    raise _Lost("its row is neither router's")
                if not self._is_alive(node):
                    if not await self._binding.take_back(session, node.incarnation):
                        raise _Lost("the router that has taken it is gone")
                    rest_first(session, self._routing.deliveries, self._spawn, lambda: False)
                    return None
            except DatabaseAway:
                pause = RETRY
            await asyncio.sleep(pause)
            pause = RETRY

    def is_settled(self, session: Session) -> bool:
        """Whether nobody else is just taking a session."""
        return session.id not in self._unsettled

    async def settled(self, session: Session) -> None:
        """Waits until it is known whether a session is this router's or another one's."""
        unsettled = self._unsettled.get(session.id)
        if unsettled is not None:
            await asyncio.shield(unsettled)

    def _give(self, session: Session, node: Node, link: ConnectorLink | None, ticket: bytes) -> None:
        """It is the other router's now."""
        kept = self._routing.deliveries.kept(session)
        self._sessions.remove(session)
        session.link = None
        if link is not None:
            link.release(session)
            moved = link.command(session.stream).moved
            moved.router_incarnation = node.incarnation
            moved.view_version = self._view.version
            moved.ticket = ticket
        elif session.waits is not None:
            session.waits.cancel()
        if session.holder is not None:
            session.holder.forget(session)
            session.holder = None
        self._routing.deliveries.deadlines.ended(session)
        self._routing.strategy.session_closed(session.account, session.jid.resource)
        for handler in self._hooks.session_left:
            handler(session)
        self.given += 1
        self._spawn(self._give_rest(session, node, kept), "give what came for a session")
        log.debug("session_moved", session=session.id, account=session.account, to=node.hostname)

    async def _give_rest(self, session: Session, node: Node, kept: list[Envelope]) -> None:
        """Gives the other router what came for the session while it was frozen."""
        self.owed += 1
        try:
            for given, held in _portions(kept):
                more = given + len(held) < len(kept)
                note = SessionGiven(session=session.id, held=held, more=more)
                if not await self._tell(node, session.account, note):
                    # The session has ended there, or with the router.
                    self.send_on(session, kept[given:])
                    return
        finally:
            self.owed -= 1

    async def _tell(self, node: Node, account: str, note: SessionGiven) -> bool:
        """Whether another router has taken a note, and has the session; tries as long as it lives."""
        item = Item(("", account), account, "", (GIVEN, note.SerializeToString()), Mode.NOTE)
        while self._is_alive(node):
            told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            answers = self._routing.forwarder.ask((node.incarnation,), item, partial(told.set_result, None))
            await told
            if answers:
                return answers[0] != GONE
            await asyncio.sleep(RETRY)  # their link was full
        return False

    def send_on(self, session: Session, kept: Iterable[Envelope]) -> None:
        """What waited for a session that is no more goes on: a message to the other sessions of the account or into
        the store, the request in an IQ back as an error. By its number nobody gets it twice. An answer is for nobody
        else: a new session of that name has not asked."""
        lane = Lane(self._spawn)
        for envelope in kept:
            if envelope.kind == MESSAGE:
                envelope.to_jid = session.account
            elif envelope.kind != IQ or envelope.type not in REQUESTS or not envelope.from_jid:
                continue
            lane.run(self._routing.route, envelope)

    def _stay(self, session: Session, link: ConnectorLink | None, stream: int) -> None:
        """The move did not come about; all goes on as before. The connector is told in any case: it may hold back the
        end of the stream, which may have lost the session to another one meanwhile."""
        frozen, session.frozen = session.frozen, None
        for envelope in frozen or ():
            self._routing.deliveries.deliver(session, envelope)
        if link is not None:
            link.command(stream).moved.SetInParent()


def _portions(kept: list[Envelope]) -> Iterator[tuple[int, list[Envelope]]]:
    """Stanzas in portions for one note each, at least one; and how many go before each."""
    start = size = 0
    for index, envelope in enumerate(kept):
        size += len(envelope.stanza)
        if size > GIVEN_BYTES and index > start:
            yield start, kept[start:index]
            start, size = index, len(envelope.stanza)
    yield start, kept[start:]
