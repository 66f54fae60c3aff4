"""Routers with stores in memory and real forwarding between them, without gRPC: for tests of what becomes of stanzas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from services.router import module_loader
from services.router.acknowledgements import Acknowledgements
from services.router.app import StrategyContext
from services.router.archive_rules import ArchiveRules
from services.router.backlogs import Backlogs
from services.router.component_links import ComponentLinks
from services.router.deliveries import Deliveries
from services.router.messages import MessageStore
from services.router.messages_memory import MemoryMessageStore
from services.router.rosters import Rosters
from services.router.routing import Routing
from services.router.safety import Safety
from services.router.sessions import Session, Sessions
from services.router.store import AccountStore, RosterStore
from services.router.store_memory import MemoryAccountStore, MemoryRosterStore, MemorySessionTable
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.forwarding import Forwarder, Item, Sent
from tidings.cluster.node import Node, NodeState
from tidings.cluster.strategies.home import Home
from tidings.cluster.strategy import Factory, Plan
from tidings.cluster.view import ClusterView
from tidings.kit import options
from tidings.kit.metrics import Metrics
from tidings.kit.module import IQ, MESSAGE, PRESENCE, Hooks, ModuleSpec
from tidings.kit.tasks import Tasks
from tidings.xmpp.jid import Jid

HOST = "example.org"


class Link:
    """A connector's link: takes what is written to sessions."""

    incarnation = "c1"
    name = "c1"
    location = ""
    local = False

    def __init__(self) -> None:
        self.written: list[tuple[str, Envelope]] = []
        # What the server itself asked: the sessions, and the ids.
        self.pings: list[tuple[str, str]] = []
        self.nonzas: list[tuple[str, bytes]] = []
        self.closed: list[tuple[int, str]] = []

    def deliver(self, session: Session, envelope: Envelope, number: int) -> None:
        if envelope.kind == IQ and b"urn:xmpp:ping" in envelope.stanza and not envelope.from_jid:
            self.pings.append((session.jid_text, envelope.id))
        else:
            self.written.append((session.jid_text, envelope))

    def write(self, session: Session, raw: bytes) -> None:
        self.nonzas.append((session.jid_text, raw))

    def progress(self, session: Session) -> None:
        """Its copy is to follow: there is none here."""

    def tell_progress(self) -> None:
        """The same, at once."""

    def when_copied(self, then: Callable[[], None]) -> None:
        then()

    def close(self, stream: int, condition: str, text: str = "", application: bytes = b"") -> None:
        self.closed.append((stream, condition))

    def has(self, stream: Any) -> bool:
        return True

    def unbound(self, session: Session) -> None:
        """Nothing more comes from it."""

    def of(self, session: Session) -> list[Envelope]:
        return [envelope for jid, envelope in self.written if jid == session.jid_text]

    def bodies(self, session: Session) -> list[str]:
        return [envelope.id for envelope in self.of(session) if envelope.kind == MESSAGE]


