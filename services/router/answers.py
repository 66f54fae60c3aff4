"""What the server says itself: answers to requests, and errors (RFC 6120 8)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

from services.router.deliveries import Deliveries
from services.router.sessions import Session, Sessions, when_all_have_it
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.flows import Waiter
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ, KIND_NAMES, PRESENCE, Stanza, Where
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid, JidError
from tidings.xmpp.stanza import error_stanza, iq_result

if TYPE_CHECKING:
    from tidings.kit.module import Hooks

log = get_logger("router")

# What dealing with a stanza returns: None when it is done, or something to wait for.
Pending = Awaitable[None] | None


class Components(Protocol):
    """The component services that are attached, as the routing sees them."""

    def send(self, domain: str, envelope: Envelope) -> bool:
        """Hands a stanza to the component of a domain; False when none serves it."""

    def send_for_account(self, envelope: Envelope) -> bool:
        """Hands an IQ for an account to the component that serves its payload's namespace, if any."""


class Answers:
    """Answers and errors of one router."""

    def __init__(
        self,
        sessions: Sessions,
        hooks: Hooks,
        components: Components,
        deliveries: Deliveries,
        step: Callable[[], AbstractAsyncContextManager[None]],
        sender: Callable[[Envelope], Waiter | None],
        elsewhere: Callable[[Envelope, Jid, Waiter | None], None],
    ) -> None:
        """`step`: what a handler sends within it has arrived when it ends. `sender`: who waits until a stanza of a
        session here is safe. `elsewhere`: sends an answer to somebody who has no session here."""
        self._sessions = sessions
        self._hooks = hooks
        self._components = components
        self._deliveries = deliveries
        self._step = step
        self._sender = sender
        self._elsewhere = elsewhere
        # Errors that were sent, for metrics.
        self.bounced = 0

    def request(self, envelope: Envelope, where: Where, session: Session | None) -> Pending:
        """Has a module answer an IQ request for the server or an account. Raises StanzaError."""
        handler = self._hooks.iq.get((where, envelope.type, envelope.children[0]))
        if handler is None:
            if where is Where.ACCOUNT and self._components.send_for_account(envelope):
                return None
            raise StanzaError("service-unavailable")
        request = Stanza(envelope, session)
        answer = handler(request)
        if isinstance(answer, bytes):
            self._answer(request, answer)
            return None
        return self._answer_later(request, answer)

    async def _answer_later(self, request: Stanza, answer: Awaitable[bytes]) -> None:
        envelope = request.envelope
        try:
            async with self._step():
                payload = await answer
            self._answer(request, payload)
        except (StanzaError, JidError, DatabaseAway) as error:
            self.refuse(envelope, error)
        except Exception:
            self.failed(envelope)

    def _answer(self, request: Stanza, payload: bytes) -> None:
        envelope = request.envelope
        # RFC 6120 8.1.2.1: the answer comes from where the request went; one without `to` went to the
        # sender's own account, and its answer may leave `from` out.
        raw = iq_result(envelope.id, envelope.from_jid, envelope.to_jid, payload)
        self._reply(envelope, "result", raw)
        if request.after is not None:
            try:
                request.after()
            except Exception:
                # It has its answer; an error would be a second one.
                log.exception("work_after_answer_failed", children=list(envelope.children))

    def refuse(
        self, envelope: Envelope, error: Exception, asker: Session | None = None, waiter: Waiter | None = None
    ) -> None:
        """Sends an error back, unless that is forbidden (RFC 6120 8.3.1: none in answer to an error).

        `asker`: the session that sent it, when nobody has noted yet that it waits for an answer. `waiter`: who waits
        at another router until the stanza is safe: it is when the error is there.
        """
        if isinstance(error, DatabaseAway):
            error = StanzaError("resource-constraint", "the server's storage does not answer", type="wait")
        elif isinstance(error, JidError):
            error = StanzaError("jid-malformed")
        assert isinstance(error, StanzaError)
        if envelope.type == "error" or (envelope.kind == IQ and envelope.type == "result"):
            return
        if envelope.kind == PRESENCE and error.condition in ("service-unavailable",):
            return
        self.bounced += 1
        raw = error_stanza(_name(envelope), envelope.id, error, from_=envelope.to_jid, to=envelope.from_jid)
        self._reply(envelope, "error", raw, asker, waiter)

    def failed(self, envelope: Envelope, waiter: Waiter | None = None) -> None:
        """Called while an exception is handled that nobody has foreseen."""
        log.exception("stanza_failed", kind=_name(envelope), children=list(envelope.children))
        self.refuse(envelope, StanzaError("internal-server-error"), waiter=waiter)

    def _reply(
        self, envelope: Envelope, type_: str, raw: bytes, asker: Session | None = None, waiter: Waiter | None = None
    ) -> None:
        """Sends an answer to whoever sent the stanza; what can't be delivered then is dropped."""
        if not envelope.from_jid:
            return  # the server itself sent it: a roster push, for example
        reply = Envelope(
            kind=envelope.kind, type=type_, id=envelope.id,
            from_jid=envelope.to_jid, to_jid=envelope.from_jid, stanza=raw, answers=envelope.number,
            target=envelope.origin,
        )  # fmt: skip
        if asker is not None:
            asker.inbound.answered(envelope.number)
            self._deliveries.deliver(asker, reply)
            self._safe_when_copied(asker, envelope)
            return
        to = Jid.parse(envelope.from_jid)
        session = self._sessions.of(str(to.bare)).get(to.resource)
        if session is None:
            self._elsewhere(reply, to, waiter)
            return
        self._deliveries.to_session(session, reply)
        if session.id == envelope.origin:
            self._safe_when_copied(session, envelope)

    def _safe_when_copied(self, session: Session, envelope: Envelope) -> None:
        """What was answered is safe when the answer is where the session would go on from: it is stored nowhere. One
        connector that has both learns of both in their order; where the stream's gets the answer behind another one,
        it must not forget the question before."""
        sender = self._sender(envelope) if session.uncopied or session.old_copies else None
        if sender is not None:
            when_all_have_it(session, lambda _copied: sender.settle())


def _name(envelope: Envelope) -> str:
    return KIND_NAMES.get(envelope.kind, "message")
