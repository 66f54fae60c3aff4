"""Every IQ request gets one answer, or one error: when nobody answers in time, the server says so.

RFC 6120 8.2.3 wants an answer to each request; who asks must not wait for ever for a session, a node or a
component that has gone. An answer that comes later than the error is dropped: one answer is one answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import IQ
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import normal
from tidings.xmpp.stanza import error_stanza

if TYPE_CHECKING:
    from services.router.sessions import Session

REQUESTS = ("get", "set")

# Seconds that a request may wait for its answer: with the next look, and on its ways from and to the client, on which
# a connection may be cut for as long as it takes to notice, it has had one or an error within 30 s.
DEADLINE = 22.0
LOOK = 1.0
# Requests of one session that may wait at one time; stops a client from filling memory with questions.
MAX_ASKED = 1000


class Asked(NamedTuple):
    """A request that waits for its answer: until when, and its number among what the session has sent (0: it came
    with the session from another router).

    `again`: its router is gone, and it is about to be dealt with again; `answered`: it had its answer before that."""

    due: float
    number: int
    again: bool = False
    answered: bool = False


class IqDeadlines:
    """Watches the requests of this router's sessions."""

    def __init__(
        self,
        sessions: Callable[[], Iterable[Session]],
        answer: Callable[[Session, Envelope], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sessions = sessions
        self._answer = answer
        self._clock = clock
        # Sessions with requests under way.
        self._asking: dict[str, Session] = {}

    def asked(self, session: Session, envelope: Envelope) -> bool:
        """A request leaves for somebody else; False when it has had its answer already. Raises StanzaError when too
        many wait."""
        key = envelope.to_jid, envelope.id
        before = session.asked.pop(key, None)  # one that is asked again goes behind the others
        if before is not None and before.answered:
            return False
        if len(session.asked) >= MAX_ASKED:
            raise StanzaError("resource-constraint", "too many requests wait for their answers", type="wait")
        due = before.due if before is not None and before.again else self._clock() + DEADLINE
        session.asked[key] = Asked(due, envelope.number)
        self._asking[session.id] = session
        return True

    def again(self, session: Session, envelope: Envelope) -> None:
        """A stanza is to be dealt with again, when its turn comes."""
        key = normal(envelope.to_jid), envelope.id
        if envelope.kind == IQ and envelope.type in REQUESTS and key in session.asked:
            session.asked[key] = session.asked[key]._replace(again=True)

    def adopted(self, session: Session, left: Iterable[tuple[str, str, float]]) -> None:
        """A session came with requests under way: to whom, the id, and the seconds that are left."""
        now = self._clock()
        for to_jid, id_, seconds in left:
            session.asked[to_jid, id_] = Asked(now + seconds, 0)
        if session.asked:
            self._asking[session.id] = session

    def left(self, session: Session) -> list[tuple[str, str, float]]:
        now = self._clock()
        return [
            (to_jid, id_, max(0.0, asked.due - now))
            for (to_jid, id_), asked in session.asked.items()
            if not asked.answered
        ]

    def answered(self, session: Session, envelope: Envelope) -> Asked | None:
        """An answer came: to what; None when nobody waits for it any more."""
        key = envelope.from_jid, envelope.id
        asked = session.asked.pop(key, None)
        if asked is None or not asked.again:
            return asked
        session.asked[key] = asked._replace(answered=True)
        return None if asked.answered else asked

    def look(self) -> None:
        """Answers what has waited too long."""
        now = self._clock()
        for session in list(self._asking.values()):
            for (to_jid, id_), asked in list(session.asked.items()):
                if asked.due > now:
                    continue
                if asked.again and not asked.answered:
                    session.asked[to_jid, id_] = asked._replace(answered=True, due=now + DEADLINE)
                else:
                    del session.asked[to_jid, id_]
                if asked.answered:
                    continue
                error = StanzaError("remote-server-timeout", "no answer came in time", type="wait")
                raw = error_stanza("iq", id_, error, from_=to_jid, to=session.jid_text)
                answer = Envelope(
                    kind=IQ, type="error", id=id_, from_jid=to_jid, to_jid=session.jid_text, stanza=raw,
                    answers=asked.number,
                )  # fmt: skip
                self._answer(session, answer)
            if not session.asked:
                del self._asking[session.id]

    def ended(self, session: Session) -> None:
        self._asking.pop(session.id, None)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            self.look()
