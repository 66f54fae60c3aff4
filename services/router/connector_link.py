"""The router's end of a connector's link (router.v1 Attach): its streams, and what goes to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from services.router.held import own_copy
from services.router.iq_deadlines import REQUESTS
from services.router.negotiation import Negotiation, Negotiator
from services.router.routing_fields import fill, verified
from services.router.sessions import when_copied
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import (
    AttachRequest,
    AttachResponse,
    SessionAttach,
    SessionAttached,
    SessionBound,
    StreamCommand,
    StreamEvent,
)
from tidings.kit.link import Lane, Outbox, Overflow, in_order
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ, MESSAGE, NONZA
from tidings.xmpp.jid import normal

if TYPE_CHECKING:
    from services.router.sessions import Session

log = get_logger("router")


class ConnectorLink:
    """All streams of one connector that this router serves.

    `trusted` says that the connector runs in this process. Another one's word is not taken: its stanzas are
    parsed again, and their routing fields are taken from the bytes. A link to another process outlives its calls
    (grpc_api.py), and has copies of its sessions at its other end (copies.py).
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
        self.outbox = outbox
        # Whether the connector is in this process: then nothing is held by two.
        self.local = trusted
        # Whether the connector has copies of the sessions whose streams it serves.
        self._copies = not trusted and negotiator.copies.wanted
        self._spawn = spawn
        # Ends the link; its streams end with it.
        self.cut_off = cut_off
        self._streams: dict[int, Negotiation] = {}
        self._sessions: dict[str, Session] = {}
        # By session: the stream that it had and has no longer, till the connector says that this one has ended.
        self._given_up: dict[str, int] = {}
        # Sessions without a stream here whose copies are here.
        self._held: dict[str, Session] = {}
        # Sessions that this router takes over from copies there, while what their clients have sent follows.
        self._coming: dict[str, tuple[int, SessionAttach, list[Envelope]]] = {}
        # Those whose copies may be shortened.
        self._progress: dict[str, Session] = {}
        # The call that carries the link now, and what ends the link when there is none for long.
        self.handling: asyncio.Task[Any] | None = None
        self.expires: asyncio.TimerHandle | None = None
        # It has ended.
        self.over = False

    def __len__(self) -> int:
        return len(self._streams)

    # --- from the connector ---

    def receive(self, request: AttachRequest) -> None:
        """Takes a batch; returns when all of it is worked off or waits in a lane. Raises Gap."""
        if self.local:
            self.outbox.received = request.sequence
        else:
            self.outbox.confirmed(request.received_through)
            if not request.sequence or not self.outbox.take(request.sequence):
                return
            self.outbox.confirm_soon()
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
        if (coming := self._coming.get(envelope.origin)) is not None:
            # Before all else: the session may be here, and have a stream of this connector, which did not know yet.
            coming[2].append(own_copy(envelope))
            self._follows(envelope.origin)
            return
        if envelope.origin in self._given_up:
            return  # of the stream that it had: what the client was not told to be handled it sends on the new one
        session = self._sessions.get(envelope.origin)
        if session is None:
            return  # it has ended, and the connector does not know yet
        if not self.local and not verified(envelope, session.jid_text):
            log.error("connector_lied", connector=self.name, session=session.id)
            self.close(session.stream, "internal-server-error", "the stanza did not arrive whole")
            return
        if envelope.kind == NONZA:
            self._negotiator.acknowledgements.nonza(self, session, envelope)
            return
        self._take(session, envelope, now)

    def _take(self, session: Session, envelope: Envelope, now: int, again: bool = False) -> None:
        """Works a stanza off; when another connector holds the session's copy, as soon as that one has it."""
        envelope.from_jid = session.jid_text
        envelope.received_unix_ms = now
        lane, holder = session.lane, session.holder
        new = self._negotiator.safety.accept(session, envelope)
        # What is only repeated counts there too.
        copied = holder.copy_sent(session, envelope) if holder is not None and holder is not self else None
        if not new:
            return
        if envelope.answered:
            self._negotiator.safety.dealt(session, envelope.number)
            return
        if again:
            self._negotiator.routing.deliveries.deadlines.again(session, envelope)
        if copied is not None:
            lane.run(_until, copied)
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
            if event.attach.HasField("record"):
                self._given_up.pop(event.attach.record.id, None)  # that stream has gone another way meanwhile
                self._coming[event.attach.record.id] = number, event.attach, []
                self._follows(event.attach.record.id)
            else:
                self._attach(number, event.attach)
            return
        if which == "surrendered":
            self._surrendered(event.surrendered.session)
            return
        stream = self._streams.get(number)
        if stream is None:  # closed by us meanwhile
            if which == "closed":
                self._given_up = {session: old for session, old in self._given_up.items() if old != number}
            return
        if which == "opened":
            stream.lane.run(self._negotiator.opened, stream, event.opened)
        elif which == "sasl_initiate":
            stream.lane.run(self._negotiator.sasl_initiate, stream, event.sasl_initiate)
        elif which == "sasl_response":
            stream.lane.run(self._negotiator.sasl_response, stream, event.sasl_response.data)
        elif which == "sasl_abort":
            stream.lane.run(self._negotiator.sasl_abort, stream)
        elif which == "stanza":
            if not self.local and not verified(event.stanza, None):
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
                self.give_up(session)
                self._negotiator.resumption.suspend(session)
            elif session is not None:
                self._spawn(self._negotiator.leave(session), "a session whose connector drains")
        elif which == "closed":
            self._streams.pop(number, None)
            log.debug("stream_closed", stream=number, clean=event.closed.clean, reason=event.closed.reason)
            self._end(stream, event.closed.clean)

    def _follows(self, session: str) -> None:
        """When all that a client has sent is here, its session is taken over."""
        number, attach, sent = self._coming[session]
        if len(sent) == attach.follows:
            del self._coming[session]
            self._spawn(self._negotiator.reattachment.take(self, number, attach, sent), "take a session over")

    def _surrendered(self, session_id: str) -> None:
        """Another router takes the session over; what waited for it here goes there. Nobody is told of an end."""
        session = self._sessions.get(session_id) or self._held.get(session_id)
        if session is not None:
            if session_id in self._sessions:
                self._streams.pop(session.stream, None)
            session.closed = True
            session.lane.run(self._negotiator.resumption.surrendered, session)
        self._given_up.pop(session_id, None)

    def closed(self) -> None:
        """The link is gone, and with it all its streams, and the copies at its other end."""
        self.over = True
        if not self.local:
            # The connector may live, and bring its copies when we are gone.
            for session in (*self._sessions.values(), *self._held.values()):
                session.old_copies |= {self}
        self.outbox.release()
        if self.expires is not None:
            self.expires.cancel()
        copies, held, self._held = self._negotiator.copies, self._held, {}
        streams, self._streams = self._streams, {}
        served = [stream.session for stream in streams.values() if stream.session is not None]
        for session in (*held.values(), *served):
            _not_held_by(session, self)
        for stream in streams.values():
            self._end(stream, False)
        for session in (*held.values(), *served):
            copies.lost(session)

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
        raw, kind = envelope.stanza, envelope.kind
        try:
            envelopes = self.outbox.begin(len(raw))
        except Overflow:
            self.cut_off()
            return
        if not self._copies:
            envelopes.add(target=session.id, delivery=number, kind=kind, stanza=raw)
            return
        # For the copy there.
        added = envelopes.add(
            target=session.id, delivery=number, kind=kind, stanza=raw, origin=envelope.origin, number=envelope.number
        )
        if kind == IQ:
            added.type, added.id, added.from_jid = envelope.type, envelope.id, envelope.from_jid
        elif kind == MESSAGE and envelope.answers and envelope.target == session.id:
            added.answers = session.inbound.place(envelope.answers)

    def write(self, session: Session, raw: bytes) -> None:
        """Writes an element that is no stanza to the session's stream."""
        try:
            self.outbox.begin(len(raw)).add(target=session.id, kind=NONZA, stanza=raw)
        except Overflow:
            self.cut_off()

    def command(self, stream: int, session: str = "") -> StreamCommand:
        """A command for a stream, behind all that was written before; the caller fills it in. With stream 0 it is for
        the copy of a session."""
        try:
            batch = self.outbox.begin_item()
        except Overflow:
            self.cut_off()
            return StreamCommand()
        return batch.commands.add(stream=stream, session=session, position=len(batch.envelopes))

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
        if self._copies:
            self._begin_copy(session, bound)

    def _serve(self, session: Session) -> None:
        self._sessions[session.id] = session
        self._held.pop(session.id, None)
        self._negotiator.copies.served(session, self)
        number = session.stream
        session.lane.on_long = lambda: self._set_reading(number, False)
        session.lane.on_short = lambda: self._set_reading(number, True)

    def _attach(self, number: int, attach: SessionAttach) -> None:
        """A session that this router has adopted goes on here."""
        session, whose = self._negotiator.adoption.attach(self, number, attach)
        if session is None:
            # What comes behind it is of no session either, though its client may have come back to this connector.
            if whose in self._sessions:
                self._given_up[whose] = number
            log.info("attach_refused", connector=self.name, stream=number)
            self.close(number, "system-shutdown", "the session is no longer there; please connect again")
            return
        self._given_up.pop(whose, None)
        stream = self._streams[number] = Negotiation(self, number, Lane(self._spawn))
        stream.session = session
        self._serve(session)
        attached = self.command(number).attached
        attached.SetInParent()
        if self._copies:
            self._begin_copy(session, attached)
        self._negotiator.adoption.attached(session)

    def reattached(self, session: Session, number: int) -> None:
        """A session that this router has taken over from the connector's copy; `number`: its stream, or 0."""
        attached = self.command(number, session.id).attached
        attached.ticket = self._negotiator.copies.ticket(session, self.incarnation)
        session.copied.clear()
        if number:
            stream = self._streams[number] = Negotiation(self, number, Lane(self._spawn))
            stream.session = session
            self._serve(session)
            return
        if not self.local:
            session.holder = self
            self._held[session.id] = session
        self._negotiator.copies.cover(session)

    def again(self, session: Session, envelope: Envelope) -> None:
        """What a client has sent, and what may have been lost with the router that had its session."""
        if envelope.kind == NONZA:
            self._negotiator.acknowledgements.nonza(self, session, envelope)
        elif verified(envelope, session.jid_text):
            self._take(session, envelope, int(time.time() * 1000), again=True)

    def unbound(self, session: Session) -> None:
        """Nothing more comes from the session: it has ended, or waits for its client; then its copy stays there."""
        if self._sessions.pop(session.id, None) is None:
            return
        if session.holder is self:
            self._held[session.id] = session
        elif not self.local and not self.over:
            self._negotiator.copies.old.let_go(session, self)

    def release(self, session: Session) -> None:
        """The session is another router's now, and so is its stream."""
        self._sessions.pop(session.id, None)
        self._streams.pop(session.stream, None)
        if session.holder is self:
            session.holder = None

    # --- copies ---

    def hold(self, session: Session) -> None:
        """The connector there holds the copy of a session that has no stream there, from now on."""
        session.holder = self
        self._held[session.id] = session
        self._begin_copy(session, self.command(0, session.id).attached)
        inbound = session.inbound
        for sent in inbound.under_way():
            envelope = Envelope(stanza=sent.raw)
            fill(envelope)
            if envelope.kind == IQ and envelope.type in REQUESTS and inbound.is_done(sent.number):
                envelope.answered = (normal(sent.to), sent.id) not in session.asked
            elif envelope.kind == MESSAGE:
                envelope.answered = inbound.is_done(sent.number)  # it may have come back
            self.copy_sent(session, envelope)

    def _begin_copy(self, session: Session, message: SessionBound | SessionAttached) -> None:
        """The connector's copy begins with the session as it is now."""
        message.ticket = self._negotiator.copies.ticket(session, self.incarnation)
        message.record.CopyFrom(self._negotiator.copies.whole(session, self))

    def copy_sent(self, session: Session, envelope: Envelope) -> asyncio.Future[None]:
        """Copies what a client has sent; done when the connector there has it, or is gone."""
        copied: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self.outbox.begin(len(envelope.stanza)).add(
                target=session.id, kind=envelope.kind, type=envelope.type, id=envelope.id, to_jid=envelope.to_jid,
                children=envelope.children, stanza=envelope.stanza, answered=envelope.answered,
            )  # fmt: skip
        except Overflow:
            copied.set_result(None)
            self.cut_off()
        else:
            when_copied(session, self, partial(_done, copied))
        return copied

    def when_copied(self, then: Callable[[], None]) -> None:
        """Calls `then` when the connector has what it was sent last, or is gone."""
        if self.over or self.local:
            then()
            return
        self.outbox.batch.prompt = True
        self.outbox.when_confirmed(then)

    def forget(self, session: Session) -> None:
        """Its copy there is not needed any more."""
        self._held.pop(session.id, None)
        session.copied.pop(self, None)
        if not self.over:
            self.command(0, session.id).forget.SetInParent()

    def surrender(self, session: str, router: str) -> None:
        """Whoever holds the copy of a session that a router has gives it to this one."""
        self.command(0, session).surrender.router_incarnation = router

    def progress(self, session: Session) -> None:
        """The copy of a session may be shortened: it is told so with the next batch."""
        if not self._copies:
            return
        if not self._progress:
            asyncio.get_running_loop().call_soon(self.tell_progress)
        self._progress[session.id] = session

    def tell_progress(self) -> None:
        sessions, self._progress = self._progress, {}
        for session in sessions.values():
            if session.holder is not self and session.link is not self:
                continue
            state = self._negotiator.copies.changed(session, self)
            try:
                if state is not None:
                    # First: what a stanza has changed must be there when the stanza is kept no longer.
                    number = session.stream if session.link is self else 0
                    self.command(number, session.id).state.CopyFrom(state)
                inbound = session.inbound
                self.outbox.begin_item().progress.add(
                    session=session.id, passed=inbound.passed, number=inbound.last_passed,
                    again_from=inbound.again_from, confirmed=session.marked,
                )  # fmt: skip
            except Overflow:
                self.cut_off()
                return

    def has(self, stream: Negotiation) -> bool:
        """Whether a stream has not ended."""
        return self._streams.get(stream.number) is stream

    def give_up(self, session: Session) -> None:
        """A session loses its stream, perhaps to another one: what still comes of this one is nobody's."""
        self._streams.pop(session.stream, None)
        self._given_up[session.id] = session.stream

    def moved(self, number: int, router: str, view_version: int, ticket: bytes) -> None:
        """A stream without a session goes to another router."""
        self._streams.pop(number, None)
        moved = self.command(number).moved
        moved.router_incarnation = router
        moved.view_version = view_version
        moved.ticket = ticket

    def _set_reading(self, stream: int, reading: bool) -> None:
        self.command(stream).set_reading.reading = reading


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _until(done: asyncio.Future[None]) -> asyncio.Future[None] | None:
    """A step of a lane."""
    return None if done.done() else done


def _not_held_by(session: Session, link: ConnectorLink) -> None:
    session.copied.pop(link, None)
    if session.holder is link:
        session.holder = None
