"""The router's end of a connector's link (router.v1 Attach): its streams, and what goes to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from services.router.negotiation import Negotiation, Negotiator
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import (
    AttachRequest,
    AttachResponse,
    SessionAttach,
    StreamCommand,
    StreamEvent,
)
from tidings.kit.link import Lane, Outbox, Overflow, in_order
from tidings.kit.logging import get_logger
from tidings.kit.module import KINDS, NONZA
from tidings.xmpp.errors import StreamError
from tidings.xmpp.parser import parse_stanza

if TYPE_CHECKING:
    from services.router.sessions import Session

log = get_logger("router")


class ConnectorLink:
    """All streams of one connector that this router serves.

    `trusted` says that the connector runs in this process. Another one's word is not taken: its stanzas are
    parsed again, and their routing fields are taken from the bytes.
    """

    def __init__(
        self,
        negotiator: Negotiator,
        outbox: Outbox[AttachResponse],
        name: str,
        incarnation: str,
        trusted: bool,
        spawn: Callable[[Any, str], Any],
        cut_off: Callable[[], None],
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        # Where its clients should come back to (XEP-0198 3); '' when anywhere is as good.
        self.location = ""
        self._negotiator = negotiator
        self._outbox = outbox
        self._trusted = trusted
        self._spawn = spawn
        # Ends the link; its streams end with it.
        self._cut_off = cut_off
        self._streams: dict[int, Negotiation] = {}
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._streams)

    # --- from the connector ---

    def receive(self, request: AttachRequest) -> None:
        """Takes a batch; returns when all of it is worked off or waits in a lane."""
        now = int(time.time() * 1000)
        for item in in_order(request.envelopes, request.events) if request.events else request.envelopes:
            try:
                if isinstance(item, Envelope):
                    self._stanza(item, now)
                else:
                    self._event(item, now)
            except Exception:
                self._failed(item)

    def _failed(self, item: Envelope | StreamEvent) -> None:
        """Called while an exception is handled that nobody has foreseen: it costs one stream, not all of the link."""
        log.exception("stream_failed", connector=self.name)
        if isinstance(item, StreamEvent):
            self.close(item.stream, "internal-server-error")
        elif (session := self._sessions.get(item.origin)) is not None:
            self.close(session.stream, "internal-server-error")

    def _stanza(self, envelope: Envelope, now: int) -> None:
        session = self._sessions.get(envelope.origin)
        if session is None:
            return  # it has ended, and the connector does not know yet
        if not self._trusted and not _verified(envelope, session.jid_text):
            log.error("connector_lied", connector=self.name, session=session.id)
            self.close(session.stream, "internal-server-error", "the stanza did not arrive whole")
            return
        if envelope.kind == NONZA:
            self._negotiator.acknowledgements.nonza(self, session, envelope)
            return
        envelope.from_jid = session.jid_text
        envelope.received_unix_ms = now
        if not self._negotiator.safety.accept(session, envelope):
            return
        lane = session.lane
        if lane.waiting is not None:
            lane.run(self._negotiator.routing.from_session, session, envelope)
            return
        pending = self._negotiator.routing.from_session(session, envelope)
        if pending is not None:
            lane.hold(pending)

    def _event(self, event: StreamEvent, now: int) -> None:
        number = event.stream
        which = event.WhichOneof("event")
        if which == "opened" and number not in self._streams:
            self._streams[number] = Negotiation(self, number, Lane(self._spawn))
        elif which == "attach" and number not in self._streams:
            self._attach(number, event.attach)
            return
        stream = self._streams.get(number)
        if stream is None:
            return  # closed by us meanwhile
        if which == "opened":
            stream.lane.run(self._negotiator.opened, stream, event.opened)
        elif which == "sasl_initiate":
            stream.lane.run(self._negotiator.sasl_initiate, stream, event.sasl_initiate)
        elif which == "sasl_response":
            stream.lane.run(self._negotiator.sasl_response, stream, event.sasl_response.data)
        elif which == "sasl_abort":
            stream.lane.run(self._negotiator.sasl_abort, stream)
        elif which == "stanza":
            if not self._trusted and not _verified(event.stanza, None):
                self.close(number, "internal-server-error", "the stanza did not arrive whole")
                return
            event.stanza.received_unix_ms = now
            stream.lane.run(self._negotiator.stanza, stream, event.stanza)
        elif which == "move_ready":
            if stream.session is not None:
                self._negotiator.hand_over.ready(stream.session, event.move_ready.attempt)
        elif which == "leaving":
            session = stream.session
            if session is not None and session.resume_seconds:
                # Behind all that was sent to it; the client goes on elsewhere.
                self.command(number).close.keep_session = True
                self._streams.pop(number, None)
                self._negotiator.resumption.suspend(session)
            elif session is not None:
                self._spawn(self._negotiator.leave(session), "a session whose connector drains")
        elif which == "closed":
            self._streams.pop(number, None)
            log.debug("stream_closed", stream=number, clean=event.closed.clean, reason=event.closed.reason)
            self._end(stream, event.closed.clean)

    def closed(self) -> None:
        """The link is gone, and with it all its streams."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            self._end(stream, False)

    def _end(self, stream: Negotiation, clean: bool) -> None:
        session = stream.session
        if session is not None and session.resume_seconds and not clean and not session.closed:
            self._negotiator.resumption.suspend(session)
        elif session is not None:
            # At once; the end itself comes behind what it has sent.
            session.closed = True
            session.lane.run(self._negotiator.end, session)
        else:
            stream.lane.run(self._negotiator.bind_abandoned, stream)

    # --- to the connector ---

    def deliver(self, session: Session, envelope: Envelope, number: int) -> None:
        """Writes a stanza to the session's stream; `number`: among those that it gets."""
        raw = envelope.stanza
        try:
            self._outbox.begin(len(raw)).add(target=session.id, delivery=number, kind=envelope.kind, stanza=raw)
        except Overflow:
            self._cut_off()

    def write(self, session: Session, raw: bytes) -> None:
        """Writes an element that is no stanza to the session's stream."""
        try:
            self._outbox.begin(len(raw)).add(target=session.id, kind=NONZA, stanza=raw)
        except Overflow:
            self._cut_off()

    def command(self, stream: int) -> StreamCommand:
        """A command for a stream, behind all that was written before; the caller fills it in."""
        try:
            batch = self._outbox.begin_item()
        except Overflow:
            self._cut_off()
            return StreamCommand()
        return batch.commands.add(stream=stream, position=len(batch.envelopes))

    def close(self, stream: int, condition: str, text: str = "", application: bytes = b"") -> None:
        close = self.command(stream).close
        close.condition = condition
        close.text = text
        close.application = application

    def bound(self, session: Session, reply: bytes) -> None:
        """The stream has a session now; `reply` is the result of its bind request."""
        self._serve(session)
        bound = self.command(session.stream).session_bound
        bound.session = session.id
        bound.epoch = session.epoch
        bound.jid = session.jid_text
        bound.reply = reply

    def _serve(self, session: Session) -> None:
        self._sessions[session.id] = session
        number = session.stream
        session.lane.on_long = lambda: self._set_reading(number, False)
        session.lane.on_short = lambda: self._set_reading(number, True)

    def _attach(self, number: int, attach: SessionAttach) -> None:
        """A session that this router has adopted goes on here."""
        session = self._negotiator.adoption.attach(self, number, attach)
        if session is None:
            log.info("attach_refused", connector=self.name, stream=number)
            self.close(number, "system-shutdown", "the session is no longer there; please connect again")
            return
        stream = self._streams[number] = Negotiation(self, number, Lane(self._spawn))
        stream.session = session
        self._serve(session)
        self._negotiator.adoption.attached(session)

    def unbound(self, session: Session) -> None:
        """The session has ended: nothing more comes from it."""
        self._sessions.pop(session.id, None)

    def release(self, session: Session) -> None:
        """The session is another router's now, and so is its stream."""
        self._sessions.pop(session.id, None)
        self._streams.pop(session.stream, None)

    def give_up(self, number: int) -> None:
        """A stream has lost its session to another one: what comes of it is nobody's."""
        self._streams.pop(number, None)

    def moved(self, number: int, router: str, view_version: int, ticket: bytes) -> None:
        """A stream without a session goes to another router."""
        self._streams.pop(number, None)
        moved = self.command(number).moved
        moved.router_incarnation = router
        moved.view_version = view_version
        moved.ticket = ticket

    def _set_reading(self, stream: int, reading: bool) -> None:
        self.command(stream).set_reading.reading = reading


def _verified(envelope: Envelope, from_jid: str | None) -> bool:
    """Puts the routing fields of the bytes into the envelope; False when the bytes are not what they must be.

    `from_jid`: the session's, which must be in it; None before there is a session, when it may be any element.
    """
    try:
        element = parse_stanza(envelope.stanza)
    except StreamError:
        return False
    attrs = element.attrs
    if element.name.startswith("{"):
        envelope.kind, envelope.type, envelope.id = NONZA, element.name, attrs.get("h", "")
        return True
    if from_jid is not None and (element.name not in KINDS or attrs.get("from") != from_jid):
        return False
    envelope.kind = KINDS.get(element.name, NONZA)
    envelope.type = attrs.get("type", "")
    envelope.id = attrs.get("id", "")
    envelope.to_jid = attrs.get("to", "")
    del envelope.children[:]
    envelope.children.extend(element.children)
    return True
