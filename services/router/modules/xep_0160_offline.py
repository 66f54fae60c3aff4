"""XEP-0160: Best Practices for Handling Offline Messages, with delays by XEP-0203."""

from __future__ import annotations

import asyncio
import datetime
import secrets
import time
from weakref import WeakValueDictionary

from services.router.store import KeptMessage, MessageStore
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import MESSAGE, Module, ModuleSpec, Session, Stanza
from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid
from tidings.xmpp.stanza import quoteattr

# Messages read at once when a session comes: more would fill its send queue before it reads.
PAGE = 100

NO_STORE = frozenset((f"{{{ns.HINTS}}}no-store", f"{{{ns.HINTS}}}no-permanent-store"))


def load(module: Module) -> None:
    offline = _Offline(module)
    module.feature(ns.OFFLINE_FEATURE)
    module.on_undelivered(offline.undelivered)
    module.on_session_available(offline.available)
    module.on_account_deleted(offline.account_deleted)
    module.on_note(offline.noted)


MODULE = ModuleSpec("offline", load, xep="XEP-0160", version="1.0.1")


class _Offline:
    def __init__(self, module: Module) -> None:
        self._module = module
        self._router = module.router
        self._messages = module.router.store(MessageStore)
        # One session of an account at a time gets what waits, so that nothing is offered twice.
        self._flushing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def undelivered(self, stanza: Stanza) -> bool:
        """3: `normal` and `chat` are kept; what only says that somebody types is not, nor what asks not to be."""
        children = set(stanza.children)
        if not NO_STORE.isdisjoint(children):
            return True
        states = {name for name in children if name.startswith(f"{{{ns.CHAT_STATES}}}")}
        if states and not children - states - {"thread"}:
            return True
        account = stanza.to.bare
        most = self._module.options.for_host(account.domain, "max-offline-messages")
        if most and await self._messages.pending_count(account) >= most:
            raise StanzaError("service-unavailable", "too many messages wait for this account")
        envelope = stanza.envelope
        await self._messages.keep(
            account,
            id_=secrets.token_urlsafe(16),
            from_jid=envelope.from_jid,
            received_unix_ms=envelope.received_unix_ms or int(time.time() * 1000),
            stanza=envelope.stanza,
            origin=envelope.origin,
            number=envelope.number,
        )
        # A session may have come while the message was being written, and read before it; here or elsewhere.
        if await self.noted(account, b"") is None:
            self._module.tell(str(account), b"")
        return True

    async def noted(self, account: Jid, _note: bytes) -> bytes | None:
        """A message has been stored: whoever has come meanwhile gets it."""
        for session in list(self._router.sessions(str(account)).values()):
            if session.presence is not None and session.priority >= 0:
                await self._module.announce_available(session)
                return b""
        return None

    async def available(self, session: Session) -> None:
        """3.1: all that waits, in order, before anything newer."""
        lock = self._flushing.get(session.account) or asyncio.Lock()
        self._flushing[session.account] = lock
        async with lock:
            await self._flush(session)

    async def _flush(self, session: Session) -> None:
        account = session.jid.bare
        after = 0
        while True:
            page = await self._messages.pending(account, after, PAGE)
            for kept in page:
                self._router.deliver(session, _delayed(kept, account))
            if page:
                await self._messages.delivered(account, [kept.position for kept in page])
                after = page[-1].position
            if len(page) < PAGE:
                return

    async def account_deleted(self, account: Jid) -> None:
        await self._messages.delete_all(account)


def _delayed(kept: KeptMessage, account: Jid) -> Envelope:
    """XEP-0203 4: stamped by the account's server."""
    received = datetime.datetime.fromtimestamp(kept.received_unix_ms / 1000, datetime.UTC)
    stamp = received.strftime("%Y-%m-%dT%H:%M:%S.") + f"{received.microsecond // 1000:03d}Z"
    delay = f"<delay xmlns='{ns.DELAY}' from={quoteattr(account.domain)} stamp='{stamp}'/>".encode()
    raw = kept.stanza
    end = raw.rindex(b"</message") if raw.rstrip().endswith(b">") and not raw.rstrip().endswith(b"/>") else -1
    if end < 0:
        raw = raw.rstrip()[:-2] + b">" + delay + b"</message>"
    else:
        raw = raw[:end] + delay + raw[end:]
    return Envelope(kind=MESSAGE, from_jid=kept.from_jid, stanza=raw)
