"""Loads the router's modules: built-in ones and those of outsiders come through the same entry points."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar, cast

from services.router.component_links import ComponentLinks
from services.router.negotiation import Negotiator
from services.router.routing import Routing
from services.router.sessions import Session, Sessions
from services.router.store import AccountStore
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.module import GROUP, Hooks, Module, ModuleSpec
from tidings.xmpp.jid import Jid

if TYPE_CHECKING:
    from tidings.kit.metrics import Metrics
    from tidings.kit.options import Options

log = get_logger("router")

P = TypeVar("P")

# Seconds between two tries while the database is away.
RETRY = 1.0


def installed() -> list[ModuleSpec]:
    """The installed modules, each behind those that it needs."""
    specs: dict[str, ModuleSpec] = {}
    for entry in entry_points(group=GROUP):
        spec = cast(ModuleSpec, entry.load())
        if spec.name in specs:
            raise RuntimeError(f"two installed packages offer a router module named {spec.name!r}")
        specs[spec.name] = spec
    ordered: list[ModuleSpec] = []
    visiting: list[str] = []

    def visit(name: str) -> None:
        spec = specs.get(name)
        if spec is None:
            raise RuntimeError(f"the router module {visiting[-1]!r} needs {name!r}, which is not installed")
        if name in visiting:
            raise RuntimeError(f"router modules need each other in a circle: {' -> '.join([*visiting, name])}")
        if spec in ordered:
            return
        visiting.append(name)
        for needed in spec.needs:
            visit(needed)
        visiting.pop()
        ordered.append(spec)

    for name in sorted(specs):
        visit(name)
    return ordered


class RouterForModules:
    """What modules may ask of the router (`tidings.kit.module.RouterPort`)."""

    def __init__(
        self,
        routing: Routing,
        sessions: Sessions,
        accounts: AccountStore,
        components: ComponentLinks,
        stores: Mapping[type[Any], Any],
        negotiator: Negotiator,
        spawn: Callable[[Any, str], Any],
    ) -> None:
        self._routing = routing
        self._sessions = sessions
        self._accounts = accounts
        self._components = components
        self._stores = stores
        self._negotiator = negotiator
        self._spawn = spawn

    def sessions(self, account: str) -> Mapping[str, Session]:
        return self._sessions.of(account)

    async def ask(self, module: str, account: str, content: bytes) -> list[bytes]:
        return await self._routing.notes.ask(module, account, content)

    def tell(self, module: str, account: str, content: bytes) -> None:
        self._routing.notes.tell(module, account, content)

    async def tell_bound(self, module: str, account: str, content: bytes) -> None:
        await self._routing.notes.tell_bound(module, account, content)

    async def known(self) -> None:
        await self._routing.notes.known()

    def route(self, envelope: Envelope) -> None:
        self._routing.send_for_module(envelope)

    def deliver(self, session: Session, envelope: Envelope) -> None:
        self._routing.deliveries.deliver(session, envelope)

    def hold(self, session: Session) -> None:
        self._routing.deliveries.hold(session)

    def release(self, session: Session) -> None:
        self._routing.deliveries.release(session)

    def is_settled(self, account: str) -> bool:
        return self._routing.orphans is None or self._routing.orphans.is_settled(account)

    async def settled(self, account: str) -> None:
        if self._routing.orphans is not None:
            await self._routing.orphans.settled(account)

    async def account_exists(self, jid: Jid) -> bool:
        return await self._accounts.exists(jid.domain, jid.local)

    def is_open(self, session: Session) -> bool:
        return self._routing.deliveries.is_open(session)

    def in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._spawn(_logged(work, name), name)

    def delete_account(self, account: Jid) -> None:
        self.in_background(self._delete_account(account), "delete account")

    async def _delete_account(self, account: Jid) -> None:
        while True:
            try:
                await self._negotiator.delete_account(account)
                return
            except DatabaseAway:
                await asyncio.sleep(RETRY)

    def store(self, port: Callable[..., P]) -> P:
        return cast(P, self._stores[cast(Any, port)])

    def components(self) -> Mapping[str, str]:
        return self._components.titles()


async def _logged(work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        await work
    except Exception:
        log.exception("background_work_failed", work=name)


def load(specs: list[ModuleSpec], hooks: Hooks, router: RouterForModules, options: Options, metrics: Metrics) -> None:
    """Loads modules in this order."""
    for spec in specs:
        module = Module(spec, hooks, cast(Any, router), options, metrics, log.bind(module=spec.name))
        spec.load(module)
        log.debug("module_loaded", module=spec.name, xep=spec.xep)
