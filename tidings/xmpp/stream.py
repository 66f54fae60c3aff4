"""The server's side of a client stream: a table of states and inputs (RFC 6120 4 to 7).

Bytes of the client go in by `receive_data`, events come out; what the client must get collects in
`data_to_send`. Decisions that are not the protocol's (is the password right? what is the session's
address?) are asked for by events and answered by methods. On a violation the goodbye is queued first; then
the events end with StreamEnded.
"""

from __future__ import annotations

import binascii
import re
import secrets
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from enum import Enum, auto

from tidings.xmpp import ns
from tidings.xmpp.errors import SaslError, StreamError
from tidings.xmpp.events import (
    Event,
    NonzaReceived,
    SaslAborted,
    SaslInitiated,
    SaslResponded,
    StanzaReceived,
    StartTls,
    StreamEnded,
    StreamOpened,
)
from tidings.xmpp.framing.tcp import TcpFraming
from tidings.xmpp.jid import Jid, JidError
from tidings.xmpp.parser import Limits, Parsed, StreamFooter, StreamHeader
from tidings.xmpp.stanza import STANZAS, XML_LANG, Element, Stamp, to_tree

# RFC 6120 6.4.5 asks for two retries at least; more than a few are guesses at a password.
MAX_AUTH_FAILURES = 5

# RFC 5646 tags are short; what is longer is no language and is not repeated in every stanza.
_LANG = re.compile(r"[A-Za-z]{1,8}(?:-[A-Za-z0-9]{1,8}){0,6}")
_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")


class State(Enum):
    """Where the negotiation stands."""

    # A header is due: at the beginning, after TLS, after authentication.
    OPENING = auto()
    # The header was in order; TLS, authentication, or both are due.
    NEGOTIATING = auto()
    # <proceed/> is written; nothing is read until the transport is encrypted.
    STARTING_TLS = auto()
    # The router has a SASL message to judge; nothing is read until it has.
    JUDGING = auto()
    # A challenge is out.
    CHALLENGED = auto()
    # Authenticated; a new header is due.
    REOPENING = auto()
    # The header behind authentication was in order; nothing is read until the router has answered: perhaps another
    # router has to serve the stream, and then what the client sent ahead goes there.
    REOPENED = auto()
    # Authenticated, with features; a resource is to be bound.
    BINDING = auto()
    # The router has a request to judge; nothing is read until it has: behind it there may be a session, of which what
    # the client sent ahead is then.
    ASKED = auto()
    # There is a session.
    BOUND = auto()
    CLOSED = auto()


class Input(Enum):
    """What can happen: from the client, then from the owner."""

    HEADER = auto()
    STARTTLS = auto()
    AUTH = auto()
    RESPONSE = auto()
    ABORT = auto()
    STANZA = auto()
    NONZA = auto()
    FOOTER = auto()

    TLS_STARTED = auto()
    FEATURES = auto()
    CHALLENGE = auto()
    SUCCESS = auto()
    FAILURE = auto()
    ANSWER = auto()
    BOUND = auto()
    CLOSE = auto()


S, I = State, Input  # noqa: E741

# What may happen when, and the state after it. What is not here is an error, and closes the stream.
TRANSITIONS: dict[tuple[State, Input], State] = {
    (S.OPENING, I.HEADER): S.NEGOTIATING,
    (S.OPENING, I.TLS_STARTED): S.OPENING,
    (S.OPENING, I.FOOTER): S.CLOSED,
    (S.NEGOTIATING, I.STARTTLS): S.STARTING_TLS,
    (S.NEGOTIATING, I.AUTH): S.JUDGING,
    # Requests to the server before authentication (XEP-0077): the router decides on them.
    (S.NEGOTIATING, I.STANZA): S.NEGOTIATING,
    (S.NEGOTIATING, I.FOOTER): S.CLOSED,
    (S.STARTING_TLS, I.TLS_STARTED): S.OPENING,
    (S.JUDGING, I.CHALLENGE): S.CHALLENGED,
    (S.JUDGING, I.SUCCESS): S.REOPENING,
    (S.JUDGING, I.FAILURE): S.NEGOTIATING,
    (S.CHALLENGED, I.RESPONSE): S.JUDGING,
    (S.CHALLENGED, I.ABORT): S.JUDGING,
    (S.CHALLENGED, I.FOOTER): S.CLOSED,
    (S.REOPENING, I.HEADER): S.REOPENED,
    (S.REOPENING, I.FOOTER): S.CLOSED,
    (S.REOPENED, I.FEATURES): S.BINDING,
    (S.BINDING, I.STANZA): S.ASKED,
    (S.BINDING, I.NONZA): S.ASKED,
    (S.BINDING, I.FOOTER): S.CLOSED,
    (S.ASKED, I.ANSWER): S.BINDING,
    (S.ASKED, I.BOUND): S.BOUND,
    (S.BOUND, I.STANZA): S.BOUND,
    (S.BOUND, I.NONZA): S.BOUND,
    (S.BOUND, I.FOOTER): S.CLOSED,
    **{(state, I.CLOSE): S.CLOSED for state in State},
}

