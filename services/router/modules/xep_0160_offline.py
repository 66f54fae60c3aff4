"""XEP-0160: Best Practices for Handling Offline Messages, with delays by XEP-0203."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from services.router.archive_rules import ArchiveRules
from services.router.messages import Kept, MessageStore, written
from services.router.safety import Safety
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.db import DatabaseAway
from tidings.kit.module import MESSAGE, Module, ModuleSpec, Session, Stanza
from tidings.xmpp import ns
from tidings.xmpp.delays import delay
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid
from tidings.xmpp.stanza import append

# Messages given at once to a session that comes: more would fill its send queue before it reads.
PAGE = 100
# Seconds between two tries to give a session what could not be given.
RETRY = 1.0


def load(module: Module) -> None:
    offline = _Offline(module)
    module.feature(ns.OFFLINE_FEATURE)
    module.on_undelivered(offline.undelivered)
    module.on_session_available(offline.available)
    module.on_session_attached(offline.attached)
    module.on_session_ended(offline.ended)
    module.on_account_deleted(offline.account_deleted)
    module.on_note(offline.noted)


MODULE = ModuleSpec("offline", load, xep="XEP-0160", version="1.0.1")


class _Offline:
    def __init__(self, module: Module) -> None:
        self._module = module
        self._router = module.router
        self._messages = module.router.store(MessageStore)
        self._safety = module.router.store(Safety)
        self._rules = module.router.store(ArchiveRules)
        # Sessions that get it later.
        self._owed: set[str] = set()

    async def undelivered(self, stanza: Stanza) -> bool:
        """3: `normal` and `chat` are kept; what only says that somebody types is not."""
        account = stanza.to.bare
        await self._rules.load(account, self._router)
        message = self._safety.message(stanza.envelope, account)
        if not self._router.sessions(str(account)):
            self._rules.forget(str(account))
        if message is None or not message.pending:
            return True
        most = self._module.options.for_host(account.domain, "max-offline-messages")
        if most and await self._messages.pending_count(account) >= most:
            raise StanzaError("service-unavailable", "too many messages wait for this account")
        await self._messages.keep(message)
        await self._offer(account)
        return True

    async def _offer(self, account: Jid) -> None:
        """A session may have come while a message was being written, and have read before it; here or elsewhere."""
        given = self.noted(account, b"")
        if given is None:
            self._module.tell(str(account), b"")
        else:
            await given

    def noted(self, account: Jid, _note: bytes) -> Awaitable[bytes] | None:
        """Messages wait: whoever is here gets them, before what comes behind this note."""
        here = [session for session in self._router.sessions(str(account)).values() if _wants(session)]
        if not here:
            return None
        session = next(filter(self._router.is_open, here), here[0])
        self._router.hold(session)
        return self._give_to(session)

    async def _give_to(self, session: Session) -> bytes:
        try:
            await self._module.announce_available(session)
        finally:
            self._router.release(session)
        return b""

    def attached(self, session: Session) -> None:
        """What was stored while the session was between two routers, or without a stream."""
        if _wants(session):
            self._owe(session)

    def ended(self, session: Session, _was_available: bool) -> None:
        """What it had and has not confirmed is for the account's other sessions, when all of that is written."""
        self._router.in_background(self._offer_rest(session.jid.bare), "what a session has not confirmed")

    async def _offer_rest(self, account: Jid) -> None:
        while not await written(self._messages, RETRY):
            pass  # the database is away
        await self._offer(account)

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
        """Whether the session has got all that waits. What it is given is its own until it ends; when it has had it
        before, it does not get it again."""
        after = 0
        try:
            while self._router.is_open(session):
                kept = await self._messages.pending(session.jid.bare, session.id, PAGE, after)
                if not self._router.is_open(session):
                    break
                page = [(_delayed(message, session.jid.bare), message.id, message.given) for message in kept]
                self._router.deliver_stored(session, page)
                if not kept:
                    return True
                after = kept[-1].position
        except DatabaseAway:
            pass
        return False

    async def account_deleted(self, account: Jid) -> None:
        await self._messages.delete_all(account)


def _wants(session: Session) -> bool:
    return session.presence is not None and session.priority >= 0


def _delayed(kept: Kept, account: Jid) -> Envelope:
    """XEP-0203 4: stamped by the account's server."""
    raw = append(kept.stanza, delay(kept.received_unix_ms, account.domain))
    return Envelope(
        kind=MESSAGE, origin=kept.origin, number=kept.number, from_jid=kept.from_jid, children=["body"], stanza=raw
    )
