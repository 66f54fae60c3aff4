"""XEP-0198: who has what. The elements of a bound stream, and what a router asks for by itself.

Clients without XEP-0198 confirm what they got by answering a ping (XEP-0199) that was sent behind it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from services.router.safety import Safety
from services.router.sessions import Session, Sessions
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ
from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.parser import parse_stanza
from tidings.xmpp.stanza import quoteattr
from tidings.xmpp.stream_management import (
    ACK,
    ENABLE,
    REQUEST,
    REQUEST_RAW,
    RESUME,
    TooHigh,
    ack,
    count_of,
    enabled,
    failed,
    is_true,
    seconds_of,
)

if TYPE_CHECKING:
    from services.router.connector_link import ConnectorLink
    from services.router.deliveries import Deliveries

log = get_logger("router")

# Seconds between two looks at who has not confirmed what it got.
LOOK = 0.25
# Seconds for a client without XEP-0198 to confirm what it got before its stream is closed; and between two looks.
LAST_CONFIRMATION = 3.0
SOON = 0.01


class Acknowledgements:
    """Those of one router's sessions."""

    def __init__(
        self, sessions: Sessions, deliveries: Deliveries, safety: Safety, resume_timeout: Callable[[str], float]
    ) -> None:
        """`resume_timeout`: seconds, by virtual host, for which sessions wait for their clients; 0: they do not."""
        self._sessions = sessions
        self._deliveries = deliveries
        self._safety = safety
        self._resume_timeout = resume_timeout
        # Sees to it that another connector holds a copy of a session that may be resumed.
        self.cover: Callable[[Session], None] = lambda _session: None
        # Sessions that are to be told what is handled.
        self._owed: dict[str, Session] = {}
        # Sessions that got something that they have not been asked about.
        self._unasked: dict[str, Session] = {}
        # Of them, those that were pinged since the last look.
        self._asked: set[str] = set()
        # Pings are known by this.
        self._prefix = f"p{secrets.token_hex(4)}-"
        safety.on_safe = self._safe
        deliveries.on_sent = self._sent

    # --- elements of the client ---

    def nonza(self, link: ConnectorLink, session: Session, envelope: Envelope) -> None:
        """Takes a first-level element of a bound stream that is no stanza; `type` is its name, `id` its `h`."""
        name = envelope.type
        if name == REQUEST and session.inbound.counts:
            # 4: at once, whatever is under way; what becomes safe later is told later.
            _tell_h(link, session)
        elif name == ACK and session.inbound.counts:
            self._acknowledged(link, session, envelope.id)
        elif name == ENABLE:
            self._enable(link, session, envelope)
        elif name in (REQUEST, ACK, RESUME):
            # 3, 5: before <enable/> nothing is counted; who is bound has nothing to resume.
            link.write(session, failed("unexpected-request"))
        else:
            # RFC 6120 4.9.3.24.
            link.close(session.stream, "unsupported-stanza-type", name[:40])

    def _acknowledged(self, link: ConnectorLink, session: Session, h: str) -> None:
        try:
            self._safety.acknowledged(session, session.outbound.acknowledge(count_of(h)))
        except TooHigh as error:
            link.close(session.stream, error.condition, error.text, error.application)
        except StanzaError as error:
            link.close(session.stream, "policy-violation", error.text)

    def _enable(self, link: ConnectorLink, session: Session, envelope: Envelope) -> None:
        if session.inbound.counts:
            # 3: it SHALL be tried once at most.
            link.write(session, failed("unexpected-request"))
            link.close(session.stream, "policy-violation", "stream management is enabled already")
            return
        attributes = parse_stanza(envelope.stanza).attrs
        session.inbound.enable()
        session.outbound.enable()
        most = int(self._resume_timeout(session.jid.domain))
        if most and is_true(attributes.get("resume", "")):
            session.resume_seconds = min(seconds_of(attributes.get("max", "")) or most, most)
        # A copy that does not know of it is not kept when the client leaves now.
        session.changed()
        _tell_progress(link, session)
        if session.resume_seconds:
            link.write(session, enabled(session.id, session.resume_seconds, link.location))
        else:
            link.write(session, enabled())
        # At once: the node behind a client may die a moment after it has come.
        self.cover(session)

    # --- what the client is told ---

    def _safe(self, session: Session) -> None:
        session.changed()
        self._deliveries.let_go(session)
        if session.asks and session.id not in self._owed:
            if not self._owed:
                # One commit makes many safe: they are told of together.
                asyncio.get_running_loop().call_soon(self._tell)
            self._owed[session.id] = session

    def _tell(self) -> None:
        owed, self._owed = self._owed, {}
        for session in owed.values():
            link = session.link
            if link is not None:
                _tell_h(link, session)

    # --- what the client is asked ---

    def _sent(self, session: Session) -> None:
        """A session has got something that it is to confirm. A client without XEP-0198 that was not asked of late is
        asked at once: it may be about to leave, and what it has not confirmed would be offered again."""
        if session.id in self._unasked:
            return
        self._unasked[session.id] = session
        if not session.inbound.counts and not session.pinged and session.id not in self._asked:
            self._asked.add(session.id)
            asyncio.get_running_loop().call_soon(self._ping, session)

    def look(self) -> None:
        """4: asks those who have not confirmed what they got. A client without XEP-0198 is asked once it has answered
        the time before: so often as it can, and no more."""
        unasked, self._unasked = self._unasked, {}
        self._asked.clear()
        for session in unasked.values():
            if session.outbound.asked >= session.outbound.sent or session.link is None:
                continue
            if session.inbound.counts:
                self.ask(session)
            elif not session.pinged and not self._ping(session):
                self._unasked[session.id] = session

    def begin_again(self, session: Session) -> None:
        """A session was taken over from a router that is gone: what its client has asked or said, and what it was
        asked, may be lost."""
        if session.link is None:
            return
        if session.inbound.counts:
            _tell_h(session.link, session)
            if session.outbound.queue:
                self.ask(session)
        else:
            self.moved(session)

    def moved(self, session: Session) -> None:
        """A session has come from another router. A client without XEP-0198 answers to what that one has asked, which
        says nothing here; and who is behind gets nothing that it would be asked about."""
        if session.link is not None and session.outbound.queue and not session.inbound.counts:
            self._sent(session)

    def ask(self, session: Session) -> None:
        session.outbound.asked = session.outbound.sent
        assert session.link is not None
        session.link.write(session, REQUEST_RAW)

    def _ping(self, session: Session) -> bool:
        if session.pinged or not self._deliveries.is_open(session):
            return False
        number = session.outbound.sent
        id_, to = f"{self._prefix}{number}", session.jid_text
        raw = (
            f"<iq type='get' id='{id_}' from={quoteattr(session.jid.domain)} to={quoteattr(to)}>"
            f"<ping xmlns='{ns.PING}'/></iq>"
        ).encode()
        session.pinged = number
        self._deliveries.deliver(session, Envelope(kind=IQ, type="get", id=id_, to_jid=to, stanza=raw))
        session.outbound.asked = session.outbound.sent
        return True

    async def confirmed(self, session: Session) -> None:
        """Waits, not for long, until a client without XEP-0198 has confirmed all messages that it got: the others
        would be offered again to its next session."""
        deadline = asyncio.get_running_loop().time() + LAST_CONFIRMATION
        while session.outbound.queue and self._deliveries.is_open(session):
            if asyncio.get_running_loop().time() > deadline:
                log.debug("not_confirmed", session=session.id, messages=len(session.outbound.queue))
                return
            self._ping(session)
            await asyncio.sleep(SOON)

    def is_answer(self, session: Session, envelope: Envelope) -> bool:
        """Whether an IQ to the server answers a ping of it, with a result or an error; then it has had its effect."""
        number = envelope.id.removeprefix(self._prefix)
        if not session.pinged or number == envelope.id or number != str(session.pinged):
            return False
        session.pinged = 0
        self._safety.acknowledged(session, session.outbound.confirm(int(number)))
        if session.outbound.asked < session.outbound.sent:
            self._sent(session)
        return True

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            self.look()


def _tell_progress(link: ConnectorLink, session: Session) -> None:
    """Its copies, if there are any, learn of what has changed before the client does."""
    if session.holder is not None:
        session.holder.tell_progress()
        link.tell_progress()


def _tell_h(link: ConnectorLink, session: Session) -> None:
    # What is told to be handled, a copy need not keep.
    _tell_progress(link, session)
    link.write(session, ack(session.inbound.h))
    session.asks = session.inbound.is_behind