# What the client gets for an input that its state does not allow.
UNEXPECTED: dict[State, str] = {
    # 4.9.3.12: anything before authentication.
    S.OPENING: "bad-format",
    S.NEGOTIATING: "not-authorized",
    S.CHALLENGED: "not-authorized",
    S.REOPENING: "not-authorized",
    S.BINDING: "policy-violation",
    S.BOUND: "policy-violation",
}

# While one of these lasts, bytes wait unread: what they mean depends on what comes of it.
WAITING = frozenset((S.STARTING_TLS, S.JUDGING, S.REOPENED, S.ASKED))


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """What a connector's streams have in common."""

    hosts: frozenset[str]
    tls_available: bool = True
    # Nothing but STARTTLS is offered, and authentication refused, until TLS is there.
    tls_required: bool = True
    # Bytes until authentication is done: stops strangers from keeping a parser busy. 0: no limit.
    bytes_before_auth: int = 65_536
    limits: Limits = field(default_factory=Limits)
    lang: str = "en"


_SASL_INPUTS = {
    f"{{{ns.SASL}}}auth": I.AUTH,
    f"{{{ns.SASL}}}response": I.RESPONSE,
    f"{{{ns.SASL}}}abort": I.ABORT,
    f"{{{ns.TLS}}}starttls": I.STARTTLS,
}
# XEP-0198 4: of those who use it, as many as there are stanzas.
ACKS = frozenset((f"{{{ns.SM}}}r", f"{{{ns.SM}}}a"))
_CLIENT_ERROR = f"{{{ns.STREAMS}}}error"


