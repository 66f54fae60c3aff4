"""A session as the record that another router carries it on from (common.v1 SessionRecord), and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from services.router.sessions import BEHIND, DOUBTFUL, Session
from tidings.api.common.v1.session_pb2 import AskedIq, SessionFlags, SessionRecord, UnconfirmedMessage
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import PRESENCE
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream_management import Sent


def state_of(session: Session) -> SessionRecord:
    """All but the queues, and what follows from them and from what is delivered."""
    record = SessionRecord(
        id=session.id, epoch=session.epoch, jid=session.jid_text, lang=session.lang,
        counts=session.inbound.counts, counted_after=session.inbound.before,
        sent_before_counting=session.outbound.base,
        directed_presence=sorted(session.directed),
        flags=SessionFlags(interested=session.interested, priority=session.priority),
        resume_seconds=session.resume_seconds, connector_incarnation=session.connector, notes=session.notes,
    )  # fmt: skip
    if session.presence is not None:
        record.presence.kind = PRESENCE
        record.presence.stanza = session.presence
    return record


def record_of(session: Session, asked: Iterable[tuple[str, str, float]], left: float = 0.0) -> SessionRecord:
    """`asked`: its IQ requests that wait for an answer: to whom, the id, and the seconds that are left. `left`:
    seconds for which it still waits for its client, when its stream has broken. What it has sent and is not passed is
    not in it, but for what its client may repeat."""
    inbound, outbound = session.inbound, session.outbound
    record = state_of(session)
    record.handled, record.passed = inbound.handled, inbound.position
    record.number = inbound.last if inbound.counts else inbound.safe_through
    record.sent, record.acknowledged = outbound.sent, outbound.acknowledged
    record.taken.update(session.taken)
    record.since.update(session.since)
    record.resume_left = left
    record.asked.extend(AskedIq(to_jid=to, id=id_, left=left) for to, id_, left in asked)
    for sent in inbound.repeatable():
        record.unconfirmed.add(
            number=sent.number, kind=sent.kind, id=sent.id, to_jid=sent.to, stanza=sent.raw,
            answered=inbound.is_known_done(sent),
        )  # fmt: skip
    for number, id_ in session.unmarked:
        record.unconfirmed_messages.add(delivery=number, id=id_)
    for number, what in outbound.queue:
        if isinstance(what, Envelope):
            record.unacknowledged.add().CopyFrom(what)
            record.unacknowledged[-1].delivery = number
        else:
            record.unconfirmed_messages.append(UnconfirmedMessage(delivery=number, id=what))
    return record


def session_of(
    record: SessionRecord, stream: int, spawn: Callable[[Any, str], Any], doubtful: bool = False
) -> Session:
    """The session under the next epoch, without its connector's link. `doubtful`: its router is gone; it is not known
    what of that was dealt with which is not safe. Raises JidError."""
    session = Session(Jid.parse(record.jid), record.lang, None, stream, spawn)
    session.id = record.id
    session.epoch = record.epoch + 1
    session.connector = record.connector_incarnation
    session.taken, session.since = dict(record.taken), dict(record.since)
    session.fresh = False
    session.directed = set(record.directed_presence)
    session.interested = record.flags.interested
    session.priority = record.flags.priority
    session.notes = dict(record.notes)
    session.behind = deque() if BEHIND in session.notes else None
    session.doubtful = DOUBTFUL in session.notes
    session.presence = record.presence.stanza if record.HasField("presence") else None
    session.resume_seconds = record.resume_seconds
    inbound, outbound = session.inbound, session.outbound
    inbound.number = record.number
    if record.counts:
        inbound.enable()
        inbound.before, inbound.handled = record.counted_after, record.handled
        if record.unconfirmed:
            inbound.carry_on(
                [
                    Sent(one.number, one.kind, one.id, one.to_jid, one.stanza, one.answered)
                    for one in record.unconfirmed
                ],
                doubtful,
            )
        inbound.last = record.number
    outbound.sent = outbound.asked = record.sent
    outbound.acknowledged = session.marked = record.acknowledged
    outbound.base = record.sent_before_counting
    queue: list[tuple[int, Envelope | bytes]] = [(one.delivery, one) for one in record.unacknowledged]
    # What came before <enable/> is confirmed with the first stanza that counts, not by the number.
    confirmed = record.acknowledged if record.acknowledged > outbound.base else 0
    for one in record.unconfirmed_messages:
        (queue if one.delivery > confirmed else session.unmarked).append((one.delivery, one.id))
    if queue:
        # It came in one message, which is no longer than the queue itself.
        outbound.queue = deque(sorted(queue, key=lambda entry: entry[0]))
        outbound.asked = outbound.acknowledged
    return session
