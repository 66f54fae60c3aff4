"""When a stanza of a session is safe, and what is written for that.

A message is safe when what `--message-durability` asks for has happened: only then it counts in the `h` that its
sender is told (XEP-0198 4), and only then the answers to later stanzas of a sender without XEP-0198 go out. Delivery
does not wait for it. With `database` it is stored, as one that waits for its account, by a commit in which it is one
of many; it waits no longer when a session of the account has acknowledged it. Other stanzas are safe when they are
dealt with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from services.router.message_queue import Superseded
from services.router.messages import Message, MessageStore, id_text, message_id, wanted
from services.router.offers import Offers
from tidings.kit.logging import get_logger
from tidings.kit.module import MESSAGE
from tidings.xmpp import stanza_ids
from tidings.xmpp.jid import Jid
from tidings.xmpp.stanza_ids import STANZA_ID
from tidings.xmpp.stream_management import Sent

if TYPE_CHECKING:
    from services.router.archive_rules import ArchiveRules
    from services.router.sessions import Session, Sessions
    from tidings.api.common.v1.stanza_pb2 import Envelope
    from tidings.cluster.flows import Waiter

log = get_logger("router")

# Bytes that may wait while the database takes what it is given; more would only make everybody wait for longer.
BUSY_LIMIT = 16_777_216
# Stanzas of its own that may wait when a session is not held up all the same: it is for those who send much.
FAIR = 4
# Below this part of the limit, sockets are read again; and the seconds between two looks.
RELIEF = 0.5
LOOK = 0.5
# Seconds for what is being written for an account, before more for it goes to another router; and between two looks.
OFFERED = 2.0
SOON = 0.02


class Safety:
    """Knows of each stanza of this router's sessions whether it is safe."""

    def __init__(
        self,
        sessions: Sessions,
        messages: MessageStore,
        durability: str,
        limit: int,
        rules: ArchiveRules,
    ) -> None:
        """`limit`: bytes that may wait for the database while that is away, before sockets are not read any more."""
        self._sessions = sessions
        self._messages = messages
        self._rules = rules
        self._limit = limit
        self.offers = Offers(sessions)
        # Whether a sender waits until its messages are safe; and whether that is the case when two processes hold
        # them, where two hold the session that gets one: else it waits for the database.
        self.waits = durability != "none"
        self.memory = durability == "memory"
        self._key = b""
        # Told of a session when more of what it sent is safe.
        self.on_safe: Callable[[Session], None] = lambda _session: None
        # Told of a session whose client has confirmed something.
        self.on_confirmed: list[Callable[[Session, Sequence[bytes]], None]] = []
        # Bytes of messages that other routers have and have not said to be safe.
        self.waiting_elsewhere: Callable[[], int] = lambda: 0
        # Whether another router has taken something of a flow, and has not said that it is safe.
        self.is_unsafe_elsewhere: Callable[[tuple[str, ...]], bool] = lambda _flow: False
        # What ends the waiting of sessions that send nothing until the database has caught up.
        self._relieved: asyncio.Future[None] | None = None
        # The message that was looked at last, for which account, and its id if it is kept: each is asked for again at
        # once, when it is delivered.
        self._last: Envelope | None = None
        self._last_account = ""
        self._last_id: bytes | None = None
        self._seen: Envelope | None = None
        self._seen_wanted = (False, False)

    def start(self, key: bytes) -> None:
        """`key`: 32 bytes that all routers share, from which the ids of messages are made."""
        self._key = key

    # --- what comes from a session ---

    def accept(self, session: Session, envelope: Envelope) -> bool:
        """Gives a stanza its number, at once when it comes. False when it repeats one that is dealt with here, or
        will be."""
        inbound = session.inbound
        if inbound.counts:
            kind, id_, to, raw = envelope.kind, envelope.id, envelope.to_jid, envelope.stanza
            if inbound.may_repeat and (number := inbound.repeated(kind, id_, to, raw)):
                if inbound.revived != number:
                    self.on_safe(session)
                    return False
                inbound.revived = 0  # the router that had it is gone, and may not have dealt with it
            else:
                number = inbound.take()
                inbound.count(Sent(number, kind, id_, to, raw))
        elif self.waits or session.holder is not None:
            number = inbound.take()
        else:
            # Nobody will ask.
            number = inbound.number = inbound.number + 1
        envelope.number = number
        envelope.origin = session.id
        return True

    def dealt(self, session: Session, number: int) -> None:
        """A stanza is where it has to go, or refused; what is written for it may still be under way."""
        inbound = session.inbound
        if (self.waits or inbound.counts or session.holder is not None) and inbound.settle(number):
            self.on_safe(session)

    # --- what is written ---

    def kept_as(self, envelope: Envelope, account: Jid) -> bytes | None:
        """The id of a message that waits in the store until a session of the account has acknowledged it."""
        if not self.waits and self._rules.idle:
            return None
        if envelope is self._last and account.bare_text == self._last_account:
            return self._last_id
        if envelope.kind != MESSAGE or not envelope.number:
            return None
        pending, archived = wanted(envelope.type, envelope.children)
        if not pending or not (self.waits or (archived and self._rules.archives(account, envelope.from_jid))):
            return None
        return message_id(self._key, account.bare_text, envelope.origin, envelope.number)

    def sent(self, session: Session, envelope: Envelope, to: Jid) -> None:
        """A message leaves: it goes into the sender's archive, for which nobody waits: it may come back as an error,
        also while the database is away. Nobody else's word on where it is archived goes with it (XEP-0359 3)."""
        if self._rules.idle:
            return
        account = session.jid.bare
        children = envelope.children
        if STANZA_ID in children:
            accounts = (account.bare_text, to.bare_text)
            envelope.stanza = stanza_ids.remove_forged(envelope.stanza, accounts)
        if account.bare_text == to.bare_text or not self._rules.archives(account, str(to)):
            return  # what somebody sends to themselves has its place there as received
        if self._wanted(envelope, children)[1]:
            id_ = message_id(self._key, account.bare_text, envelope.origin, envelope.number)
            self._messages.write(_message(envelope, account, id_, str(to), False, True, ""), self._written)

    def waiter(self, envelope: Envelope) -> Waiter | None:
        """Who waits until a message of a session of this router is safe; it expects what its caller has in hand."""
        return self.sender(envelope) if self.waits and envelope.kind == MESSAGE else None

    def sender(self, envelope: Envelope) -> Waiter | None:
        """The same, for any stanza, whatever is to happen to messages."""
        session = self._sessions.get(envelope.origin)
        if session is None or not envelope.number:
            return None
        waiter = _Sender(self, session, envelope.number)
        waiter.expect()
        return waiter

    def given(
        self,
        envelope: Envelope,
        account: Jid,
        holder: str,
        waiter: Waiter | None = None,
        copied: bool = False,
        passes: bool = False,
    ) -> Callable[[bool], None] | None:
        """A session of an account gets a message, and perhaps others too: it is written, and if it goes into the
        archive the receivers are told its id. Call it before it is delivered.

        `waiter`: who waits until it is safe, if that is not the session that has sent it. `copied`: the receiver's
        copy gets it now, and `passes`: now or soon; where that makes it safe, what is returned is to be called then,
        with whether there is a copy (`when_all_have_it`).
        """
        if not self.waits and self._rules.idle:
            return None
        message = self.message(envelope, account, holder, self.waits)
        if message is None:
            if not passes:
                return None
        elif not copied or not self.memory:
            self._write(message, waiter)
            return None
        if waiter is None and self.waits and envelope.number:
            waiter = self._sender(envelope.origin, envelope.number)
        if waiter is None:
            if message is not None:
                self._messages.write(message, self._written)
            return None
        waiter.expect()
        if message is None:
            # What is stored for nobody must not be lost either with the router of a session that goes on.
            settle = waiter.settle
            return lambda _copied: settle()
        by_either = _Either(waiter)
        self._messages.write(message, partial(self._written, message=message, waiter=by_either))
        return by_either.copied

    def _sender(self, origin: str, number: int) -> Waiter | None:
        session = self._sessions.get(origin)
        return _Sender(self, session, number) if session is not None else None

    def message(self, envelope: Envelope, account: Jid, holder: str = "", waits: bool = True) -> Message | None:
        """An account's copy of a message; None when it is not to be kept. From here on the stanza has the id of the
        archive in it (XEP-0359 3), and none that somebody else has put in.

        `waits`: whether it is kept for the sake of sessions that come later, if it is not for the archive.
        """
        children = envelope.children
        if STANZA_ID in children:
            envelope.stanza = stanza_ids.remove_forged(envelope.stanza, (account.bare_text,))
        pending, archived = self._wanted(envelope, children)
        archived = archived and self._rules.archives(account, envelope.from_jid)
        self._last, self._last_account, self._last_id = envelope, account.bare_text, None
        if not archived and not (pending and waits):
            return None
        id_ = message_id(self._key, account.bare_text, envelope.origin, envelope.number)
        if pending:
            self._last_id = id_
        if archived:
            envelope.stanza = stanza_ids.add(envelope.stanza, account.bare_text, id_text(id_))
            children.append(STANZA_ID)
        return _message(envelope, account, id_, envelope.from_jid, pending, archived, holder)

    def _wanted(self, envelope: Envelope, children: Collection[str]) -> tuple[bool, bool]:
        """The same for sender and receiver, which come one behind the other."""
        if envelope is not self._seen:
            self._seen, self._seen_wanted = envelope, wanted(envelope.type, children)
        return self._seen_wanted

    def _write(self, message: Message, waiter: Waiter | None = None) -> None:
        if not self.waits:
            self._messages.write(message, self._written)
        elif waiter is not None:
            waiter.expect()
            self._messages.write(message, partial(self._written, message=message, waiter=waiter))
        else:
            sender = self._sessions.get(message.origin)
            if sender is not None:
                sender.inbound.expect(message.number)
            self._messages.write(message, partial(self._written, message=message, sender=sender))

    def _written(
        self,
        error: Exception | None,
        message: Message | None = None,
        waiter: Waiter | None = None,
        sender: Session | None = None,
    ) -> None:
        if isinstance(error, Superseded):
            return  # whose session it was is another router's, or another router has its message
        if error is not None:
            # It is not safe, and will never be: its sender is not told that it is.
            log.error("message_not_stored", reason=str(error))
        elif message is not None:
            if self.offers.is_due(message.holder):
                then = partial(self._settle, message.number, waiter, sender)
                self.offers.when_offered(message.account, message.holder, then)
            else:
                self._settle(message.number, waiter, sender)
        self.look()

    def _settle(self, number: int, waiter: Waiter | None, sender: Session | None) -> None:
        if waiter is not None:
            waiter.settle()
        elif sender is not None and sender.inbound.settle(number):
            self.on_safe(sender)

    async def offered(self, account: Jid) -> None:
        """Waits, not for long, until what is written here for an account is committed, and offered where its session
        has gone: what goes to it elsewhere from now on came behind that."""
        await _while(lambda: self._messages.is_writing_for(account) or self.offers.owes(account))

    async def safe_elsewhere(self, flow: tuple[str, ...]) -> bool:
        """Waits, not for long, until what other routers have taken of a flow is safe: one may have given it to a
        session that has just ended, and stores it. What comes behind it goes elsewhere, and must not come first.
        Whether there was something to wait for."""
        return await _while(lambda: self.is_unsafe_elsewhere(flow))

    def acknowledged(self, session: Session, what: list[Envelope | bytes]) -> None:
        """A session has what it was given."""
        account = session.jid.bare
        ids = [one if isinstance(one, bytes) else self.kept_as(one, account) for one in what]
        kept = [id_ for id_ in ids if id_ is not None]
        if kept:
            self._messages.delivered(account, kept)
        if what:
            for told in self.on_confirmed:
                told(session, kept)

    # --- back-pressure ---

    @property
    def waiting_bytes(self) -> int:
        """What the senders of this router wait for: here, and at other routers."""
        return self._messages.waiting_bytes + self.waiting_elsewhere()

    def _bound(self) -> int:
        return self._limit if self._messages.away else min(self._limit, BUSY_LIMIT)

    def relief(self, session: Session) -> Awaitable[None] | None:
        """What a session that has sent a message is to wait for before the next one is taken: the database, or
        another router, is behind. Its socket is not read meanwhile."""
        if not self._limit or (self._relieved is None and self.waiting_bytes <= self._bound()):
            return None
        inbound = session.inbound
        if self.waits and inbound.number - inbound.safe_through <= FAIR:
            return None
        if self._relieved is None:
            loop = asyncio.get_running_loop()
            self._relieved = loop.create_future()
            loop.call_later(LOOK, self._look_again, self._relieved)
        return asyncio.shield(self._relieved)

    def look(self) -> None:
        """Less may wait now."""
        if self._relieved is not None and self.waiting_bytes <= self._bound() * RELIEF:
            relieved, self._relieved = self._relieved, None
            relieved.set_result(None)

    def _look_again(self, relieved: asyncio.Future[None]) -> None:
        """What other routers say is seen here, and what is waited for without a message."""
        self.look()
        if relieved is self._relieved:
            asyncio.get_running_loop().call_later(LOOK, self._look_again, relieved)