class Counting:
    """A waiter (`tidings.cluster.flows.Waiter`) that tells when all has happened."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._left = 1
        self._then = then

    def expect(self) -> None:
        self._left += 1

    def settle(self) -> None:
        self._left -= 1
        if not self._left:
            self._then()


class Links:
    """Satisfies what a routing needs of its links: what is sent to a router arrives there a tick later."""

    def __init__(self, own: str, routers: dict[str, MemoryRouter]) -> None:
        self._own = own
        self._routers = routers
        self.sent: list[tuple[str, Item]] = []
        # By router, what it has not said to be safe.
        self.unsafe: dict[str, list[Sent]] = {}
        # Routers that answer nothing, and what has been sent to them.
        self.hung: dict[str, list[Sent]] = {}

    def dies(self, node: str) -> None:
        """A router is gone; what it had taken and not said to be safe comes back. The view must know."""
        forwarder, unanswered = self._routers[self._own].forwarder, self.hung.pop(node, [])
        unsafe = [sent for sent in self.unsafe.pop(node, []) if sent not in unanswered]
        forwarder.again(unsafe)
        for sent in unanswered:
            forwarder.lost(sent)
        for sent in (*unsafe, *unanswered):
            if sent.waiter is not None:
                sent.waiter.settle()

    def crowded(self, plan: Plan) -> bool:
        return False

    def send(self, node: str, item: Item, sent: Sent, refusals_seen: int) -> None:
        self.sent.append((node, item))
        if sent.waiter is not None:
            sent.waiter.expect()
            self.unsafe.setdefault(node, []).append(sent)
        if node in self.hung:
            self.hung[node].append(sent)
            return
        asyncio.get_running_loop().call_soon(self._arrive, node, item, sent, refusals_seen)

    def _arrive(self, node: str, item: Item, sent: Sent, refusals_seen: int) -> None:
        here, there = self._routers[self._own].forwarder, self._routers[node].forwarder
        payload = item.payload
        if isinstance(payload, Envelope):
            payload = Envelope.FromString(payload.SerializeToString())
            payload.to_jid = payload.to_jid or item.account

        def answered(taken: Item) -> None:
            if taken.taken:
                here.taken(sent, taken.content)
            else:
                here.refused(sent, there.view.version if item.mode == 1 else 0)

        def safe() -> None:
            if sent in self.unsafe.get(node, ()):
                self.unsafe[node].remove(sent)
                assert sent.waiter is not None
                sent.waiter.settle()

        copy = Item(
            item.flow[:2], item.account, item.resource, payload, item.mode, source=self._own, guess=item.guess,
            answer=answered,
        )  # fmt: skip
        if sent.waiter is not None:
            copy.waiter = Counting(safe)
        there.incoming(copy, here.view.version, refusals_seen)


class CountingTable(MemorySessionTable):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    async def of_account(self, account: Jid) -> Any:
        self.asked += 1
        return await super().of_account(account)


class Stores:
    """What the routers of one test share."""

    def __init__(self) -> None:
        self.accounts: AccountStore = MemoryAccountStore()
        self.rosters: RosterStore = MemoryRosterStore()
        self.table = CountingTable()
        self.messages: MessageStore = MemoryMessageStore(self.table)


class MemoryRouter:
    """One router; `hooks` are what its modules have registered. `given`: options."""

    def __init__(
        self,
        own: str = "r1",
        routers: dict[str, MemoryRouter] | None = None,
        stores: Stores | None = None,
        strategy: Factory = Home,
        modules: Sequence[ModuleSpec] = (),
        negotiator: Any = None,
        durability: str = "database",
        archives: bool = False,
        given: Sequence[str] = (),
    ) -> None:
        routers = {} if routers is None else routers
        routers[own] = self
        self.own = own
        self.stores = stores or Stores()
        self.tasks = Tasks()
        self.sessions = Sessions()
        self.hooks = Hooks()
        self.links = Links(own, routers)
        self.link = Link()
        hosts = frozenset((HOST,))
        components = ComponentLinks(hosts, lambda _name: ())
        links: Any = self.links
        self.rosters = Rosters(self.stores.rosters)
        self.rules = ArchiveRules(self.stores.messages, self.rosters, lambda _host: archives, [HOST])
        self.safety = Safety(self.sessions, self.stores.messages, durability, 0, self.rules)
        self.safety.start(b"k" * 32)
        self.routing = Routing(
            hosts, self.sessions, self.hooks, self.stores.accounts, components, self.stores.table, self.safety, links,
            own, _no_newer_view, self.tasks.spawn,
        )  # fmt: skip
        self.acknowledgements = Acknowledgements(
            self.sessions, self.routing.deliveries, self.safety, lambda _host: 60.0
        )
        self.routing.on_answer = self.acknowledgements.is_answer
        self.routing.deliveries.withholds = self.safety.waits
        self.routing.deliveries.kept_as = self.safety.kept_as
        made = strategy(own, StrategyContext(self.routing, self.sessions))
        self.forwarder = Forwarder(made, self.routing)
        self.routing.start(made, self.forwarder)
        ports: dict[Any, Any] = {
            AccountStore: self.stores.accounts,
            RosterStore: self.stores.rosters,
            MessageStore: self.stores.messages,
            Safety: self.safety,
            Deliveries: self.routing.deliveries,
            ArchiveRules: self.rules,
            Backlogs: Backlogs(own, self.stores.messages, self.routing.notes),
            Rosters: self.rosters,
        }
        self.for_modules = module_loader.RouterForModules(
            self.routing, self.sessions, self.stores.accounts, components, ports, negotiator, self.tasks.spawn
        )
        set_options = options.load([f"--virt-hosts={HOST}", *given], {})
        module_loader.load(list(modules), self.hooks, self.for_modules, set_options, Metrics())

    def see(self, view: ClusterView) -> None:
        self.routing.view_changed(view)
        self.forwarder.view_changed(view)

    async def session(self, local: str, resource: str = "r", available: bool = True) -> Session:
        link: Any = self.link
        session = Session(Jid(local, HOST, resource), "en", link, len(self.sessions) + 1, self.tasks.spawn)
        await self.stores.table.bind(session.jid, session.id, self.own)
        self.sessions.add(session)
        self.routing.strategy.session_opened(session.account, resource)
        session.presence = b"<presence/>" if available else None
        return session

    def takes_over(self, session: Session) -> Session:
        """Has another router's session from now on, but for its row."""
        link: Any = self.link
        taken = Session(session.jid, "en", link, len(self.sessions) + 1, self.tasks.spawn)
        taken.id, taken.presence = session.id, session.presence
        self.sessions.add(taken)
        self.routing.strategy.session_opened(taken.account, taken.jid.resource)
        return taken

    async def end(self, session: Session) -> None:
        """As the end of its stream would, but for the database."""
        self.sessions.remove(session)
        session.link = None
        self.routing.strategy.session_closed(session.account, session.jid.resource)
        await self.stores.table.end(session.jid, session.id, session.epoch)
        await self.routing.endings.tell(session, session.presence is not None)

    async def send(self, session: Session, envelope: Envelope) -> None:
        """As its connector would; returns when it is worked off."""
        envelope.from_jid = session.jid_text
        if self.safety.accept(session, envelope):
            session.lane.run(self.routing.from_session, session, envelope)
        await session.lane.idle()

    async def stop(self) -> None:
        await self.tasks.stop()


