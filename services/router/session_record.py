"""A session as the record that another router carries it on from (common.v1 SessionRecord), and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from services.router.sessions import Session
from tidings.api.common.v1.session_pb2 import AskedIq, SessionFlags, SessionRecord
from tidings.kit.module import PRESENCE
from tidings.xmpp.jid import Jid


def record_of(session: Session, asked: Iterable[tuple[str, str, float]]) -> SessionRecord:
    """`asked`: its IQ requests that wait for an answer: to whom, the id, and the seconds that are left."""
    record = SessionRecord(
        id=session.id, epoch=session.epoch, jid=session.jid_text, lang=session.lang, sent=session.delivered,
        number=session.number, taken=session.taken, directed_presence=sorted(session.directed),
        flags=SessionFlags(interested=session.interested, priority=session.priority),
        connector_incarnation=session.connector, notes=session.notes,
        asked=[AskedIq(to_jid=to, id=id_, left=left) for to, id_, left in asked],
    )  # fmt: skip
    if session.presence is not None:
        record.presence.kind = PRESENCE
        record.presence.stanza = session.presence
    return record


def session_of(record: SessionRecord, stream: int, spawn: Callable[[Any, str], Any]) -> Session:
    """The session under the next epoch, without its connector's link. Raises JidError."""
    session = Session(Jid.parse(record.jid), record.lang, None, stream, spawn)
    session.id = record.id
    session.epoch = record.epoch + 1
    session.connector = record.connector_incarnation
    session.number = record.number
    session.delivered = record.sent
    session.taken = dict(record.taken)
    session.directed = set(record.directed_presence)
    session.interested = record.flags.interested
    session.priority = record.flags.priority
    session.notes = dict(record.notes)
    session.presence = record.presence.stanza if record.HasField("presence") else None
    return session
