"""Bugs, each a small change of one function of the server: what a drill must find (tests/drills/planted/run.py).

The server knows nothing of them. A process that is to have one finds this folder on its path (`sitecustomize.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from services.router import read_back
from services.router.deliveries import Deliveries
from services.router.message_queue import WriteQueue
from services.router.messages_sql import SqlMessageStore
from services.router.reattachment import Reattachment
from services.router.resumption import Resumption
from tidings.kit.link import Outbox
from tidings.xmpp.stream import ServerStream
from tidings.xmpp.stream_management import NOTHING, Inbound


def _instead(of: type | ModuleType, name: str, make: Callable[[Any], Any]) -> None:
    """Puts into the place of a method or a function what is made of it."""
    setattr(of, name, make(getattr(of, name)))


# --- when a message is safe ---


def acknowledged_before_the_commit() -> None:
    """Whoever waits for a message to be stored is told at once that it is."""

    def make(put: Any) -> Any:
        def planted(self: Any, message: Any, done: Any, urgent: bool) -> None:
            put(self, message, lambda _error: None, urgent)
            done(None)

        return planted

    _instead(SqlMessageStore, "_put", make)


def answers_not_held_back() -> None:
    """A client without XEP-0198 gets its answers while what it has sent before is not safe."""
    _instead(Deliveries, "_waits_for", lambda _: lambda _self, _session, _envelope, _answers=0: 0)


# --- what a session has not confirmed ---


def queue_dropped_when_the_stream_breaks() -> None:
    """A session that waits for its client has forgotten what that one has not confirmed."""

    def make(suspend: Any) -> Any:
        def planted(self: Any, session: Any) -> None:
            session.outbound.queue = NOTHING
            suspend(self, session)

        return planted

    _instead(Resumption, "suspend", make)


def delivered_when_written() -> None:
    """A message is marked as delivered when it is written to a stream, not when it is confirmed."""

    def make(write: Any) -> Any:
        def planted(self: Any, session: Any, envelope: Any, *stored_as: Any) -> None:
            write(self, session, envelope, *stored_as)
            self.kept_as.__self__.acknowledged(session, [envelope])

        return planted

    _instead(Deliveries, "_write", make)


def not_returned_at_the_end() -> None:
    """What a session that ends has not confirmed counts as delivered."""

    def make(unconfirmed: Any) -> Any:
        def planted(self: Any, session: Any) -> Any:
            self.kept_as.__self__.acknowledged(session, [what for _, what in session.outbound.queue])
            return unconfirmed(self, session)

        return planted

    _instead(Deliveries, "unconfirmed", make)


# --- what comes again ---


def repetitions_not_known() -> None:
    """What a client sends again after it has resumed is taken for new. It is told at once what is handled: most of what
    it has sent would be by the time that what was taken over is dealt with again, and it would send little."""

    async def at_once(*_: Any) -> None: ...

    _instead(Inbound, "repeated", lambda _: lambda *_: 0)
    _instead(Resumption, "_dealt_with_again", lambda _: at_once)


def hops_not_known() -> None:
    """What a router sends again is given to sessions that have had it."""
    _instead(Deliveries, "_is_new", lambda _: lambda *_: True)


def batches_dropped_at_reconnect() -> None:
    """What a service had not confirmed when the stream to it broke is not sent to it again. (Its batches are, empty:
    one that is missing is noticed.)"""

    def make(resume: Any) -> Any:
        def planted(self: Any, after: int) -> None:
            for batch in self._unconfirmed:
                sequence = batch.sequence
                batch.Clear()
                batch.sequence = sequence
            resume(self, after)

        return planted

    _instead(Outbox, "resume", make)


# --- order ---


def live_before_stored() -> None:
    """What comes for a session does not wait until that has what was stored for it."""

    def make(to_session: Any) -> Any:
        def planted(self: Any, session: Any, envelope: Any) -> None:
            held, session.held = session.held, None
            to_session(self, session, envelope)
            session.held = held

        return planted

    _instead(Deliveries, "to_session", make)


def groups_reversed() -> None:
    """Messages are stored in another order than that in which they came, and read as they are stored."""

    def make(take: Any) -> Any:
        def planted(self: Any, *most: int) -> Any:
            messages, marks = take(self, *most)
            return messages[::-1], marks

        return planted

    _instead(WriteQueue, "take", make)
    # Who reads them would put those of each sender in order by their numbers.
    _instead(read_back, "in_order", lambda _: list)


# --- whose session it is ---


def old_epoch_accepted() -> None:
    """A router takes a session over from a copy of it that has grown old."""

    async def row(self: Any, jid: Any, attach: Any) -> Any:
        rows = await self._table.of_account(jid.bare)
        return next((row for row in rows if row.session == attach.record.id), None)

    _instead(Reattachment, "_row", lambda _: row)


# --- streams ---


def parser_fed_on() -> None:
    """The stream that resumes a session is read by the parser of the one that broke."""
    parsers: dict[str, Any] = {}

    def make(bound: Any) -> Any:
        def planted(self: Any, jid: Any, reply: bytes) -> None:
            bound(self, jid, reply)
            if reply.startswith(b"<resumed"):
                self._framing.parser = parsers.get(str(jid), self._framing.parser)
            parsers[str(jid)] = self._framing.parser

        return planted

    _instead(ServerStream, "bound", make)
    _instead(ServerStream, "release", lambda _: lambda _self: None)


BUGS: dict[str, Callable[[], None]] = {
    plant.__name__: plant
    for plant in (
        acknowledged_before_the_commit,
        answers_not_held_back,
        queue_dropped_when_the_stream_breaks,
        delivered_when_written,
        not_returned_at_the_end,
        repetitions_not_known,
        hops_not_known,
        batches_dropped_at_reconnect,
        live_before_stored,
        groups_reversed,
        old_epoch_accepted,
        parser_fed_on,
    )
}
