"""XEP-0160: Best Practices for Handling Offline Messages, with delays by XEP-0203."""

from __future__ import annotations

import asyncio
import datetime
import secrets
import time
from functools import partial
from weakref import WeakValueDictionary

from services.router.store import KeptMessage, MessageStore
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.db import DatabaseAway
from tidings.kit.module import MESSAGE, Module, ModuleSpec, Session, Stanza
from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid
from tidings.xmpp.stanza import quoteattr

# Messages given at once to a session that comes: more would fill its send queue before it reads.
PAGE = 100
# Seconds between two tries to give a session what could not be given.
RETRY = 1.0
# The note of a session: positions of the messages that it had last, and that may wait in the store all the same.
GIVEN = "offline"

NO_STORE = frozenset((f"{{{ns.HINTS}}}no-store", f"{{{ns.HINTS}}}no-permanent-store"))


def load(module: Module) -> None:
    offline = _Offline(module)
    module.feature(ns.OFFLINE_FEATURE)
    module.on_undelivered(offline.undelivered)
    module.on_session_available(offline.available)
    module.on_session_attached(offline.attached)
    module.on_account_deleted(offline.account_deleted)
    module.on_note(offline.noted)


MODULE = ModuleSpec("offline", load, xep="XEP-0160", version="1.0.1")


class _Offline:
    def __init__(self, module: Module) -> None:
        self._module = module
        self._router = module.router
        self._messages = module.router.store(MessageStore)
        # One session of an account at a time gets what waits, so that it is not spread over several. (Two that come
        # at the same moment at two routers may share it; each message goes to one of them.)
        self._flushing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Sessions that get it later.
        self._owed: set[str] = set()

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
        await self._offer(account)
        return True

    async def _offer(self, account: Jid) -> None:
        """A session may have come while a message was being written, and have read before it; here or elsewhere."""
        if await self.noted(account, b"") is None:
            self._module.tell(str(account), b"")

    async def noted(self, account: Jid, _note: bytes) -> bytes | None:
        """Messages wait: whoever is here gets them."""
        here = [session for session in self._router.sessions(str(account)).values() if _wants(session)]
        if not here:
            return None
        await self._module.announce_available(next(filter(self._router.is_open, here), here[0]))
        return b""

    def attached(self, session: Session) -> None:
        """What was stored while the session was between two routers."""
        if _wants(session):
            self._owe(session)

    async def available(self, session: Session) -> None:
        """3.1: all that waits, in order, before anything newer."""
        if not await self._flush(session):
            self._owe(session)

    def _owe(self, session: Session) -> None:
        if session.id not in self._owed:
            self._owed.add(session.id)
            self._router.in_background(self._flush_later(session), "offline messages")

    async def _flush_later(self, session: Session) -> None:
        """The database was away, or the session between two routers: tries as long as it is here and wants them."""
        try:
            # Who stores a message from here on knows that the session is here.
            await self._router.known()
            while _wants(session) and self._router.sessions(session.account).get(session.jid.resource) is session:
                if self._router.is_open(session) and await self._catch_up(session):
                    return
                await asyncio.sleep(RETRY)
        finally:
            self._owed.discard(session.id)
        await self._offer(session.jid.bare)

    async def _catch_up(self, session: Session) -> bool:
        """Whether nothing waits any more. Nothing newer is held back before it is known that something does."""
        try:
            if not await self._messages.pending_count(session.jid.bare):
                return True
        except DatabaseAway:
            return False
        self._router.hold(session)
        try:
            return await self._flush(session)
        finally:
            self._router.release(session)

    async def _flush(self, session: Session) -> bool:
        """Whether the session has got all that waits."""
        lock = self._flushing.get(session.account) or asyncio.Lock()
        self._flushing[session.account] = lock
        try:
            async with lock:
                taken = PAGE
                while taken == PAGE:
                    taken = await self._messages.take(session.jid.bare, PAGE, partial(self._give, session))
                    if taken:
                        session.notes.pop(GIVEN, None)
        except DatabaseAway:
            return False
        return self._router.is_open(session)

    def _give(self, session: Session, messages: list[KeptMessage]) -> bool:
        """False when the session can't have them now."""
        if not self._router.is_open(session):
            return False
        had = session.notes.get(GIVEN, b"").split()
        positions = [b"%d" % kept.position for kept in messages]
        for kept, position in zip(messages, positions, strict=True):
            if position not in had:
                self._router.deliver(session, _delayed(kept, session.jid.bare))
        session.notes[GIVEN] = b" ".join(positions)
        return True

    async def account_deleted(self, account: Jid) -> None:
        await self._messages.delete_all(account)


def _wants(session: Session) -> bool:
    return session.presence is not None and session.priority >= 0


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