class ServerStream:
    """One client stream, from its first byte to its last."""

    def __init__(self, config: StreamConfig) -> None:
        self._config = config
        self._framing = TcpFraming(config.limits)
        self._framing.parser.halting = True
        self._out: list[bytes] = []
        self._header_sent = False
        self._before_auth = 0
        self._failures = 0
        self._stamp: Stamp | None = None
        self.state = State.OPENING
        self.tls = False
        self.authenticated_ = False
        self.id = ""
        self.host = ""
        self.lang = ""
        self.jid: Jid | None = None

    # --- bytes ---

    def receive_data(self, data: bytes) -> list[Event]:
        """Takes the client's bytes. Never raises for what a client sends. After each answer of the router call it
        with none: it goes on with those that waited."""
        events: list[Event] = []
        if self.state is State.CLOSED:
            return events
        try:
            if self.state is State.BOUND:
                self._bound_data(data, events)
            else:
                self._early_data(data, events)
        except StreamError as error:
            self.close(error)
            events.append(StreamEnded(error))
        return events

    def data_to_send(self) -> bytes:
        """What is queued for the client; the queue is empty afterwards."""
        out = self._out
        if not out:
            return b""
        self._out = []
        return b"".join(out)

    def _bound_data(self, data: bytes, events: list[Event]) -> None:
        """The way of nearly all bytes."""
        stamp = self._stamp
        assert stamp is not None
        parser = self._framing.parser
        from_jid = stamp.from_jid
        for item in parser.feed(data):
            if type(item) is Element and item.name in STANZAS:
                sender = item.attrs.get("from")
                if sender is not None and sender != from_jid:
                    self._check_from(sender)
                events.append(StanzaReceived(item, stamp.apply(item)))
            elif type(item) is Element and item.name in ACKS:
                events.append(NonzaReceived(item))
            else:
                self._take(item, events)
                if self.state is not State.BOUND:
                    return
        if parser.error is not None:
            raise parser.error

    def _early_data(self, data: bytes, events: list[Event]) -> None:
        parser = self._framing.parser
        if not self.authenticated_:
            if self.state is State.STARTING_TLS:
                return  # RFC 6120 5.3.3: nothing counts between <proceed/> and the handshake
            self._before_auth += len(data)
            most = self._config.bytes_before_auth
            if most and self._before_auth > most:
                raise StreamError("policy-violation", f"more than {most} bytes before authentication")
        while True:
            if self.state in WAITING:
                # Kept until the answer is there; bounded by the limit above, and later by that of a stanza.
                parser.keep(data)
                most = self._config.limits.stanza_bytes
                if self.authenticated_ and parser.waiting > most > 0:
                    raise StreamError("policy-violation", f"more than {most} bytes ahead of an answer")
                return
            for item in self._framing.feed(data):
                self._take(item, events)
            if self.state is State.CLOSED or self.state is State.STARTING_TLS:
                return
            if parser.error is not None:
                raise parser.error
            if not parser.waiting:
                return
            data = b""

    def release(self) -> None:
        """The transport is gone too: gives back what only a living stream needs."""
        self._framing.parser.release()

    # --- inputs of the client ---

    def _take(self, item: Parsed, events: list[Event]) -> None:
        if isinstance(item, Element):
            name = item.name
            if name in STANZAS:
                self._stanza(item, events)
            elif name in _SASL_INPUTS:
                self._negotiation(_SASL_INPUTS[name], item, events)
            elif name == _CLIENT_ERROR:
                pass  # RFC 6120 4.9.1: the client says why it closes; the footer follows
            elif name.startswith("{"):
                self._move(I.NONZA)
                events.append(NonzaReceived(item))
            elif self.authenticated_:
                raise StreamError("unsupported-stanza-type", name[:40])
            else:
                raise StreamError("not-authorized")
        elif isinstance(item, StreamHeader):
            self._opened(item, events)
        elif isinstance(item, StreamFooter):
            self._move(I.FOOTER)
            self._goodbye()
            events.append(StreamEnded(None))

    def _move(self, what: Input) -> None:
        """Takes the step that the table allows, or raises what the client must be told."""
        following = TRANSITIONS.get((self.state, what))
        if following is None:
            raise StreamError(UNEXPECTED.get(self.state, "policy-violation"), f"{what.name.lower()} is not due")
        self.state = following

    def _opened(self, header: StreamHeader, events: list[Event]) -> None:
        attrs = header.attrs
        reopened = self.state is State.REOPENING
        host = self._named_host(attrs.get("to", ""))
        lang = attrs.get(XML_LANG, "")
        self.lang = lang if _LANG.fullmatch(lang) else ""
        self._send_header(host, attrs.get("from", ""))
        version = _VERSION.fullmatch(attrs.get("version", ""))
        if version is None or int(version[1]) < 1:
            raise StreamError("unsupported-version", "version 1.0 is wanted")
        if "to" not in attrs:
            raise StreamError("improper-addressing", "the header needs a `to`")
        if not host:
            raise StreamError("host-unknown")
        if reopened and host != self.host:
            raise StreamError("not-authorized", "authenticated for another host")
        self.host = host
        self._move(I.HEADER)
        if not self.authenticated_ and self._config.tls_required and not self.tls:
            self._send_features(b"")
            return
        events.append(StreamOpened(host, self.lang, self.tls, self.authenticated_))

    def _named_host(self, to: str) -> str:
        try:
            host = Jid.parse(to).domain
        except JidError:
            return ""
        return host if host in self._config.hosts else ""

    def _send_header(self, host: str, to: str) -> None:
        # A fresh id for each header (RFC 6120 4.7.3), unguessable.
        self.id = secrets.token_urlsafe(16)
        try:
            to = str(Jid.parse(to)) if to else ""
        except JidError:
            to = ""
        self._out.append(self._framing.header(id_=self.id, from_=host, to=to, lang=self.lang or self._config.lang))
        self._header_sent = True

    def _stanza(self, element: Element, events: list[Event]) -> None:
        if self._config.tls_required and not self.tls:
            raise StreamError("not-authorized")
        if self._stamp is not None:
            sender = element.attrs.get("from")
            if sender is not None and sender != self._stamp.from_jid:
                self._check_from(sender)
            self._move(I.STANZA)
            events.append(StanzaReceived(element, self._stamp.apply(element)))
            return
        # RFC 6120 7.1: before binding only requests to the server, of which binding is one.
        if element.name != "iq":
            raise StreamError("not-authorized")
        self._move(I.STANZA)
        events.append(StanzaReceived(element, element.raw))

    def _check_from(self, sender: str) -> None:
        """RFC 6120 8.1.2.1, 4.9.3.9: a client speaks for its own session, or its account, alone."""
        assert self.jid is not None
        try:
            claimed = Jid.parse(sender)
        except JidError:
            claimed = None
        if claimed != self.jid and claimed != self.jid.bare:
            raise StreamError("invalid-from")

    def _negotiation(self, what: Input, element: Element, events: list[Event]) -> None:
        if what is I.STARTTLS:
            if (self.state, what) not in TRANSITIONS or self.tls or not self._config.tls_available:
                # RFC 6120 5.4.2.2.
                self._out.append(b"<failure xmlns='%b'/>" % ns.TLS.encode())
                self._goodbye()
                self.state = State.CLOSED
                events.append(StreamEnded(StreamError("policy-violation", "no STARTTLS here")))
                return
            self._move(what)
            self._framing.parser.discard()
            self._out.append(b"<proceed xmlns='%b'/>" % ns.TLS.encode())
            events.append(StartTls())
            return
        self._move(what)
        try:
            if what is I.AUTH and self._config.tls_required and not self.tls:
                raise SaslError("encryption-required")
            if what is I.ABORT:
                events.append(SaslAborted())
                return
            data = _decoded(element)
        except SaslError as error:
            events.extend(self.refuse(error))
            return
        if what is I.AUTH:
            events.append(SaslInitiated(element.attrs.get("mechanism", ""), data))
        else:
            events.append(SaslResponded(data or b""))

    # --- answers of the owner ---

    def tls_started(self) -> None:
        """The transport is encrypted now; a new header is due (RFC 6120 5.4.3.3)."""
        self._move(I.TLS_STARTED)
        self.tls = True
        self._framing.parser.restart()
        self._framing.parser.discard()

    def features(self, children: bytes) -> None:
        """What the stream may do next; STARTTLS is added where it is due."""
        if self.state is State.CLOSED:
            return
        if self.state is State.REOPENED:
            self._move(I.FEATURES)
        self._send_features(children)

    def _send_features(self, children: bytes) -> None:
        if self._config.tls_available and not self.tls and not self.authenticated_:
            required = b"<required/>" if self._config.tls_required else b""
            children = b"<starttls xmlns='%b'>%b</starttls>%b" % (ns.TLS.encode(), required, children)
        self._out.append(self._framing.features(children))

    def challenge(self, data: bytes) -> None:
        """RFC 6120 6.4.3."""
        if self.state is State.CLOSED:
            return
        self._move(I.CHALLENGE)
        self._out.append(b"<challenge xmlns='%b'>%b</challenge>" % (ns.SASL.encode(), b64encode(data)))

    def authenticated(self, data: bytes | None) -> None:
        """RFC 6120 6.4.6: what comes next is a new stream."""
        if self.state is State.CLOSED:
            return
        self._move(I.SUCCESS)
        self.authenticated_ = True
        encoded = b"" if data is None else b64encode(data) or b"="
        self._out.append(b"<success xmlns='%b'>%b</success>" % (ns.SASL.encode(), encoded))
        self._framing.parser.restart()

    def refuse(self, error: SaslError) -> list[Event]:
        """RFC 6120 6.4.5: the client may try again, a few times."""
        if self.state is State.CLOSED:
            return []
        self._move(I.FAILURE)
        self._out.append(error.to_xml())
        self._failures += 1
        if self._failures >= MAX_AUTH_FAILURES:
            violation = StreamError("policy-violation", "too many failed authentications")
            self.close(violation)
            return [StreamEnded(violation)]
        return []

    def bound(self, jid: Jid, reply: bytes) -> None:
        """The stream has a session: its stanzas are stamped with `jid` from here on."""
        if self.state is State.CLOSED:
            return
        self._move(I.BOUND)
        self._framing.parser.halting = False
        self.jid = jid
        self._stamp = Stamp(str(jid), self.lang)
        self._out.append(reply)

    def send(self, raw: bytes) -> None:
        """Queues an element for the client; before there is a session it answers the last request."""
        if self.state is not State.CLOSED:
            if self.state is State.ASKED:
                self._move(I.ANSWER)
            self._out.append(raw)

    def close(self, error: StreamError | None = None) -> None:
        """Queues the error, if any, and our closing tag. A header goes first where none did (4.9.1.2)."""
        if self.state is State.CLOSED:
            return
        if not self._header_sent:
            self._send_header(self.host, "")
        if error is not None:
            self._out.append(self._framing.error(error))
        self._goodbye()
        self.state = State.CLOSED

    def _goodbye(self) -> None:
        if self._header_sent:
            self._out.append(self._framing.footer())


def _decoded(element: Element) -> bytes | None:
    """The data of a SASL element: None without any, b"" for "=" (RFC 6120 6.4.2)."""
    tree = to_tree(element.raw)
    text = tree.text or ""
    if len(tree):
        raise SaslError("malformed-request", "text is wanted")
    if not text:
        return None
    if text == "=":
        return b""
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SaslError("incorrect-encoding") from None
