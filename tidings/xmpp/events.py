"""What comes out of a stream: one event for each thing that happened. See `tidings.xmpp.stream`."""

from __future__ import annotations

from typing import NamedTuple

from tidings.xmpp.errors import StreamError
from tidings.xmpp.stanza import Element


class StreamOpened(NamedTuple):
    """The header was in order: say by `features` what the stream may do."""

    host: str
    lang: str
    tls: bool
    authenticated: bool


class StartTls(NamedTuple):
    """<proceed/> is queued: send it, encrypt the transport, then call `tls_started`."""


class SaslInitiated(NamedTuple):
    """The client begins to authenticate. None: without an initial response, which differs from an empty one."""

    mechanism: str
    data: bytes | None


class SaslResponded(NamedTuple):
    """The answer to a challenge."""

    data: bytes


class SaslAborted(NamedTuple):
    """The client gives up this exchange; answer with `refuse`."""


class StanzaReceived(NamedTuple):
    """A stanza. `stamped` are its bytes, with the session's address once there is a session."""

    element: Element
    stamped: bytes


class NonzaReceived(NamedTuple):
    """A first-level element that is no stanza, after authentication."""

    element: Element


class StreamEnded(NamedTuple):
    """Nothing comes after it. None: the client closed properly."""

    error: StreamError | None


Event = (
    StreamOpened
    | StartTls
    | SaslInitiated
    | SaslResponded
    | SaslAborted
    | StanzaReceived
    | NonzaReceived
    | StreamEnded
)
