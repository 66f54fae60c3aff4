"""What a stream goes through before it has a session: features, authentication, binding (RFC 6120 6, 7)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from services.router.adoption import tell
from services.router.authentication import Authentication, Exchange, Success
from services.router.binding import TOLD_TIMEOUT
from services.router.hand_over import MAX_MOVES
from services.router.sessions import Session, Sessions, new_id
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import SaslInitiate, StreamOpened
from tidings.kit.db import DatabaseAway
from tidings.kit.link import Lane
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ, KIND_NAMES, Hooks, Stanza
from tidings.xmpp import ns
from tidings.xmpp.errors import SaslError, StanzaError
from tidings.xmpp.jid import Jid, JidError
from tidings.xmpp.stanza import error_stanza, escape_text, iq_result
from tidings.xmpp.stream_management import ENABLE, FEATURE, RESUME, failed

if TYPE_CHECKING:
    from services.router.acknowledgements import Acknowledgements
    from services.router.adoption import Adoption
    from services.router.binding import Binding
    from services.router.connector_link import ConnectorLink
    from services.router.copies import Copies
    from services.router.hand_over import HandOver
    from services.router.reattachment import Reattachment
    from services.router.resumption import Resumption
    from services.router.routing import Routing
    from services.router.safety import Safety
    from services.router.store import AccountStore
    from services.router.tickets import Tickets
    from tidings.cluster.node import Node

log = get_logger("router")

BIND = f"{{{ns.BIND}}}bind"

# Sessions of one account at one time: stops a stolen or broken client from filling memory by binding on.
MAX_SESSIONS_PER_ACCOUNT = 100

_SPENT = StreamOpened()


class Negotiation:
    """The router's view of one stream."""

    __slots__ = ("account", "exchange", "info", "lane", "link", "moves", "number", "sent_by", "session")

    def __init__(self, link: ConnectorLink, number: int, lane: Lane) -> None:
        self.link = link
        self.number = number
        self.lane = lane
        # As the last stream header said.
        self.info = _SPENT
        # While SASL goes on.
        self.exchange: Exchange | None = None
        # Whom it authenticated as.
        self.account: Jid | None = None
        # How often another router has sent it on, and which one did last.
        self.moves = 0
        self.sent_by = ""
        self.session: Session | None = None


