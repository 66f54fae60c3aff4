"""XEP-0160: Best Practices for Handling Offline Messages, with delays by XEP-0203 (see read_back.py)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable
from typing import cast

from services.router.archive_rules import ArchiveRules
from services.router.backlogs import Backlogs
from services.router.deliveries import Deliveries, wants_stored
from services.router.messages import MessageStore, written
from services.router.read_back import ReadBack
from services.router.safety import Safety
from services.router.sessions import Session as OwnSession
from tidings.kit.module import Module, ModuleSpec, Session, Stanza
from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid


def load(module: Module) -> None:
    offline = _Offline(module)
    module.feature(ns.OFFLINE_FEATURE)
    module.on_undelivered(offline.undelivered)
    module.on_session_started(offline.started)
    module.on_session_available(offline.available)
    module.on_session_attached(offline.attached)
    module.on_session_ended(offline.ended)
    module.on_session_left(offline.left)
    module.on_account_deleted(offline.account_deleted)
    module.on_note(offline.noted)


# A router takes this part of the room that an account has left before it counts again: others may take as much
# meanwhile. And accounts whose room is remembered; of more, those that got nothing for longest are counted anew.
SHARE = 8
MAX_REMEMBERED = 10_000

MODULE = ModuleSpec("offline", load, xep="XEP-0160", version="1.0.1")


class _Offline:
    def __init__(self, module: Module) -> None:
        self._module = module
        self._router = module.router
        self._messages = module.router.store(MessageStore)
        self._safety = module.router.store(Safety)
        self._rules = module.router.store(ArchiveRules)
        self._backlogs = module.router.store(Backlogs)
        self._safety.offers.offer = self._offer
        # By account: how many more it may store before it counts.
        self._room: OrderedDict[Jid, int] = OrderedDict()
        # Sessions that have not come to what is stored for them yet.
        self._coming: set[str] = set()
        self._read_back = ReadBack(self._router, self._messages, module.router.store(Deliveries), self._offer)
        self._safety.on_confirmed.append(self._read_back.confirmed)

    async def undelivered(self, stanza: Stanza) -> bool:
        """3: `normal` and `chat` are kept; what only says that somebody types is not."""
        account = stanza.to.bare
        await self._rules.load(account, self._router)
        message = self._safety.message(stanza.envelope, account)
        if not self._router.sessions(str(account)):
            self._rules.forget(str(account))
        if message is None or not message.pending:
            return True
        if not await self._has_room(account):
            raise StanzaError("service-unavailable", "too many messages wait for this account")
        await self._messages.keep(message)
        await self._offer(account)
        return True

    async def _has_room(self, account: Jid) -> bool:
        """Whether one more may wait for an account, which is then taken for waiting."""
        most = self._module.options.for_host(account.domain, "max-offline-messages")
        if not most:
            return True
        room = self._room.pop(account, 0)
        if not room:
            left = most - await self._messages.pending_count(account)
            if left <= 0:
                return False
            room = max(1, left // SHARE)
        if room > 1:
            self._room[account] = room - 1
            if len(self._room) > MAX_REMEMBERED:
                self._room.popitem(last=False)
        return True

    async def _offer(self, account: Jid) -> None:
        """A session may have come while a message was being written, and have read before it; here or elsewhere."""
        given = self.noted(account, b"")
        if given is None:
            await self._module.tell_bound(str(account), b"")
        elif not isinstance(given, bytes):
            await given

    def noted(self, account: Jid, _note: bytes) -> bytes | Awaitable[bytes] | None:
        """Messages wait: whoever is here gets them, before what comes behind this note. Who is only coming gets them
        behind what other routers have still to write."""
        sessions = list(self._router.sessions(str(account)).values())
        for own in map(_own, sessions):
            if own.doubtful:
                self._read_back.look_again(own)
        here = [session for session in sessions if wants_stored(_own(session))]
        if not here:
            return None
        here = [session for session in here if _own(session).id not in self._coming]
        if not here:
            return b""
        session = next(filter(self._router.is_open, here), here[0])
        self._router.hold(session)
        return self._give_to(session)

    async def _give_to(self, session: Session) -> bytes:
        try:
            # Who stores a message from here on knows that somebody is here.
            await self._router.known()
            await self._give(session)
        finally:
            self._router.release(session)
        return b""

    def attached(self, session: Session) -> None:
        """What was stored while the session was between two routers, or without a stream."""
        own = _own(session)
        if wants_stored(own) or own.behind is not None:
            self._read_back.owe(own)
            self._read_back.confirmed(own)

    def started(self, session: Session) -> None:
        self._coming.add(_own(session).id)

    def ended(self, session: Session, _was_available: bool) -> None:
        """What it had and has not confirmed is for the account's other sessions, when all of that is written."""
        self._coming.discard(_own(session).id)
        self._router.in_background(self._offer_rest(session.jid.bare), "what a session has not confirmed")

    def left(self, session: Session) -> None:
        """Another router took it over while this one stood still, or was cut off: what this one has stored for it
        since, that one has not given."""
        self._coming.discard(_own(session).id)
        if _own(session).closed:
            self._router.in_background(self._offer_rest(session.jid.bare), "what is another router's to give")

    async def _offer_rest(self, account: Jid) -> None:
        await written(self._messages, math.inf)
        await self._offer(account)

    async def available(self, session: Session) -> None:
        """3.1: all that waits, in order, before anything newer; also what is only being written: the account's last
        session was given it, and has not confirmed it."""
        try:
            await self._backlogs.written(session.jid.bare)
        finally:
            self._coming.discard(_own(session).id)
        await self._give(session)

    async def _give(self, session: Session) -> None:
        if not await self._read_back.flush(_own(session)):
            self._read_back.owe(_own(session))

    async def account_deleted(self, account: Jid) -> None:
        await self._messages.delete_all(account)


def _own(session: Session) -> OwnSession:
    """The router's sessions are what modules see of them."""
    return cast(OwnSession, session)
