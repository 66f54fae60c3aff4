"""Notes from module to module: for the sessions of an account that other routers have."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from tidings.cluster.forwarding import Forwarder, Item, Mode
from tidings.cluster.strategy import Strategy
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.module import Hooks
from tidings.xmpp.jid import Jid

if TYPE_CHECKING:
    from services.router.store import SessionTable

log = get_logger("router")

# Seconds to wait for routers that do not take a note: they hang, and will be put out.
KNOWN_TIMEOUT = 2.0


class Notes:
    """Sends the notes of this router's modules, and hands them those of others."""

    def __init__(
        self, own: str, hooks: Hooks, table: SessionTable, step: Callable[[], AbstractAsyncContextManager[None]]
    ) -> None:
        self._own = own
        self._hooks = hooks
        self._table = table
        self._step = step
        self._strategy: Strategy = None  # type: ignore[assignment] # set by `start`
        self._forwarder: Forwarder = None  # type: ignore[assignment]

    def start(self, strategy: Strategy, forwarder: Forwarder) -> None:
        self._strategy = strategy
        self._forwarder = forwarder

    def noted(self, item: Item) -> Awaitable[None] | None:
        name, content = item.payload
        handler = self._hooks.notes.get(name)
        if handler is None:
            item.taken = False
            return None
        try:
            # At once where that can be: stanzas that come behind it on the link are not to overtake it.
            answer = handler(Jid.parse(item.account), content)
            if answer is not None and not isinstance(answer, bytes):
                return self._answer_note(answer, item)
            item.taken, item.content = answer is not None, answer or b""
        except Exception:
            item.taken = False
            log.exception("note_failed", module=name)
        return None

    async def _answer_note(self, waiting: Awaitable[bytes | None], item: Item) -> None:
        try:
            async with self._step():
                answer = await waiting
            item.taken, item.content = answer is not None, answer or b""
        except Exception:
            item.taken = False
            log.exception("note_failed", module=item.payload[0])

    def _named(self, account: str) -> list[str]:
        """The other routers that may have sessions of an account, as the strategy says."""
        plan = self._strategy.locate(account, "")
        return [node for node in (plan.decides, *plan.nodes) if node]

    async def ask(self, module: str, account: str, content: bytes) -> list[bytes]:
        """Sends a module's note; the answers of those that had one. A router that hangs is not waited for."""
        return await self.ask_routers(self._named(account), module, account, content)

    async def ask_routers(self, nodes: Sequence[str], name: str, account: str, content: bytes) -> list[bytes]:
        """The same, of these routers."""
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answers = self._forwarder.ask(nodes, _note(name, account, content), lambda: _set(answered, None))
        try:
            async with asyncio.timeout(KNOWN_TIMEOUT):
                await answered
        except TimeoutError:
            log.debug("note_not_answered", module=name, waited=KNOWN_TIMEOUT)
        return list(answers)

    def tell(self, module: str, account: str, content: bytes) -> None:
        self.tell_routers(self._named(account), module, account, content)

    def tell_routers(self, nodes: Sequence[str], name: str, account: str, content: bytes) -> None:
        self._forwarder.ask(nodes, _note(name, account, content), lambda: None)

    async def tell_bound(self, module: str, account: str, content: bytes) -> None:
        """To the other routers at which the table has sessions of an account now, whatever the strategy knows; while
        the database is away, to those that it names. Waits, within bounds, until they have dealt with it."""
        if len(self._forwarder.view.with_router_sessions()) < 2:
            return
        try:
            rows = await self._table.of_account(Jid.parse(account))
        except DatabaseAway:
            self.tell(module, account, content)
            return
        others = {node.incarnation for node in self._forwarder.view.with_router_sessions()} - {self._own}
        those = sorted(others & {row.router for row in rows})
        await self.ask_routers(those, module, account, content)

    async def known(self) -> None:
        """Waits, within bounds, until the other routers have taken the notes of our strategy."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._forwarder.on_told(lambda: _set(told, None))
        try:
            async with asyncio.timeout(KNOWN_TIMEOUT):
                await told
        except TimeoutError:
            log.debug("notes_not_taken", waited=KNOWN_TIMEOUT)


def _note(module: str, account: str, content: bytes) -> Item:
    return Item(("", account), account, "", (module, content), Mode.NOTE)


def _set(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)