class Negotiator:
    """Leads streams to their sessions. One for each router.

    Its methods are steps of the stream's lane: they return None, or an awaitable that the lane waits for.
    """

    def __init__(
        self,
        own: str,
        routing: Routing,
        sessions: Sessions,
        hooks: Hooks,
        authentication: Authentication,
        accounts: AccountStore,
        binding: Binding,
        hand_over: HandOver,
        adoption: Adoption,
        tickets: Tickets,
        safety: Safety,
        acknowledgements: Acknowledgements,
        resumption: Resumption,
        copies: Copies,
        answers: Callable[[Node], Awaitable[bool]],
        spawn: Callable[[Any, str], Any],
    ) -> None:
        self._own = own
        self.routing = routing
        self.safety = safety
        self.acknowledgements = acknowledgements
        self.resumption = resumption
        self.copies = copies
        # Whether a router has said something of late, or does now.
        self._answers = answers
        self._binding = binding
        self.hand_over = hand_over
        self.adoption = adoption
        self._tickets = tickets
        self._sessions = sessions
        self._hooks = hooks
        self._authentication = authentication
        self._accounts = accounts
        self._spawn = spawn
        # Takes sessions over from connectors' copies; set by the router.
        self.reattachment: Reattachment = None  # type: ignore[assignment]
        # Sessions that are ending just now, and their full JIDs: what is set when who saw them has been told.
        self.ending: dict[str, asyncio.Event] = {}
        # All sessions are handed over: there are to be no new ones.
        self.drained = False
        # Waits, not for long, until all is written that is to be.
        self.written: Callable[[], Awaitable[object]] = _at_once

    # --- features ---

    def opened(self, stream: Negotiation, opened: StreamOpened) -> Awaitable[None] | None:
        """RFC 6120 4.3.2: what the stream may do next."""
        if self.drained:
            stream.link.close(stream.number, "system-shutdown", "the router stops; please connect again")
            return None
        stream.info = opened
        if opened.ticket:
            ticket = self._tickets.open(opened.ticket, stream.link.incarnation)
            if ticket is None or ticket.session:
                log.error("ticket_refused", connector=stream.link.name, stream=stream.number)
                stream.link.close(stream.number, "not-authorized")
                return None
            stream.account = Jid.parse(ticket.account)
            stream.moves, stream.sent_by = ticket.moves, ticket.router_incarnation
            if ticket.resume:
                # Another router has found that its session is here.
                return self.resumption.resume(stream, Envelope(stanza=ticket.resume))
        if stream.account is not None and stream.moves < MAX_MOVES:
            node = self.hand_over.target(str(stream.account))
            # Who drains sends all on, before others know.
            if node is not None and node.incarnation != stream.sent_by:
                return self._send_on(stream, node)
        self._show_features(stream)
        return None

    def _show_features(self, stream: Negotiation) -> None:
        opened = stream.info
        parts: list[bytes] = []
        authenticated = stream.account is not None
        if authenticated:
            parts.append(b"<bind xmlns='%b'/>" % ns.BIND.encode())
            parts.append(FEATURE)
        else:
            parts.append(self._authentication.features(opened))
        parts.extend(make(opened.host) for after, make in self._hooks.stream_features if after is authenticated)
        stream.link.command(stream.number).features.children = b"".join(parts)

    async def _send_on(self, stream: Negotiation, node: Node) -> None:
        """Another router keeps the sessions of this account: the stream goes there before it binds. Unless that one
        does not answer: then it is served here, and its session moves when all is well."""
        if await self._answers(node):
            self._send_to(stream, node.incarnation, b"")
        else:
            log.info("stream_not_sent_on", account=str(stream.account), router=node.hostname)
            self._show_features(stream)

    def send_to_session(self, stream: Negotiation, router: str, request: Envelope) -> bool:
        """Sends a stream that resumes on to the router of its session; False when it has come far enough."""
        if stream.moves >= MAX_MOVES or self.routing.forwarder.view.by_incarnation(router) is None:
            return False
        self._send_to(stream, router, request.stanza)
        return True

    def _send_to(self, stream: Negotiation, router: str, resume: bytes) -> None:
        account = str(stream.account)
        ticket = self._tickets.seal(
            stream.link.incarnation, account, moves=stream.moves + 1, resume=resume, router=self._own
        )
        stream.link.moved(stream.number, router, self.routing.forwarder.view.version, ticket)
        log.debug("stream_moved", account=account, to=router)

    # --- SASL ---

    def sasl_initiate(self, stream: Negotiation, initiate: SaslInitiate) -> Awaitable[None] | None:
        stream.exchange = None
        try:
            stream.exchange = self._authentication.begin(initiate.mechanism, stream.info)
        except SaslError as error:
            self._sasl_failed(stream, error)
            return None
        if not initiate.has_data:
            # RFC 6120 6.4.2: the mechanism wants a first message, and gets it in the next round.
            stream.link.command(stream.number).sasl_challenge.data = b""
            return None
        return self._sasl(stream, initiate.data)

    def sasl_response(self, stream: Negotiation, data: bytes) -> Awaitable[None]:
        return self._sasl(stream, data)

    def sasl_abort(self, stream: Negotiation) -> None:
        """RFC 6120 6.4.4."""
        stream.exchange = None
        self._sasl_failed(stream, SaslError("aborted"))

    async def _sasl(self, stream: Negotiation, data: bytes) -> None:
        try:
            if stream.exchange is None:
                raise SaslError("malformed-request", "no exchange is going on")
            answer = await stream.exchange.step(data)
        except SaslError as error:
            stream.exchange = None
            self._sasl_failed(stream, error)
        except DatabaseAway:
            stream.exchange = None
            self._sasl_failed(stream, SaslError("temporary-auth-failure", "try again in a moment"))
        except Exception:
            stream.exchange = None
            log.exception("authentication_broke", stream=stream.number)
            self._sasl_failed(stream, SaslError("temporary-auth-failure"))
        else:
            if isinstance(answer, Success):
                stream.exchange = None
                stream.account = answer.account
                success = stream.link.command(stream.number).sasl_success
                success.account = str(answer.account)
                if answer.data is not None:
                    success.has_data = True
                    success.data = answer.data
            else:
                stream.link.command(stream.number).sasl_challenge.data = answer

    def _sasl_failed(self, stream: Negotiation, error: SaslError) -> None:
        log.info(
            "authentication_failed",
            condition=error.condition, reason=error.text, remote=stream.info.remote_address,
        )  # fmt: skip
        failure = stream.link.command(stream.number).sasl_failure
        failure.condition = error.condition
        # Never the text: it could tell an unknown name from a wrong password.

    # --- stanzas before there is a session ---

    def stanza(self, stream: Negotiation, envelope: Envelope) -> Awaitable[None] | None:
        if stream.session is not None:
            # What a client sends ahead of the answer that binds it waits there.
            log.error("not_due", connector=stream.link.name, session=stream.session.id)
            stream.link.close(stream.number, "internal-server-error", "the server has lost track of this stream")
            return None
        if envelope.kind not in KIND_NAMES:
            return self._nonza(stream, envelope)
        if envelope.kind != IQ:
            stream.link.close(stream.number, "not-authorized")
            return None
        return self._request(stream, envelope)

    def _nonza(self, stream: Negotiation, envelope: Envelope) -> Awaitable[None] | None:
        if stream.account is not None and envelope.type == RESUME:
            return self.resumption.resume(stream, envelope)
        elif stream.account is not None and envelope.type == ENABLE:
            # XEP-0198 3: not before there is a session.
            stream.link.command(stream.number).element = failed("unexpected-request")
        else:
            # RFC 6120 4.9.3.24.
            stream.link.close(stream.number, "unsupported-stanza-type")
        return None

    async def _request(self, stream: Negotiation, envelope: Envelope) -> None:
        try:
            if envelope.type not in ("get", "set") or len(envelope.children) != 1 or not envelope.id:
                raise StanzaError("bad-request")
            if envelope.to_jid and Jid.parse(envelope.to_jid) not in self._own_addresses(stream):
                # RFC 6120 7.1: nothing for others before the stream is bound.
                stream.link.close(stream.number, "not-authorized")
                return
            payload = envelope.children[0]
            if stream.account is not None and (envelope.type, payload) == ("set", BIND):
                await self._bind(stream, Stanza(envelope))
                return
            answer = self._hooks.early_iq.get((envelope.type, payload))
            if answer is None or stream.account is not None:
                stream.link.close(stream.number, "not-authorized")
                return
            result = answer(Stanza(envelope), stream.info.host)
            body = await result if inspect.isawaitable(result) else result
            stream.link.command(stream.number).element = iq_result(envelope.id, "", envelope.to_jid, body)
        except (StanzaError, JidError, DatabaseAway) as error:
            self._refuse(stream, envelope, error)
        except Exception:
            log.exception("request_failed", payload=list(envelope.children))
            self._refuse(stream, envelope, StanzaError("internal-server-error"))

    def _own_addresses(self, stream: Negotiation) -> tuple[Jid, ...]:
        server = Jid("", stream.info.host, "")
        return (server,) if stream.account is None else (server, stream.account)

    def _refuse(self, stream: Negotiation, envelope: Envelope, error: Exception) -> None:
        if isinstance(error, DatabaseAway):
            error = StanzaError("resource-constraint", "the server's storage does not answer", type="wait")
        elif isinstance(error, JidError):
            error = StanzaError("jid-malformed")
        assert isinstance(error, StanzaError)
        stream.link.command(stream.number).element = error_stanza(
            KIND_NAMES[envelope.kind], envelope.id, error, from_=envelope.to_jid, to=""
        )

    # --- binding (RFC 6120 7) ---

    async def _bind(self, stream: Negotiation, request: Stanza) -> None:
        account = stream.account
        assert account is not None
        wanted = request.payload.findtext(f"{{{ns.BIND}}}resource") or ""
        jid = account.with_resource(wanted or new_id())
        if len(self._sessions.of(str(account))) >= MAX_SESSIONS_PER_ACCOUNT:
            raise StanzaError("resource-constraint", "too many sessions of this account", type="wait")
        session = Session(jid, stream.info.lang, stream.link, stream.number, self._spawn)
        await self._binding.take(session, self.displace)
        await self.ended(session.jid_text)
        stale = self._sessions.of(session.account).get(jid.resource)
        if stale is not None:
            # Its row was taken from it without our noticing.
            await self.displace(stale)
        self._binding.bound(session)
        self._sessions.add(session)
        self.routing.deliveries.first_presence.settle(session)
        self.routing.strategy.session_opened(session.account, jid.resource)
        stream.session = session
        # With the message goes the whole batch that it came in.
        stream.info = _SPENT
        payload = b"<bind xmlns='%b'><jid>%b</jid></bind>" % (
            ns.BIND.encode(), escape_text(session.jid_text).encode(),
        )  # fmt: skip
        stream.link.bound(session, iq_result(request.id, "", "", payload))
        stream.link.when_copied(partial(self.routing.deliveries.first_presence.told, session))
        log.debug("session_bound", session=session.id, account=session.account)
        self.hand_over.place(session)
        if self._hooks.session_started:
            # What it sends from now on waits for this.
            session.lane.run(tell, self._hooks.session_started, session)

    def bind_abandoned(self, stream: Negotiation) -> Awaitable[None] | None:
        """The stream closed while a bind request may have waited in its lane."""
        return self.end(stream.session) if stream.session is not None else None

    # --- the end of a session ---

    async def end(self, session: Session) -> None:
        """Ends a session, once; who was told that it is available is told that it is not. What still waited for it
        goes elsewhere.

        When its row is another router's by now, that one says it, and this one nothing.
        """
        await self.hand_over.settled(session)
        await self.adoption.whole(session)
        if not self._sessions.remove(session):
            return
        told = self.ending[session.id] = self.ending[session.jid_text] = asyncio.Event()
        try:
            if session.link is not None:
                session.link.unbound(session)
                session.link = None
            if session.holder is not None:
                session.holder.forget(session)
                session.holder = None
            self.routing.deliveries.deadlines.ended(session)
            self.hand_over.ended(session)
            self.resumption.ended(session)
            kept = [
                *self.routing.deliveries.unconfirmed(session),
                *self.adoption.ended(session),
                *self.routing.deliveries.kept(session),
            ]
            self.routing.strategy.session_closed(session.account, session.jid.resource)
            self.hand_over.send_on(session, kept)
            if not await self._binding.give_up(session):
                for left in self._hooks.session_left:
                    left(session)
                return
            await self.routing.endings.tell(session, session.presence is not None)
        finally:
            for what in (session.id, session.jid_text):
                if self.ending.get(what) is told:
                    del self.ending[what]
            told.set()

    async def ended(self, what: str) -> bool:
        """Waits, not for long, if a session ends just now, until who saw it available has been told; whether it does.
        `what`: its id or its full JID."""
        told = self.ending.get(what)
        if told is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(told.wait(), TOLD_TIMEOUT)
        return told is not None

    async def leave(self, session: Session) -> None:
        """Its connector drains: what comes for the session from now on waits for the next one of its account."""
        self.routing.deliveries.hold(session)
        if not session.inbound.counts:
            await self.acknowledgements.confirmed(session)
        # Behind what it has sent.
        session.lane.run(self.dismiss, session)

    async def dismiss(self, session: Session) -> None:
        """The session ends, and then its stream, so that nothing is sent into the void."""
        await self.hand_over.settled(session)
        link = session.link
        await self.end(session)
        if link is not None:
            link.close(session.stream, "system-shutdown")

    async def displace(self, session: Session) -> None:
        """RFC 6120 7.7.2.2: the newcomer wins, so that a client whose old connection hangs gets in again."""
        log.info("resource_conflict", account=session.account)
        await self.close(session, "conflict", "replaced by a new connection")
        # What it was given and has not confirmed is stored by then: the newcomer finds it, before anything else.
        await self.written()

    async def close(self, session: Session, condition: str, text: str) -> None:
        """Ends a session and its stream, with an error."""
        await self.hand_over.settled(session)
        if session.link is not None:
            session.link.close(session.stream, condition, text)
        await self.end(session)

    async def remove(self, session: Session) -> None:
        """RFC 6120 4.9.3.12: its account is no more."""
        await self.close(session, "not-authorized", "the account was removed")

    async def delete_account(self, account: Jid) -> None:
        """Ends an account's sessions, wherever they are, removes what modules store for it, then the account itself.
        Raises DatabaseAway."""
        for session in list(self._sessions.of(str(account)).values()):
            await self.remove(session)
        await self._binding.end_elsewhere(account)
        for handler in self._hooks.account_deleted:
            result = handler(account)
            if result is not None:
                await result
        await self._accounts.delete(account.domain, account.local)
        log.info("account_deleted", account=str(account))


async def _at_once() -> None: ...
