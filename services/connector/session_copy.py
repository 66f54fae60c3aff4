"""A connector's copy of a session that a router in another process has (DESIGN 9): when that router dies, another one
carries the session on from it.

What the router says is the record; what changes with each stanza follows from what passes here anyway: the connector
has a stanza before it is written to the client, and before the router gets it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tidings.api.common.v1.session_pb2 import AskedIq, SessionRecord
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import SessionAttached, SessionBound, SessionProgress
from tidings.kit.module import IQ, MESSAGE, NONZA
from tidings.xmpp.jid import normal
from tidings.xmpp.parser import parse_stanza

if TYPE_CHECKING:
    from services.connector.router_link import RouterLink

# Senders whose last number is remembered, as at the router; of more, those that have been silent for longest are
# forgotten.
MAX_TAKEN = 2000
# Messages that a client without XEP-0198 has not confirmed: of more, the oldest are forgotten, and wait in the store.
# It stops a client that answers no ping from filling memory.
MAX_DELIVERED = 1000
# IQ requests whose answers are waited for, as at the router; the seconds after which that one answers itself; and
# those behind that in which it may have stood still, and the next one has to.
MAX_ASKED = 1000
IQ_DEADLINE = 22.0
OVERDUE = 30.0

REQUESTS = ("get", "set")


class Sent(NamedTuple):
    """An element of the client that its router has not passed yet."""

    kind: int
    type: str
    id: str
    to: str
    children: Sequence[str]
    raw: bytes
    # A request that has its answer; or a message that has come back, or is safe.
    answered: bool = False


class Delivered(NamedTuple):
    """A stanza that the client was sent and has not confirmed."""

    delivery: int
    origin: str
    number: int
    kind: int
    raw: bytes


class SessionCopy:
    """The copy of one session. `router` is the incarnation that has it."""

    __slots__ = (
        "_asked",
        "_delivered",
        "_passed",
        "_sent",
        "_since",
        "_taken",
        "asked_routers",
        "record",
        "router",
        "ticket",
    )

    def __init__(self, router: str) -> None:
        self.router = router
        # Routers that were asked to take the session over from here, of which none has answered.
        self.asked_routers: list[str] = []
        self.ticket = b""
        # None while the router has not sent one: then nobody can carry the session on from here.
        self.record: SessionRecord | None = None
        # Stanzas that are passed, counted from bind; and what the client has sent behind them.
        self._passed = 0
        self._sent: deque[Sent] = deque()
        self._delivered: deque[Delivered] = deque()
        self._taken: dict[str, int] = {}
        self._since: dict[str, int] = {}
        self._asked: dict[tuple[str, str], float] = {}

    @classmethod
    def of(cls, router: str, begun: SessionBound | SessionAttached) -> SessionCopy:
        """One that begins with what its router says, which has the record in it."""
        copy = cls(router)
        copy.begin(begun.record, begun.ticket)
        return copy

    @property
    def is_whole(self) -> bool:
        return self.record is not None

    @property
    def resumable(self) -> bool:
        return self.record is not None and self.record.resume_seconds > 0

    # --- what the router says ---

    def begin(self, record: SessionRecord, ticket: bytes) -> None:
        """The whole session, as it was before anything that follows here."""
        self.ticket = ticket
        self._passed = record.passed
        self._taken, self._since = dict(record.taken), dict(record.since)
        self._delivered = deque(
            Delivered(one.delivery, one.origin, one.number, one.kind, one.stanza) for one in record.unacknowledged
        )
        self.record = SessionRecord()
        self.record.CopyFrom(record)
        self.record.ClearField("unacknowledged")
        self.record.ClearField("taken")
        self.record.ClearField("since")
        self.record.ClearField("asked")
        now, since = time.monotonic(), self._asked
        self._asked = {(one.to_jid, one.id): now - IQ_DEADLINE + one.left for one in record.asked}
        # Behind them what has passed here already: the client may ask before the router of a session that has moved
        # says how it began there.
        for request, at in since.items():
            if not self._had_answer(request):
                self._asked.setdefault(request, at)

    def state(self, state: SessionRecord) -> None:
        """All but the queues, as it is now."""
        before = self.record
        if before is None:
            return
        record = SessionRecord()
        record.CopyFrom(state)
        record.number, record.sent, record.acknowledged = before.number, before.sent, before.acknowledged
        record.unconfirmed.extend(before.unconfirmed)
        record.unconfirmed_messages.extend(before.unconfirmed_messages)
        self.record = record
        if record.counts:
            # Its <enable/> has been dealt with.
            self._sent = deque(sent for sent in self._sent if sent.kind != NONZA)

    def progress(self, progress: SessionProgress) -> None:
        """What the router has passed, and the client has confirmed, need not be kept."""
        record = self.record
        if record is None:
            return
        sent = self._sent
        while sent and self._passed < progress.passed:
            if sent.popleft().kind != NONZA:
                self._passed += 1
        record.number = max(record.number, progress.number)
        if record.unconfirmed and record.unconfirmed[0].number != progress.again_from:
            kept = [one for one in record.unconfirmed if progress.again_from and one.number >= progress.again_from]
            del record.unconfirmed[:]
            record.unconfirmed.extend(kept)
        if progress.confirmed > record.acknowledged:
            record.acknowledged = confirmed = progress.confirmed
            delivered = self._delivered
            while delivered and delivered[0].delivery <= confirmed:
                delivered.popleft()
            while record.unconfirmed_messages and record.unconfirmed_messages[0].delivery <= confirmed:
                del record.unconfirmed_messages[0]

    def attached(self, ticket: bytes, router: str) -> None:
        """Another router has taken the session over from this copy."""
        self.ticket, self.router, self.asked_routers = ticket, router, []
        if self.record is not None:
            self.record.epoch += 1

    # --- what passes here ---

    def sent(self, sent: Sent) -> None:
        self._sent.append(sent)
        if sent.kind == IQ and sent.type in REQUESTS and sent.to and not sent.answered:
            request = normal(sent.to), sent.id
            if self._had_answer(request):
                return
            if len(self._asked) >= MAX_ASKED:
                del self._asked[next(iter(self._asked))]
            self._asked.setdefault(request, time.monotonic())

    def _had_answer(self, request: tuple[str, str]) -> bool:
        """Whether a request, to whom and its id, is sent again, and had been dealt with: then an answer is waited for
        only if it was before."""
        to, id_ = request
        unconfirmed = self.record.unconfirmed if self.record is not None else ()
        return any(
            one.answered and (one.kind, one.id) == (IQ, id_) and normal(one.to_jid) == to for one in unconfirmed
        )

    def delivered(self, envelope: Envelope, raw: bytes) -> None:
        record, number, kind = self.record, envelope.number, envelope.kind
        if record is None:
            return
        if kind == IQ and envelope.type not in REQUESTS:
            self._asked.pop((envelope.from_jid, envelope.id), None)
            self._answered(record, envelope.from_jid, envelope.id)
        if self._delivered and envelope.delivery <= self._delivered[-1].delivery:
            return  # it is sent again, to a stream that has resumed
        record.sent = envelope.delivery
        if number:
            taken, origin = self._taken, envelope.origin
            if taken.pop(origin, None) is None:
                self._since[origin] = number
            taken[origin] = number
            if len(taken) > MAX_TAKEN:
                silent = next(iter(taken))
                del taken[silent]
                self._since.pop(silent, None)
        if record.counts or (kind == MESSAGE and number):
            self._delivered.append(Delivered(envelope.delivery, envelope.origin, number, kind, raw))
            if not record.counts and len(self._delivered) > MAX_DELIVERED:
                self._delivered.popleft()
        if kind == MESSAGE and envelope.answers:
            self._came_back(envelope.answers)

    def _came_back(self, place: int) -> None:
        """Of the stanzas since bind, the message at this place: another router must not pass it on all the same."""
        left = place - self._passed
        for index, sent in enumerate(self._sent):
            left -= sent.kind != NONZA
            if not left and sent.kind == MESSAGE:
                self._sent[index] = sent._replace(answered=True)
                return

    def _answered(self, record: SessionRecord, from_jid: str, id_: str) -> None:
        """A request has its answer: the client may send it again all the same, or has, and no router must deal with
        it a second time."""
        for one in record.unconfirmed:
            if (one.kind, one.id) == (IQ, id_) and normal(one.to_jid) in (from_jid, "") and _is_request(one.stanza):
                one.answered = True
                break
        for index, sent in enumerate(self._sent):
            # Without `to` it was for the server or the account, and one of them has answered.
            if sent.kind == IQ and sent.id == id_ and sent.type in REQUESTS and normal(sent.to) in (from_jid, ""):
                self._sent[index] = sent._replace(answered=True)
                return

    # --- for the router that carries the session on ---

    def bring(self, link: RouterLink, stream: int, moves: int, left: bool = False) -> None:
        """Gives a router all that it needs to take the session over. Raises Overflow."""
        router = link.node.incarnation
        attach = link.event(stream).attach
        attach.left = left
        attach.ticket, attach.router_incarnation, attach.moves = self.ticket, self.router, moves
        attach.asked_incarnations.extend(self.asked_routers)
        self._whole(attach.record)
        attach.follows = len(self._sent)
        if router not in self.asked_routers:
            self.asked_routers.append(router)
        for sent in self._sent:
            link.send(attach.record.id, sent)

    def _whole(self, record: SessionRecord) -> None:
        """The session as this copy has it."""
        assert self.record is not None
        record.CopyFrom(self.record)
        record.passed = self._passed
        record.handled = max(0, self._passed - record.counted_after) if record.counts else 0
        record.taken.update(self._taken)
        record.since.update(self._since)
        for one in self._delivered:
            record.unacknowledged.add(
                delivery=one.delivery, origin=one.origin, number=one.number, kind=one.kind, stanza=one.raw
            )  # fmt: skip
        now = time.monotonic()
        for (to, id_), asked in self._asked.items():
            left = asked + IQ_DEADLINE - now
            if left > -OVERDUE:
                record.asked.append(AskedIq(to_jid=to, id=id_, left=max(0.0, left)))


def _is_request(raw: bytes) -> bool:
    return parse_stanza(raw).attrs.get("type") in REQUESTS
