"""Sessions that other routers have taken over without this one's knowing: it stood still, or they could not reach it,
nor their clients. While they are believed to be here, what comes for them is taken for them and waits in vain.

The table of sessions knows. It is asked when this router has stood still, before anything else is dealt with; and
while something is cut off from it, and once behind that. And who has taken one over says so, as soon as it can: then
this router answers when it has written what it had for the session.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from services.router.messages import written
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.xmpp.jid import Jid

if TYPE_CHECKING:
    from services.router.messages import MessageStore
    from services.router.sessions import Session, Sessions
    from services.router.store import SessionTable

log = get_logger("cluster")

# The name of the notes that say it (no module has it: theirs are those of their entry points).
TAKEN = "=session-taken"

# Seconds between two looks while something is cut off.
LOOK = 1.0
# Seconds between two beats, and from one to the next for this router to have stood still: its sessions are taken over
# after two (resumption.SILENCE).
BEAT = 0.1
STILL = 1.5
# Seconds for the database to say what is still here: while it is away nothing is taken over. Behind a standstill it
# may only seem to be away, for its connections have stood still too; and behind a long one much has been taken over,
# before it went away if it has.
ASK_TIMEOUT = 1.0
LONG = 5.0


def taken(epoch: int, session: str) -> bytes:
    """The note that a session was taken over, under an epoch."""
    return b"%d %b" % (epoch, session.encode())


class TakenOver:
    """Looks for them. One for each router."""

    def __init__(
        self,
        own: str,
        sessions: Sessions,
        table: SessionTable,
        messages: MessageStore,
        is_cut: Callable[[], bool],
        dismiss: Callable[[Session], Awaitable[None]],
        spawn: Callable[[Any, str], Any],
    ) -> None:
        """`is_cut`: whether a connector or another router is out of reach that the view has. `dismiss` ends a session
        here, and gives what waits for it to whoever has it."""
        self._own = own
        self._sessions = sessions
        self._table = table
        self._messages = messages
        self._is_cut = is_cut
        self._dismiss = dismiss
        self._spawn = spawn
        self._beat = time.monotonic()
        # What is waited for behind a standstill, and what may go on behind that.
        self._looking: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None

    # --- it stood still ---

    def stood_still(self) -> Awaitable[object] | None:
        """What is to be waited for before anything is dealt with that has come meanwhile; None when there is nothing.
        It never raises."""
        return self.looked() if self.notice() else None

    def notice(self) -> bool:
        """Notices a standstill that has just ended. Whether it is being asked what is left behind one."""
        now = time.monotonic()
        still, self._beat = now - self._beat, now
        if still > STILL and self._looking is None:
            log.warning("stood_still", seconds=round(still, 1))
            patience = LONG if still > LONG else ASK_TIMEOUT
            self._looking = self._spawn(self._look_in_time(patience), "what is left behind a standstill")
        return self._looking is not None

    async def looked(self) -> None:
        """Waits until that is known, or would have been."""
        if self._looking is not None:
            await asyncio.wait({self._looking})

    async def _look_in_time(self, patience: float) -> None:
        if self._asking is None or self._asking.done():
            self._asking = self._spawn(self._look_until_answered(), "sessions that were taken over")
        try:
            await asyncio.wait({self._asking}, timeout=patience)
        finally:
            self._looking = None

    async def _look_until_answered(self) -> None:
        while not await self.look():  # noqa: ASYNC110 - it is asked anew
            await asyncio.sleep(BEAT)

    async def beat(self) -> None:
        self._beat = time.monotonic()
        while True:
            await asyncio.sleep(BEAT)
            self.notice()

    # --- something is cut off ---

    async def run(self) -> None:
        was_cut = False
        while True:
            await asyncio.sleep(LOOK)
            cut = self._is_cut()
            if cut or was_cut:
                await self.look()
            was_cut = cut

    async def look(self) -> bool:
        """Ends those whose rows are another router's, or gone. Whether the database has answered."""
        # Before the table is asked: who comes meanwhile may not be in what it says.
        here = [session for session in self._sessions if self._is_here(session)]
        try:
            rows = await self._table.ids_of_router(self._own)
        except DatabaseAway:
            return False
        await self._end_all_but(rows, here)
        return True

    async def check(self, account: str) -> None:
        """The same for one account, before something is given to a session of it whose connector is out of reach."""
        here = [session for session in self._sessions.of(account).values() if self._is_here(session)]
        asked = self._spawn(self._rows_of(account), "whose sessions an account has")
        await asyncio.wait({asked}, timeout=ASK_TIMEOUT)
        rows = asked.result() if asked.done() else None
        if rows is not None:
            await self._end_all_but(rows, here)

    async def _rows_of(self, account: str) -> set[str] | None:
        try:
            rows = await self._table.of_account(Jid.parse(account))
        except DatabaseAway:
            return None
        return {row.session for row in rows if row.router == self._own}

    def _is_here(self, session: Session) -> bool:
        # While it is frozen it is being given, or taken: then that says what becomes of it.
        return self._sessions.get(session.id) is session and session.frozen is None and not session.closed

    async def _end_all_but(self, rows: set[str], here: Iterable[Session]) -> None:
        lost = (session for session in here if session.id not in rows and self._is_here(session))
        await asyncio.gather(*map(self._end, lost))

    async def _end(self, session: Session) -> None:
        log.info("session_taken_elsewhere", session=session.id, account=session.account)
        # What is stored for it is told to whoever has it.
        session.closed = True
        await self._dismiss(session)

    # --- another router says so ---

    def noted(self, _account: Jid, note: bytes) -> Awaitable[bytes]:
        """The answer comes when all is written that this router had for the session."""
        epoch, _, id_ = note.decode().partition(" ")
        return self._given_up(id_, int(epoch))

    async def _given_up(self, id_: str, epoch: int) -> bytes:
        session = self._sessions.get(id_)
        if session is not None and session.epoch < epoch and self._is_here(session):
            await self._end(session)
        with suppress(TimeoutError):
            async with asyncio.timeout(ASK_TIMEOUT):
                while session is not None and session.closed and self._sessions.get(id_) is session:  # noqa: ASYNC110
                    await asyncio.sleep(BEAT)  # it was surrendered, and ends in a moment
        await written(self._messages, math.inf)
        return b""
