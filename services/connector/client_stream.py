"""A client stream at its connector: between a transport's bytes and a router's link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from services.connector.limits import ClientLimits
from services.connector.negotiation_events import tell
from services.connector.rate import Rate
from services.connector.relocation import Relocation, SentOn
from services.connector.session_copy import Sent, SessionCopy
from tidings.api.router.v1.router_pb2 import (
    SessionAttached,
    SessionBound,
    StreamCommand,
    StreamEvent,
    TlsInfo,
    Transport,
)
from tidings.kit.link import Overflow
from tidings.kit.logging import get_logger
from tidings.kit.module import KINDS, NONZA
from tidings.xmpp.errors import SaslError, StreamError
from tidings.xmpp.events import (
    NonzaReceived,
    StanzaReceived,
    StartTls,
    StreamEnded,
    StreamOpened,
)
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream import ServerStream
from tidings.xmpp.stream_management import ENABLE

if TYPE_CHECKING:
    from services.connector.router_link import RouterLink
    from services.connector.streams import Streams

log = get_logger("connector")

# Stanzas of one read, beyond which a client waits for a turn of the loop, so that those of others come in between.
TURN = 8


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
        "_auth_timer", "_connection", "_core", "_header", "_held_by_rate", "_held_by_router", "_limits", "_loop",
        "_rate", "_tls_info", "_unread", "account", "copy", "ended", "jid", "link", "number", "relocation", "sent_on",
        "session", "streams", "transport_kind",
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
        self.streams = streams
        self.number = number
        self._connection = connection
        self._core = core
        self._limits = limits
        self._tls_info = tls_info
        self.transport_kind = transport_kind
        self._loop = asyncio.get_running_loop()
        # The router that serves this stream, from its first header on.
        self.link: RouterLink | None = None
        self.session = ""
        self.jid = ""
        self.account = ""
        self.ended = False
        self._held_by_rate = False
        self._held_by_router = False
        # What came while the router takes nothing more; it waits as it came, and no more is read.
        self._unread: list[bytes] = []
        # While it is not settled which router gets what comes of the stream.
        self.relocation: Relocation | None = None
        # While a router that it was sent on to has not answered.
        self.sent_on: SentOn | None = None
        # The copy of its session, where the router is in another process.
        self.copy: SessionCopy | None = None
        # Of the last stream header: host, language, whether encrypted.
        self._header = ("", "", False)
        self._rate = Rate(limits)
        self._auth_timer: asyncio.TimerHandle | None = None
        if limits.auth_timeout:
            self._auth_timer = self._loop.call_later(limits.auth_timeout, self._auth_took_too_long)

    # --- from the transport ---

    def received(self, data: bytes) -> None:
        """Takes bytes of the client."""
        if self.ended:
            return
        if self.relocation is not None:
            self.relocation.waiting += [*self._take_unread(), data]
            return
        if self._held_by_router or (self.link is not None and self.link.congested):
            self._unread.append(data)
            self.set_reading()
            return
        try:
            self._received(data)
        except Overflow:
            log.error("router_does_not_take", jid=self.jid)
            self._connection.abort()

    def _received(self, data: bytes) -> None:
        events = self._core.receive_data(data)
        session = self.session
        link = self.link
        copy = self.copy
        stanzas = 0
        for event in events:
            # A stanza of a bound session first: that is what nearly all events are.
            if type(event) is StanzaReceived and session and link is not None:
                stanzas += 1
                element = event.element
                attrs = element.attrs
                raw = event.stamped
                sent = Sent(
                    KINDS[element.name], attrs.get("type", ""), attrs.get("id", ""), attrs.get("to", ""),
                    element.children, raw,
                )  # fmt: skip
                if copy is not None:
                    copy.sent(sent)
                link.send(session, sent)
            elif type(event) is NonzaReceived and session and link is not None:
                element = event.element
                sent = Sent(NONZA, element.name, element.attrs.get("h", ""), "", [], element.raw)
                if copy is not None and element.name == ENABLE:
                    # What else there is may be lost: the client says it again, or is told without asking.
                    copy.sent(sent)
                link.send(session, sent)
            else:
                self._event(event)
                session = self.session
                link = self.link
                copy = self.copy
        until = self._rate.count(self._loop.time(), len(data), stanzas)
        if until and not self._held_by_rate:
            self._held_by_rate = True
            self.streams.slowed += 1
            self.set_reading()
            self._loop.call_at(until, self._rate_over)
        elif stanzas > TURN and not self._held_by_rate:
            self._held_by_rate = True
            self.set_reading()
            self._loop.call_soon(self._rate_over)
        if link is not None and link.congested:
            # The router does not take what we send: no more is read, until it does.
            self.set_reading()
        self._flush()

    def _rate_over(self) -> None:
        self._held_by_rate = False
        self.set_reading()

    def set_reading(self) -> None:
        """Reads the client, or does not, as things are now."""
        if not self.ended:
            congested = self.link is not None and self.link.congested
            if congested and self.link is not None:
                self.link.held[self] = None
            held = self._held_by_rate or self._held_by_router or self.relocation is not None
            self._connection.set_reading(not (held or congested))

    def tls_started(self) -> None:
        self._core.tls_started()

    def disconnected(self, reason: str) -> None:
        """The transport is gone."""
        if self.relocation is not None and self.session:
            # What the client has sent before counts, at the router that gets it.
            self.relocation.waiting += self._take_unread()
            self.relocation.left = self.relocation.left or (False, reason)
        else:
            try:
                for data in self._take_unread():
                    self._received(data)
            except Overflow:
                pass  # it has been told of none of that
            self._end(False, reason)

    def _go_on_reading(self) -> None:
        for data in self._take_unread():
            self.received(data)
        self.set_reading()

    def _take_unread(self) -> list[bytes]:
        unread, self._unread = self._unread, []
        return unread

    # --- what the core makes of it ---

    def _event(self, event: Any) -> None:
        kind = type(event)
        if kind is StreamOpened:
            self._opened(event)
        elif kind is StartTls:
            self._flush()
            self.streams.spawn(self._connection.start_tls(self._core.host), f"starttls of stream {self.number}")
        elif kind is StreamEnded:
            self._flush()
            error: StreamError | None = event.error
            self._end(error is None, "closed by the client" if error is None else error.condition)
            self._connection.close()
        elif (to_router := self._to_router()) is not None:
            tell(to_router, event)

    def _to_router(self) -> StreamEvent | None:
        return self.link.event(self.number) if self.link is not None else None

    def _opened(self, event: StreamOpened) -> None:
        if self.link is None:
            self.link = self.streams.choose(self)
            if self.link is None:
                # No router to be had: the client should try again, perhaps at another connector.
                self.close("internal-server-error", "no router is in reach; try again in a moment")
                return
        self._header = (event.host, event.lang, event.tls)
        self.tell_opened(b"")

    def tell_opened(self, ticket: bytes) -> None:
        """Tells the router of the last stream header."""
        assert self.link is not None
        opened = self.link.event(self.number).opened
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
        if self.sent_on is not None:
            self.sent_on.answered()
        if which == "moved":
            self.relocate().moved(command.moved)
            return
        if which == "attached":
            self._attached(command.attached)
            return
        if which == "state":
            if self.copy is not None:
                self.copy.state(command.state)
            return
        if which == "close" and self.relocation is not None and self.relocation.reattaching:
            self.relocation.refused(command.close.text)
            return
        if self.ended:
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
            self._bound(command.session_bound)
        elif which == "set_reading":
            self._held_by_router = not command.set_reading.reading
            self._go_on_reading()
        elif which == "prepare_move":
            self.relocate()
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
        self._flush()
        if not self.session or which == "session_bound":
            # What the client sent ahead of the answer has waited for it.
            self.received(b"")

    def _bound(self, bound: SessionBound) -> None:
        self.session = bound.session
        self.jid = bound.jid
        self.streams.bound(self)
        if bound.HasField("record") and self.link is not None:
            self.copy = SessionCopy.of(self.link.node.incarnation, bound)
        self._core.bound(Jid.parse(bound.jid), bound.reply)

    def _attached(self, attached: SessionAttached) -> None:
        """The router serves the session of this stream. It needs no other copy here, if it has asked for one."""
        self.streams.copies.forget(self.session)
        if not attached.HasField("record"):
            if self.relocation is not None:
                self.relocation.attached(attached)
            elif self.copy is not None and not self.copy.is_whole:
                self.copy = None  # there is to be none
        elif self.copy is not None:
            self.copy.begin(attached.record, attached.ticket)

    def relocate(self) -> Relocation:
        if self.relocation is None:
            self.relocation = Relocation(self)
            self.set_reading()
        return self.relocation

    def surrender(self, link: RouterLink) -> None:
        """The session's router does not answer: this one takes it over."""
        if self.copy is not None and self.copy.is_whole and not self.ended and self.relocation is None:
            self._held_by_router = False
            self.relocate().surrender(link)

    def deliver(self, raw: bytes) -> None:
        """Writes an element to the client."""
        if self.ended:
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
        if self.ended:
            return
        self._flush()
        self._end(False, "the connector drains")
        self._connection.close()

    def close(self, condition: str = "", text: str = "", condition_text: str = "", application: bytes = b"") -> None:
        """Ends the stream from our side: an error if there is a condition, then the closing tag."""
        if self.ended:
            return
        error = StreamError(condition, text, content=condition_text, application=application) if condition else None
        self._core.close(error)
        self._flush()
        self._end(False, condition or "closed by the server")
        # RFC 6120 4.4: the client may still answer with its own closing tag; it gets a moment.
        self._connection.close()

    def drain(self, elsewhere: str) -> None:
        """The connector takes its leave: a client without a session is sent to another one."""
        if self.relocation is not None and self.session:
            self.relocation.drains = elsewhere
        elif self.session and (to_router := self._to_router()) is not None:
            # The router closes it, behind all that is on its way to this client.
            to_router.leaving.SetInParent()
        elif self.session or not elsewhere:
            self.close("system-shutdown")
        else:
            self.close("see-other-host", condition_text=elsewhere)

    def refuse(self) -> None:
        """Turns a connection away that has only just been made: its address has too many."""
        self.ended = True
        self._authenticated()
        # RFC 6120 4.9.3.17; a header of ours goes before it (4.9.1.2).
        self._core.close(StreamError("resource-constraint", "too many connections from this address"))
        self._flush()
        self._connection.close()

    def superseded(self) -> None:
        """Another stream has its session: where to go with this one, and what was to be told there, is settled."""
        left = self.relocation.left if self.relocation is not None else None
        self.relocation = self.copy = None
        self.tell_end(*(left or (False, "another stream has its session")))
        self._connection.close()

    def router_lost(self, gone: bool) -> None:
        """The link to the router is over. Where the router is gone, a session of which there is a copy goes on at
        another one; any other stream ends."""
        router, self.link = (self.link.node.incarnation if self.link is not None else ""), None
        left = self.relocation.left if self.relocation is not None else None
        if gone and self.copy is not None and self.copy.is_whole and (not self.ended or left is not None):
            self._held_by_router = False
            self.relocate().lost(router)
            return
        self.relocation = None
        if gone and self.sent_on is not None and not self.ended:
            self.sent_on.lost(router)
            return
        if left is not None:
            self.tell_end(*left)
        self.close("system-shutdown", "the router that served this stream is gone; please connect again")

    def router_relieved(self) -> None:
        self._go_on_reading()

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
        if self.ended:
            return
        self.ended = True
        self._authenticated()
        if self.relocation is not None and self.session:
            # Which router is to be told is not settled.
            self.relocation.left = self.relocation.left or (clean, reason)
        else:
            self.tell_end(clean, reason)

    def tell_end(self, clean: bool, reason: str) -> None:
        """The stream has ended, and its router is told."""
        self.ended = True
        if self.sent_on is not None:
            self.sent_on.answered()
        copy, self.copy = self.copy, None
        if copy is not None and copy.resumable and not clean:
            # The session waits for its client, at its router; its copy waits here.
            self.streams.copies.keep(self.session, copy)
        if self.link is not None:
            closed = self.link.event(self.number).closed
            closed.clean = clean
            closed.reason = reason
        self.streams.remove(self, reason)
        self.link = None
        # Not at once: this may be called while the parser is at work.
        self._loop.call_soon(self._core.release)

    # --- what others see of it ---

    @property
    def has_left(self) -> bool:
        """Whether its client has gone, or was sent away, and no router knows yet: it is between two."""
        return self.relocation is not None and self.relocation.left is not None

    @property
    def encrypted(self) -> bool:
        return self._tls_info() is not None

    @property
    def peer(self) -> tuple[str, int]:
        return self._connection.peer

    def send_queue_bytes(self) -> int:
        return 0 if self.ended else self._connection.send_queue_bytes()
