"""Messages that wait in the store are read back for sessions: for one that comes, and for one that does not read as
fast as others write (it is *behind*, see deliveries.py). Nobody gets more than its client may leave unconfirmed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, cast

from services.router.deliveries import Deliveries, wants_stored
from services.router.first_presence import is_settling
from services.router.messages import Kept, MessageStore, written
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.db import DatabaseAway
from tidings.kit.module import MESSAGE
from tidings.xmpp.delays import delay
from tidings.xmpp.jid import Jid
from tidings.xmpp.stanza import append

if TYPE_CHECKING:
    from services.router.sessions import Session
    from tidings.kit.module import RouterPort

# Messages given at once: more would hold up everybody else.
PAGE = 100
# Seconds between two tries to give a session what could not be given.
RETRY = 1.0
# Seconds in which a client for which messages wait must confirm something; then its stream is closed. Stops clients
# that never read from holding what they were sent.
CONFIRM_TIMEOUT = 60.0


class ReadBack:
    """Gives the sessions of one router what is stored for them."""

    def __init__(
        self,
        router: RouterPort,
        messages: MessageStore,
        deliveries: Deliveries,
        offer: Callable[[Jid], Awaitable[None]],
    ) -> None:
        """`offer`: tells whoever is there of an account that messages wait."""
        self._router = router
        self._messages = messages
        self._deliveries = deliveries
        self._offer = offer
        deliveries.on_behind = self.owe
        deliveries.read_again = self.read_again
        deliveries.first_presence.let_doubtful_through = self.let_through
        # Sessions that get something later, each with what is set when its client confirms something.
        self._owed: dict[str, asyncio.Event] = {}
        # Those that are behind, and for which something may have become free that was passed over.
        self._again: set[str] = set()
        # Those that are being looked for by `look_again`; and whether something more may be there by now.
        self._looking: dict[str, bool] = {}

    # --- at once ---

    async def flush(self, session: Session, more: bool = False) -> bool:
        """Whether the session has got all that waits, or will get it, as one that is behind. What it is given is its
        own until it ends; when it has had it before, it does not get it again.

        `more`: it is known that something waits. Then nothing newer goes ahead of it, though the database is away.
        """
        after = 0
        try:
            while self._deliveries.accepts(session):
                if session.behind is not None:
                    self._again.add(session.id)
                    return True
                if not self._deliveries.room(session):
                    self._deliveries.fall_behind(session)
                    continue
                found, after = await self._page(session, after)
                if not found and self._deliveries.accepts(session):
                    return True
                more = more or found
        except DatabaseAway:
            if more and self._deliveries.accepts(session):
                self._deliveries.fall_behind(session)
                return True
        return False

    async def _page(self, session: Session, after: int) -> tuple[bool, int]:
        """Gives a session the next messages behind a position: whether any were found, and up to which position it
        was given them. One that does not want what is stored for its account gets what is for it alone."""
        account = session.jid.bare
        most, alone = min(PAGE, self._deliveries.room(session)), not wants_stored(session)
        # While the store is asked it may be told of them.
        confirmed = {id_ for _, id_ in session.unmarked}
        here = cast("Iterable[Session]", self._router.sessions(session.account).values())
        over = [other.id for other in here if other.closed]
        kept = await self._messages.pending(account, session.id, most, after, alone, over)
        if not kept or not self._deliveries.accepts(session):
            return False, after
        page = in_order(kept)
        stored = [(_delayed(message, account), message.id, message.given) for message in page]
        given = self._deliveries.give_stored(session, stored, confirmed)
        left = [message.position for message in page[given:]]
        return True, min(left) - 1 if left else kept[-1].position

    async def read_again(self, session: Session) -> None:
        """What the session's former router has stored as given to it."""
        if is_settling(session):
            return  # it has had none; and what is held back for it must not go ahead of what is stored
        while self._deliveries.accepts(session) and not await self._give_rest(session):  # noqa: ASYNC110 - a retry
            await asyncio.sleep(RETRY)

    def let_through(self, session: Session) -> None:
        """The first presence of a session that was taken over does not come: what its former router has stored as
        given to it goes before what waits for that."""
        self._deliveries.hold(session)
        self._router.in_background(self._give_former(session), "what a router that is gone has stored for a session")

    async def _give_former(self, session: Session) -> None:
        try:
            await self.read_again(session)
        finally:
            self._deliveries.release(session)

    def look_again(self, session: Session) -> None:
        """The same, soon. Under fire there is more each time that it is looked for: so one look is made at a time."""
        looks = session.id in self._looking
        self._looking[session.id] = True
        if not looks:
            self._router.in_background(self._look_again(session), "what a silent router has stored")

    async def _look_again(self, session: Session) -> None:
        try:
            while self._looking[session.id]:
                self._looking[session.id] = False
                await self.read_again(session)
        finally:
            del self._looking[session.id]

    # --- later ---

    def owe(self, session: Session) -> None:
        """Tries as long as the session is here and wants what waits."""
        if session.id not in self._owed:
            self._owed[session.id] = asyncio.Event()
            self._router.in_background(self._give_later(session), "stored messages")

    def confirmed(self, session: Session, _ids: Sequence[bytes] = ()) -> None:
        """Its client has confirmed something, or has come back."""
        if session.id in self._owed:
            self._owed[session.id].set()

    async def _give_later(self, session: Session) -> None:
        try:
            # Who stores a message from here on knows that the session is here.
            await self._router.known()
            while self._router.sessions(session.account).get(session.jid.resource) is session:
                if session.behind is not None:
                    done = await self._catch_up(session)
                elif wants_stored(session):
                    done = self._deliveries.is_open(session) and await self._give_rest(session)
                else:
                    break
                if done and session.behind is None:
                    return
                if not done:
                    await asyncio.sleep(RETRY)
        finally:
            self._owed.pop(session.id, None)
            self._again.discard(session.id)
        await self._offer(session.jid.bare)

    async def _give_rest(self, session: Session) -> bool:
        """Whether nothing waits any more. Nothing newer is held back before it is known that something does."""
        try:
            if not await self._messages.pending_count(session.jid.bare):
                return True
        except DatabaseAway:
            return False
        self._deliveries.hold(session)
        try:
            return await self.flush(session, more=True)
        finally:
            self._deliveries.release(session)

    async def _catch_up(self, session: Session) -> bool:
        """Whether a session that was behind is so no longer: nothing that was left to the store for it is still on
        its way there, and nothing is found there."""
        after, committed = 0, -1
        try:
            while self._deliveries.is_open(session):
                if not self._deliveries.room(session):
                    await self._confirmation(session)
                    continue
                found, after = await self._page(session, after)
                if found or not self._deliveries.is_open(session):
                    continue
                if session.id in self._again:
                    self._again.discard(session.id)
                    after = 0
                elif session.left == committed:
                    self._deliveries.caught_up(session)
                    return True
                else:
                    session.last_look = True
                    left = session.left
                    if await written(self._messages, RETRY):
                        committed = left
        except DatabaseAway:
            pass
        return False

    async def _confirmation(self, session: Session) -> None:
        """Waits until the client confirms something. One that does not for long is cut off."""
        confirmed = self._owed[session.id]
        confirmed.clear()
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                await confirmed.wait()
        except TimeoutError:
            if self._deliveries.is_open(session):
                self._deliveries.cut_off(session)


def in_order(page: Sequence[Kept]) -> list[Kept]:
    """As they are stored, but those of each sender by their numbers: another router may have written a later one
    first, while what it had of it waited for the database."""
    by_sender: dict[str, list[Kept]] = {}
    for message in page:
        if message.number:
            by_sender.setdefault(message.origin, []).append(message)
    next_of = {origin: iter(sorted(sent, key=lambda one: one.number)) for origin, sent in by_sender.items()}
    return [next(next_of[message.origin]) if message.number else message for message in page]


def _delayed(kept: Kept, account: Jid) -> Envelope:
    """XEP-0203 4: stamped by the account's server."""
    raw = append(kept.stanza, delay(kept.received_unix_ms, account.domain))
    return Envelope(
        kind=MESSAGE, origin=kept.origin, number=kept.number, from_jid=kept.from_jid, children=["body"], stanza=raw
    )
