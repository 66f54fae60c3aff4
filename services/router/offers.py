"""Messages that are written when the session they were given to is here no longer: another router has taken it over,
or it has ended. Whoever is there of its account gets them before their senders hear that they are safe: what those
send next may come there another way, and must not overtake."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from services.router.messages import CLAIMED
from tidings.kit.logging import get_logger
from tidings.xmpp.jid import Jid

if TYPE_CHECKING:
    from services.router.sessions import Sessions

log = get_logger("router")


class Offers:
    """Has them offered. One for each router."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        # By account: the sessions that were given something, and what is to be called when that is offered.
        self._owed: dict[Jid, list[tuple[str, Callable[[], None]]]] = {}
        self.spawn: Callable[[Any, str], Any] = _unwatched
        # Whether this router just asks the table which sessions it still has; and waits for the answer.
        self.is_looking: Callable[[], bool] = lambda: False
        self.looked: Callable[[], Awaitable[None]] = _nothing
        # Tells whoever is there of an account that messages wait; returns when they have them.
        self.offer: Callable[[Jid], Awaitable[None]] = _nobody

    def is_due(self, holder: str) -> bool:
        """Whether the session that a message was given to has gone, or may have. `holder`: as in Message."""
        return bool(holder) and (self._is_gone(holder) or self.is_looking())

    def owes(self, account: Jid) -> bool:
        """Whether something is written, and being offered."""
        return account in self._owed

    def _is_gone(self, holder: str) -> bool:
        return self._sessions.get(holder.removeprefix(CLAIMED)) is None

    def when_offered(self, account: Jid, holder: str, then: Callable[[], None]) -> None:
        """Calls `then` when a message that is written now has been offered, if its session has gone."""
        owed = self._owed.get(account)
        if owed is not None:
            owed.append((holder, then))
        else:
            self._owed[account] = [(holder, then)]
            self.spawn(self._offer(account), "messages of sessions that have gone")

    async def _offer(self, account: Jid) -> None:
        try:
            while owed := self._owed[account]:
                self._owed[account] = []
                await self._offer_once(account, owed)
        finally:
            _call(self._owed.pop(account))

    async def _offer_once(self, account: Jid, owed: list[tuple[str, Callable[[], None]]]) -> None:
        try:
            await self.looked()
            if any(self._is_gone(holder) for holder, _ in owed):
                await self.offer(account)
        except Exception:
            log.exception("messages_not_offered")
        finally:
            _call(owed)  # they are written all the same


def _call(owed: list[tuple[str, Callable[[], None]]]) -> None:
    for _, then in owed:
        then()


def _unwatched(_work: Any, _name: str) -> Any:
    raise AssertionError("it has not been started")


async def _nothing() -> None: ...


async def _nobody(_account: Jid) -> None: ...