@asynccontextmanager
async def together(
    names: str, stores: Stores, strategy: Factory = Home, modules: Sequence[ModuleSpec] = ()
) -> AsyncIterator[list[MemoryRouter]]:
    """Routers, one for each letter, that see each other."""
    routers: dict[str, MemoryRouter] = {}
    for name in names:
        MemoryRouter(name, routers, stores, strategy, modules)
    for router in routers.values():
        router.see(view(1, **dict.fromkeys(names, NodeState.UP)))
    yield list(routers.values())
    for router in routers.values():
        await router.stop()


async def _no_newer_view(_timeout: float) -> bool:
    return False


def view(version: int, **states: NodeState) -> ClusterView:
    return ClusterView(
        version, [Node(name, name, "127.0.0.1", 1, ("router",), state) for name, state in states.items()]
    )


def message(id_: str, to: str, type_: str = "chat") -> Envelope:
    """Its id says which it is."""
    raw = f"<message id='{id_}' to='{to}' type='{type_}'><body>x</body></message>".encode()
    return Envelope(kind=MESSAGE, type=type_, id=id_, to_jid=to, children=["body"], stanza=raw)


def iq(type_: str, id_: str, to: str, *children: str) -> Envelope:
    return Envelope(kind=IQ, type=type_, id=id_, to_jid=to, children=children, stanza=b"<iq/>")


def presence(to: str = "", type_: str = "") -> Envelope:
    return Envelope(kind=PRESENCE, type=type_, to_jid=to, stanza=b"<presence/>")


async def until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)
