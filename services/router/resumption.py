"""XEP-0198 5: a session waits for its client when its stream breaks, and goes on with another one.

The stream may come to any connector and any router; whichever router has the session is found by the table, and the
stream is sent on to it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from services.router.held import own_copy
from services.router.sessions import Session, Sessions
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.xmpp.errors import StanzaError, StreamError
from tidings.xmpp.parser import parse_stanza
from tidings.xmpp.stream_management import TooHigh, count_of, failed, resumed

if TYPE_CHECKING:
    from services.router.acknowledgements import Acknowledgements
    from services.router.connector_link import ConnectorLink
    from services.router.hand_over import HandOver
    from services.router.negotiation import Negotiation
    from services.router.safety import Safety
    from services.router.store import SessionTable

log = get_logger("router")

# Seconds until it is looked again whether the database is back.
AGAIN = 1.0
# Seconds that the router of a session may take to answer before its copy is asked for (DESIGN 7); seconds for that
# one to come; and between two looks.
SILENCE = 2.0
TAKE_OVER_TIMEOUT = 8.0
LOOK = 0.05
# Seconds between two looks of a stream that may not be sent on any more.
PAUSE = 0.5
# Seconds for the database to say whether a session is still this router's.
ASK_TIMEOUT = 1.0
# Sessions that are over whose clients may still ask how much was handled (5: `h` in <failed/>).
MAX_OVER = 10_000


class Resumption:
    """The sessions of one router that wait, and the streams that want to go on with one."""

    def __init__(
        self,
        own: str,
        sessions: Sessions,
        table: SessionTable,
        safety: Safety,
        acknowledgements: Acknowledgements,
        hand_over: HandOver,
        is_reachable: Callable[[Session], Awaitable[bool]],
        spawn: Callable[[Any, str], Any],
    ) -> None:
        """`is_reachable`: whether the database answers; while it does not, no time passes for those who wait."""
        self._own = own
        self._sessions = sessions
        self._table = table
        self._safety = safety
        self._acknowledgements = acknowledgements
        self._hand_over = hand_over
        self._is_reachable = is_reachable
        self._spawn = spawn
        # Of sessions that are over: the account, and what was handled.
        self._over: OrderedDict[str, tuple[str, int]] = OrderedDict()
        # Ends a session.
        self.end: Callable[[Session], Awaitable[None]] = _nothing
        # Waits until a session that comes from another router is whole, and tells that a session has a stream again.
        self.whole: Callable[[Session], Awaitable[None]] = _nothing
        self.attached: Callable[[Session], None] = lambda _session: None
        # Sends a stream to the router of its session.
        self.send_on: Callable[[Negotiation, str, Envelope], bool] = lambda _stream, _router, _request: False
        # Sees to it that another connector holds a copy of a session.
        self.cover: Callable[[Session], None] = lambda _session: None
        # Sees to it that older copies of a session count no more, when a connector has the good one.
        self.outdate: Callable[[Session, ConnectorLink], None] = lambda _session, _link: None
        # Whether a router answers within so many seconds; asks for the copy of a session.
        self.answers: Callable[[str, float], Awaitable[bool]] = _yes
        self.surrender: Callable[[str, str], None] = lambda _session, _router: None
        # Total, for metrics.
        self.resumed = 0
        self.refused = 0

    # --- sessions that wait ---

    def suspend(self, session: Session) -> None:
        """Its stream has broken, and it may be resumed."""
        link = session.link
        if link is not None:
            link.unbound(session)
        session.link = None
        session.stream = 0
        session.asks = False
        session.lane.on_long = session.lane.on_short = None
        # What comes in a batch keeps all of it in memory.
        session.outbound.queue = deque(
            (number, own_copy(what) if isinstance(what, Envelope) else what)
            for number, what in session.outbound.queue
        )
        self.wait(session, session.resume_seconds)
        self.cover(session)
        log.debug("session_suspended", session=session.id, account=session.account, seconds=session.resume_seconds)

    def wait(self, session: Session, seconds: float) -> None:
        """Ends a session after a while, if its client has not come back till then."""
        session.waits = asyncio.get_running_loop().call_later(
            seconds, lambda: self._spawn(self._waited(session), "a session whose time is over")
        )

    async def _waited(self, session: Session) -> None:
        if not await self._is_reachable(session):
            # Nobody can log in, nor resume elsewhere: that is not the client's fault.
            self.wait(session, AGAIN)
        elif session.link is None and not session.closed:
            log.debug("session_timed_out", session=session.id, account=session.account)
            # Whoever comes too late now finds it closed.
            session.closed = True
            await self.end(session)

    def stop(self) -> None:
        """No session ends any more for want of a client."""
        for session in self._sessions:
            _stop_waiting(session)

    def ended(self, session: Session) -> None:
        _stop_waiting(session)
        if session.resume_seconds:
            self._over[session.id] = (session.account, session.inbound.h)
            if len(self._over) > MAX_OVER:
                self._over.popitem(last=False)

    async def surrendered(self, session: Session) -> None:
        """Its copy was given to another router, which can't reach this one. It ends here when that one has it: its
        row must not be removed before."""
        with suppress(TimeoutError):
            async with asyncio.timeout(TAKE_OVER_TIMEOUT):
                while self._sessions.get(session.id) is session and await self._is_ours(session):  # noqa: ASYNC110
                    await asyncio.sleep(LOOK)
        await self.end(session)

    # --- streams that resume ---

    async def resume(self, stream: Negotiation, request: Envelope) -> None:
        """Answers <resume/> on a stream that is authenticated and not bound."""
        try:
            attributes = parse_stanza(request.stanza).attrs
            id_, h = attributes.get("previd", ""), count_of(attributes.get("h", ""))
            ends = asyncio.get_running_loop().time() + TAKE_OVER_TIMEOUT
            # One that comes here may go on to another router at once, before it is found.
            while (session := await self._found(stream, id_)) is None:
                router = await self._elsewhere(stream, id_, ends)
                if (router and self.send_on(stream, router, request)) or not stream.link.has(stream):
                    return
                if asyncio.get_running_loop().time() > ends:
                    raise StanzaError("item-not-found")
                if router:
                    # The stream has come far enough. The session may be on its way here, or to a router that is seen.
                    await asyncio.sleep(PAUSE)
            if stream.link.has(stream):
                self._go_on(stream, session, h)
        except StreamError as error:
            application = error.application if isinstance(error, TooHigh) else b""
            stream.link.close(stream.number, error.condition, error.text, application)
        except DatabaseAway:
            self._refuse(stream, "resource-constraint", "")
        except StanzaError as error:
            self._refuse(stream, error.condition, id_ if error.condition == "item-not-found" else "")
        except Exception:
            log.exception("resumption_failed", account=str(stream.account))
            self._refuse(stream, "internal-server-error", "")

    def _refuse(self, stream: Negotiation, condition: str, id_: str) -> None:
        """5: the client may bind now, as if nothing had been."""
        self.refused += 1
        account, h = self._over.get(id_, ("", 0))
        known = bool(id_) and account == str(stream.account)
        stream.link.command(stream.number).element = failed(condition, h if known else None)

    async def _found(self, stream: Negotiation, id_: str) -> Session | None:
        """The session, if it is here. Raises StanzaError when it is not this account's, or may not be resumed."""
        while (session := self._sessions.get(id_)) is not None:
            await self._hand_over.settled(session)
            await self.whole(session)
            await self._dealt_with_again(session)
            if session.account != str(stream.account) or not session.resume_seconds:
                raise StanzaError("item-not-found")
            if session.closed:
                return None
            ours = await self._is_ours(session)
            if self._sessions.get(id_) is not session or not self._hand_over.is_settled(session):
                continue  # it began to go to another router meanwhile
            if session.closed:
                return None
            if ours:
                return session
            session.closed = True
            await self.end(session)
        return None

    async def _dealt_with_again(self, session: Session) -> None:
        """Waits, not for long, until what was taken over from a router that is gone is safe: that one may have told a
        higher `h` than its copy knows of."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SILENCE):
                while session.doubtful and session.link is None and session.inbound.is_behind:  # noqa: ASYNC110
                    await asyncio.sleep(LOOK)

    async def _is_ours(self, session: Session) -> bool:
        """Whether another router has not taken the session over meanwhile, that could not reach this one. While the
        database does not answer nobody can: then the client does not wait for it."""
        asked = self._spawn(self._ask_whose(session), "whose session it is")
        await asyncio.wait({asked}, timeout=ASK_TIMEOUT)
        return asked.result() if asked.done() else True

    async def _ask_whose(self, session: Session) -> bool:
        try:
            rows = await self._table.of_account(session.jid.bare)
        except DatabaseAway:
            return True
        return any(row.session == session.id and row.router == self._own for row in rows)

    async def _elsewhere(self, stream: Negotiation, id_: str, ends: float) -> str:
        """The other router that has it, and that answers; '' when it has come here, or there is none till then. The
        copy of a session whose router is gone, or does not answer, is asked for. Raises StanzaError when it is over,
        DatabaseAway."""
        assert stream.account is not None
        asked = ""
        while asyncio.get_running_loop().time() < ends:
            row = next((row for row in await self._table.of_account(stream.account) if row.session == id_), None)
            if row is None:
                raise StanzaError("item-not-found")
            if row.router == self._own:
                # It may be coming from there just now.
                await self._sessions.arrived(str(stream.account), ends - asyncio.get_running_loop().time())
                session = self._sessions.get(id_)
                if session is not None and not session.closed:
                    return ""
                # It ends, or another router is taking it over, or has it by now.
            elif row.router != asked:
                if await self.answers(row.router, SILENCE):
                    return row.router
                log.info("session_asked_for", session=id_, account=str(stream.account), router=row.router)
                asked = row.router
                self.surrender(id_, asked)
            await asyncio.sleep(LOOK)
        return ""

    def _go_on(self, stream: Negotiation, session: Session, h: int) -> None:
        """5: what the client has not confirmed is sent again, behind <resumed/>. Raises TooHigh."""
        self._safety.acknowledged(session, session.outbound.acknowledge(h))
        before, old_copies = session.link, session.old_copies
        if before is not None:
            # Its end first: what the connector is to forget then is the copy that it keeps of a broken stream.
            before.close(session.stream, "conflict", "resumed by another connection")
            before.unbound(session)
            before.give_up(session)
        _stop_waiting(session)
        link = stream.link
        session.link, session.stream, session.connector = link, stream.number, link.incarnation
        session.asks = False
        stream.session = session
        session.inbound.resume()
        link.bound(session, resumed(session.id, session.inbound.h))
        for number, what in session.outbound.queue:
            if isinstance(what, Envelope):
                link.deliver(session, what, number)
        if session.outbound.queue:
            self._acknowledgements.ask(session)
        if old_copies:
            self.outdate(session, link)
        self.resumed += 1
        log.debug("session_resumed", session=session.id, account=session.account)
        self.attached(session)


def _stop_waiting(session: Session) -> None:
    if session.waits is not None:
        session.waits.cancel()
        session.waits = None


async def _nothing(_session: Session) -> None: ...


async def _yes(_router: str, _seconds: float) -> bool:
    return True
