"""How the router is put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from services.router import module_loader
from services.router.account_api import AccountApi
from services.router.authentication import Authentication
from services.router.component_links import ComponentApi, ComponentLinks
from services.router.grpc_api import RouterApi
from services.router.negotiation import Negotiator
from services.router.rosters import Rosters
from services.router.routing import Routing
from services.router.sessions import Sessions
from services.router.store import AccountStore, MessageStore, RosterStore
from services.router.store_sql import SqlAccountStore, SqlMessageStore, SqlRosterStore
from tidings.api.component.v1 import component_pb2
from tidings.api.component.v1.component_pb2_grpc import add_ComponentServiceServicer_to_server
from tidings.api.router.v1 import account_pb2, router_pb2
from tidings.api.router.v1.account_pb2_grpc import add_AccountServiceServicer_to_server
from tidings.api.router.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tidings.cluster.view import ClusterView
from tidings.kit.logging import get_logger
from tidings.kit.migrations import migrate
from tidings.kit.module import Hooks
from tidings.kit.options import Options
from tidings.kit.service import Context

log = get_logger("router")

# What our own components may register; others need --component-allow.
BUILT_IN_COMPONENTS = {"pubsub": ("pubsub.{vhost}",)}


def build(context: Context) -> Router:
    return Router(context)


class Router:
    """The router service."""

    def __init__(self, context: Context) -> None:
        options, tasks = context.options, context.tasks
        hosts = frozenset(options["virt-hosts"])
        self._database = context.database
        self._serving = False
        self._member = context.member
        self._incarnation = context.node.incarnation
        self._warned = False

        accounts = SqlAccountStore(context.database)
        rosters = SqlRosterStore(context.database)
        self._messages = SqlMessageStore(context.database)
        sessions = Sessions()
        hooks = Hooks()
        components = ComponentLinks(hosts, lambda name: allowed_to(options, name))
        self.routing = Routing(hosts, sessions, hooks, accounts, components, tasks.spawn)
        iterations = _per_host_iterations(options)
        authentication = Authentication(accounts, iterations, lambda: bool(options["c2s-allow-plaintext"]))
        negotiator = Negotiator(self.routing, sessions, hooks, authentication, accounts, tasks.spawn)

        stores = {
            AccountStore: accounts,
            RosterStore: rosters,
            MessageStore: self._messages,
            Rosters: Rosters(rosters),
        }
        router = module_loader.RouterForModules(self.routing, accounts, components, stores, negotiator, tasks.spawn)
        module_loader.load([*module_loader.installed(), components.module], hooks, router, options, context.metrics)

        self._api = RouterApi(context.node.incarnation, negotiator, tasks.spawn, lambda: self._serving)
        context.server.add(
            add_RouterServiceServicer_to_server,
            self._api,
            router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name,
        )
        context.server.add(
            add_AccountServiceServicer_to_server,
            AccountApi(hosts, accounts, sessions, negotiator, iterations),
            account_pb2.DESCRIPTOR.services_by_name["AccountService"].full_name,
        )
        context.server.add(
            add_ComponentServiceServicer_to_server,
            ComponentApi(
                components,
                self.routing,
                rosters,
                context.node.incarnation,
                tasks.spawn,
                lambda: self._serving,
            ),
            component_pb2.DESCRIPTOR.services_by_name["ComponentService"].full_name,
        )
        metrics = context.metrics
        metrics.gauged("sessions", "Bound sessions", lambda: len(sessions))
        metrics.counted("stanzas_received", "Stanzas taken from sessions", lambda: self.routing.received)
        metrics.counted("stanzas_delivered", "Stanzas written to sessions", lambda: self.routing.delivered)
        metrics.counted("stanzas_bounced", "Stanzas answered with an error", lambda: self.routing.bounced)

    async def start(self) -> None:
        await migrate(self._database, "router", "services.router:migrations")
        await self._messages.start()
        self._member.on_change(self._look_for_others)
        self._serving = True

    def _look_for_others(self, view: ClusterView) -> None:
        """Says plainly what this release does not do."""
        others = [node.hostname for node in view.with_service("router") if node.incarnation != self._incarnation]
        if others and not self._warned:
            log.warning("routers_do_not_share_users_yet", others=others)
            self._warned = True

    async def drain(self) -> None:
        self._serving = False

    async def stop(self) -> None:
        self._serving = False
        await self._messages.stop()


def allowed_to(options: Options, name: str) -> Iterable[str]:
    """What a component of this name may register."""
    return (*BUILT_IN_COMPONENTS.get(name, ()), *options.for_name("component-allow", name))


def _per_host_iterations(options: Options) -> Callable[[str], int]:
    return lambda host: int(options.for_host(host, "scram-iterations"))