class _Sender:
    """The sender of a message as one that waits until it is safe (`tidings.cluster.flows.Waiter`)."""

    __slots__ = ("_number", "_safety", "_session")

    def __init__(self, safety: Safety, session: Session, number: int) -> None:
        self._safety = safety
        self._session = session
        self._number = number

    def expect(self) -> None:
        self._session.inbound.expect(self._number)

    def settle(self) -> None:
        if self._session.inbound.settle(self._number):
            self._safety.on_safe(self._session)
        self._safety.look()


class _Either:
    """Who waits for a message that is safe when it is written, or when two hold it: whichever comes first."""

    __slots__ = ("_waiter",)

    def __init__(self, waiter: Waiter) -> None:
        self._waiter: Waiter | None = waiter

    def expect(self) -> None: ...

    def settle(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.settle()

    def copied(self, copied: bool) -> None:
        if copied:
            self.settle()


async def _while(waits: Callable[[], bool]) -> bool:
    """Waits, not for long, while something is so; whether it was."""
    waited = False
    with suppress(TimeoutError):
        async with asyncio.timeout(OFFERED):
            while waits():
                waited = True
                await asyncio.sleep(SOON)
    return waited


def _message(
    envelope: Envelope, account: Jid, id_: bytes, peer: str, pending: bool, archived: bool, holder: str
) -> Message:
    return Message(
        account, id_, peer, envelope.origin, envelope.number, envelope.from_jid, envelope.received_unix_ms,
        envelope.stanza, pending, archived, holder,
    )  # fmt: skip
