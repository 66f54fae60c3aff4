"""A client stream at its connector: between a transport's bytes and a router's link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from services.connector.limits import ClientLimits
from services.connector.rate import Rate
from tidings.api.router.v1.router_pb2 import Moved, StreamCommand, StreamEvent, TlsInfo, Transport
from tidings.kit.link import Overflow
from tidings.kit.logging import get_logger
from tidings.kit.module import KINDS, NONZA
from tidings.xmpp.errors import SaslError, StreamError
from tidings.xmpp.events import (
    NonzaReceived,
    SaslAborted,
    SaslInitiated,
    SaslResponded,
    StanzaReceived,
    StartTls,
    StreamEnded,
    StreamOpened,
)
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream import ServerStream

if TYPE_CHECKING:
    from services.connector.router_link import RouterLink
    from services.connector.streams import Streams

log = get_logger("connector")


class Connection(Protocol):
    """What a stream needs of its transport."""

    def write(self, data: bytes) -> None: ...

    def set_reading(self, reading: bool) -> None: ...

    def send_queue_bytes(self) -> int: ...

    @property
    def slow(self) -> bool: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...

    async def start_tls(self, host: str) -> bool: ...

    @property
    def peer(self) -> tuple[str, int]: ...


class ClientStream:
    """One client stream: gives the client's bytes to the protocol core, and what comes of them to the router."""

    __slots__ = (
        "_auth_timer", "_connection", "_core", "_drains", "_ended", "_header", "_held_by_rate", "_held_by_router",
        "_left", "_limits", "_link", "_loop", "_moving", "_rate", "_streams", "_tls_info", "account", "jid", "number",
        "session", "transport_kind",
    )  # fmt: skip

    def __init__(
        self,
        streams: Streams,
        number: int,
        connection: Connection,
        core: ServerStream,
        limits: ClientLimits,
        tls_info: Callable[[], TlsInfo | None],
        transport_kind: Transport.ValueType = Transport.TRANSPORT_TCP,
    ) -> None:
        self._streams = streams
        self.number = number
        self._connection = connection
        self._core = core
        self._limits = limits
        self._tls_info = tls_info
        self.transport_kind = transport_kind
        self._loop = asyncio.get_running_loop()
        # The router that serves this stream, from its first header on.
        self._link: RouterLink | None = None
        self.session = ""
        self.jid = ""
        self.account = ""
        self._ended = False
        self._held_by_rate = False
        self._held_by_router = False
        # While the stream is on its way to another router: what the client sends; how the stream has ended since
        # (clean, and the reason); where the client is to go since this connector drains. Else None.
        self._moving: list[bytes] | None = None
        self._left: tuple[bool, str] | None = None
        self._drains: str | None = None
        # Of the last stream header: host, language, whether encrypted.
        self._header = ("", "", False)
        self._rate = Rate(limits)
        self._auth_timer: asyncio.TimerHandle | None = None
        if limits.auth_timeout:
            self._auth_timer = self._loop.call_later(limits.auth_timeout, self._auth_took_too_long)

    # --- from the transport ---

    def received(self, data: bytes) -> None:
        """Takes bytes of the client."""
        if self._ended:
            return
        if self._moving is not None:
            self._moving.append(data)
            return
        try:
            self._received(data)
        except Overflow:
            log.error("router_does_not_take", jid=self.jid)
            self._connection.abort()

    def _received(self, data: bytes) -> None:
        events = self._core.receive_data(data)
        session = self.session
        link = self._link
        stanzas = 0
        for event in events:
            # A stanza of a bound session first: that is what nearly all events are.
            if type(event) is StanzaReceived and session and link is not None:
                stanzas += 1
                element = event.element
                attrs = element.attrs
                raw = event.stamped
                link.outbox.begin(len(raw)).add(
                    origin=session,
                    kind=KINDS[element.name],
                    type=attrs.get("type", ""),
                    id=attrs.get("id", ""),
                    to_jid=attrs.get("to", ""),
                    children=element.children,
                    stanza=raw,
                )
            elif type(event) is NonzaReceived and session and link is not None:
                element = event.element
                link.outbox.begin(len(element.raw)).add(
                    origin=session, kind=NONZA, type=element.name, id=element.attrs.get("h", ""), stanza=element.raw
                )
            else:
                self._event(event)
                session = self.session
                link = self._link
        until = self._rate.count(self._loop.time(), len(data), stanzas)
        if until and not self._held_by_rate:
            self._held_by_rate = True
            self._streams.slowed += 1
            self._set_reading()
            self._loop.call_at(until, self._rate_over)
        if link is not None and link.congested:
            # The router does not take what we send: no more is read, until it does.
            self._set_reading()
        self._flush()

    def _rate_over(self) -> None:
        self._held_by_rate = False
        self._set_reading()

    def _set_reading(self) -> None:
        if not self._ended:
            congested = self._link is not None and self._link.congested
            held = self._held_by_rate or self._held_by_router or self._moving is not None
            self._connection.set_reading(not (held or congested))

    def tls_started(self) -> None:
        self._core.tls_started()

    def disconnected(self, reason: str) -> None:
        """The transport is gone."""
        if self._moving is not None and self.session:
            # What the client has sent before counts, at the router that gets it.
            self._left = self._left or (False, reason)
        else:
            self._end(False, reason)

    # --- what the core makes of it ---

    def _event(self, event: Any) -> None:
        kind = type(event)
        if kind is StreamOpened:
            self._opened(event)
        elif kind is StartTls:
            self._flush()
            self._streams.spawn(self._connection.start_tls(self._core.host), f"starttls of stream {self.number}")
        elif kind is SaslInitiated:
            if (to_router := self._to_router()) is not None:
                to_router.sasl_initiate.mechanism = event.mechanism
                to_router.sasl_initiate.has_data = event.data is not None
                to_router.sasl_initiate.data = event.data or b""
        elif kind is SaslResponded:
            if (to_router := self._to_router()) is not None:
                to_router.sasl_response.data = event.data
        elif kind is SaslAborted:
            if (to_router := self._to_router()) is not None:
                to_router.sasl_abort.SetInParent()
        elif kind is StanzaReceived or kind is NonzaReceived:
            if (to_router := self._to_router()) is not None:
                element = event.element
                stanza = to_router.stanza
                stanza.kind = KINDS.get(element.name, NONZA)
                stanza.type = element.attrs.get("type", "") if element.name in KINDS else element.name
                stanza.id = element.attrs.get("id" if element.name in KINDS else "h", "")
                stanza.to_jid = element.attrs.get("to", "")
                stanza.children.extend(element.children)
                stanza.stanza = element.raw if kind is NonzaReceived else event.stamped
        elif kind is StreamEnded:
            self._flush()
            error: StreamError | None = event.error
            self._end(error is None, "closed by the client" if error is None else error.condition)
            self._connection.close()

    def _to_router(self) -> StreamEvent | None:
        return self._link.event(self.number) if self._link is not None else None

    def _opened(self, event: StreamOpened) -> None:
        if self._link is None:
            self._link = self._streams.choose(self)
            if self._link is None:
                # No router to be had: the client should try again, perhaps at another connector.
                self.close("internal-server-error", "no router is in reach; try again in a moment")
                return
        self._header = (event.host, event.lang, event.tls)
        self._tell_opened(b"")

    def _tell_opened(self, ticket: bytes) -> None:
        """Tells the router of the last stream header."""
        assert self._link is not None
        opened = self._link.event(self.number).opened
        opened.ticket = ticket
        opened.host, opened.lang, encrypted = self._header
        opened.transport = self.transport_kind
        host, port = self._connection.peer
        opened.remote_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        opened.stream_id = self._core.id
        tls = self._tls_info() if encrypted else None
        if tls is not None:
            opened.tls.CopyFrom(tls)

    # --- from the router ---

    def command(self, command: StreamCommand) -> None:
        """Does what the router says."""
        which = command.WhichOneof("command")
        if which == "moved":
            self._moved(command.moved)
            return
        if self._ended:
            return
        if which == "features":
            self._core.features(command.features.children)
        elif which == "sasl_challenge":
            self._core.challenge(command.sasl_challenge.data)
        elif which == "sasl_success":
            success = command.sasl_success
            self.account = success.account
            self._authenticated()
            self._core.authenticated(success.data if success.has_data else None)
        elif which == "sasl_failure":
            failure = command.sasl_failure
            for event in self._core.refuse(SaslError(failure.condition, failure.text)):
                self._event(event)
        elif which == "element":
            self._core.send(command.element)
        elif which == "session_bound":
            bound = command.session_bound
            self.session = bound.session
            self.jid = bound.jid
            self._streams.bound(self)
            self._core.bound(Jid.parse(bound.jid), bound.reply)
        elif which == "set_reading":
            self._held_by_router = not command.set_reading.reading
            self._set_reading()
        elif which == "prepare_move":
            if self._moving is None:
                self._moving = []
            self._set_reading()
            if (to_router := self._to_router()) is not None:
                to_router.move_ready.attempt = command.prepare_move.attempt
            return
        elif which == "close":
            close = command.close
            if close.keep_session:
                self.abandon()
            else:
                self.close(close.condition, close.text, close.condition_text, close.application)
            return
        if not self.session:
            # What the client sent ahead of an answer has waited for it.
            for event in self._core.resume():
                self._event(event)
        self._flush()

    def _moved(self, moved: Moved) -> None:
        """The stream goes on at another router, or at the same one when the move did not come about."""
        if not moved.ticket:
            self._go_on()
            return
        # What it sent to the old one has been taken there; nothing more goes that way.
        if self._moving is None:
            self._moving = []
        self._link = None
        self._streams.spawn(self._move(moved), f"stream {self.number} goes to another router")

    async def _move(self, moved: Moved) -> None:
        self._link = await self._streams.link_to(moved.router_incarnation)
        if self._link is None:
            self.close("system-shutdown", "the router that serves this stream is out of reach")
        elif self.session:
            attach = self._link.event(self.number).attach
            attach.ticket, attach.left = moved.ticket, self._left is not None
        elif not self._ended:
            self._tell_opened(moved.ticket)
        self._go_on()

    def _go_on(self) -> None:
        """It is settled which router serves the stream: that one gets all that has waited."""
        waiting, self._moving = self._moving or [], None
        self._set_reading()
        for data in waiting:
            self.received(data)
        drains, self._drains = self._drains, None
        if self._left is not None:
            self._ended = True
            self._tell_end(*self._left)
        elif drains is not None:
            self.drain(drains)

    def deliver(self, raw: bytes) -> None:
        """Writes a stanza to the client."""
        if self._ended:
            return
        connection = self._connection
        connection.write(raw)
        if connection.slow:
            limit = self._limits.send_queue_bytes
            if limit and connection.send_queue_bytes() > limit:
                log.warning("client_does_not_read", jid=self.jid, bound=limit)
                self._end(False, "the client does not read what is sent to it")
                connection.abort()

    # --- the end ---

    def abandon(self) -> None:
        """Drops the connection without a closing tag, so that the client takes its session for one that waits for it
        (XEP-0198 5)."""
        if self._ended:
            return
        self._flush()
        self._end(False, "the connector drains")
        self._connection.close()

    def close(self, condition: str = "", text: str = "", condition_text: str = "", application: bytes = b"") -> None:
        """Ends the stream from our side: an error if there is a condition, then the closing tag."""
        if self._ended:
            return
        error = StreamError(condition, text, content=condition_text, application=application) if condition else None
        self._core.close(error)
        self._flush()
        self._end(False, condition or "closed by the server")
        # RFC 6120 4.4: the client may still answer with its own closing tag; it gets a moment.
        self._connection.close()

    def drain(self, elsewhere: str) -> None:
        """The connector takes its leave: a client without a session is sent to another one."""
        if self._moving is not None and self.session:
            self._drains = elsewhere
        elif self.session and (to_router := self._to_router()) is not None:
            # The router closes it, behind all that is on its way to this client.
            to_router.leaving.SetInParent()
        elif self.session or not elsewhere:
            self.close("system-shutdown")
        else:
            self.close("see-other-host", condition_text=elsewhere)

    def refuse(self) -> None:
        """Turns a connection away that has only just been made: its address has too many."""
        self._ended = True
        self._authenticated()
        # RFC 6120 4.9.3.17; a header of ours goes before it (4.9.1.2).
        self._core.close(StreamError("resource-constraint", "too many connections from this address"))
        self._flush()
        self._connection.close()

    def router_lost(self) -> None:
        """The link to the router is gone: this stream cannot go on."""
        self._link = self._moving = None
        if self._left is not None:
            self._ended = True
            self._tell_end(*self._left)
        self.close("system-shutdown", "the router that served this stream is gone; please connect again")

    def router_relieved(self) -> None:
        self._set_reading()

    def _auth_took_too_long(self) -> None:
        self._auth_timer = None
        self.close("connection-timeout", "authentication took too long")

    def _authenticated(self) -> None:
        if self._auth_timer is not None:
            self._auth_timer.cancel()
            self._auth_timer = None

    def _flush(self) -> None:
        data = self._core.data_to_send()
        if data:
            self._connection.write(data)

    def _end(self, clean: bool, reason: str) -> None:
        if self._ended:
            return
        self._ended = True
        self._authenticated()
        if self._moving is not None and self.session:
            # Which router is to be told is not settled.
            self._left = self._left or (clean, reason)
        else:
            self._tell_end(clean, reason)

    def _tell_end(self, clean: bool, reason: str) -> None:
        self._left = None
        if self._link is not None:
            closed = self._link.event(self.number).closed
            closed.clean = clean
            closed.reason = reason
        self._streams.remove(self, reason)
        self._link = None
        # Not at once: this may be called while the parser is at work.
        self._loop.call_soon(self._core.release)

    # --- what others see of it ---

    @property
    def link(self) -> RouterLink | None:
        return self._link

    @property
    def encrypted(self) -> bool:
        return self._tls_info() is not None

    @property
    def peer(self) -> tuple[str, int]:
        return self._connection.peer

    def send_queue_bytes(self) -> int:
        return 0 if self._ended else self._connection.send_queue_bytes()
