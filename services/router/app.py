"""How the router is put together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from services.router import module_loader
from services.router.account_api import AccountApi
from services.router.acknowledgements import Acknowledgements
from services.router.adoption import Adoption
from services.router.archive_rules import ArchiveRules
from services.router.authentication import Authentication
from services.router.backlogs import BACKLOG, WRITTEN, Backlogs
from services.router.binding import Binding
from services.router.cluster_news import ClusterNews
from services.router.component_links import ComponentApi, ComponentLinks
from services.router.copies import Copies
from services.router.deliveries import Deliveries
from services.router.forward_links import ForwardLinks
from services.router.grpc_api import RouterApi
from services.router.hand_over import GIVEN, HandOver
from services.router.messages import MessageStore, written
from services.router.messages_sql import SqlMessageStore
from services.router.negotiation import Negotiator
from services.router.orphans import Orphans
from services.router.peers import Peers
from services.router.reattachment import Reattachment
from services.router.resumption import Resumption
from services.router.retention import Retention
from services.router.rosters import Rosters
from services.router.routing import Routing
from services.router.safety import Safety
from services.router.sessions import Session, Sessions
from services.router.store import AccountStore, RosterStore
from services.router.store_sql import SqlAccountStore, SqlRosterStore
from services.router.store_sql_sessions import SqlSessionTable
from services.router.stranded import Stranded
from services.router.taken_over import TAKEN, TakenOver
from services.router.tickets import Tickets
from tidings.api.component.v1 import component_pb2
from tidings.api.component.v1.component_pb2_grpc import add_ComponentServiceServicer_to_server
from tidings.api.router.v1 import account_pb2, router_pb2
from tidings.api.router.v1.account_pb2_grpc import add_AccountServiceServicer_to_server
from tidings.api.router.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tidings.cluster.forwarding import Forwarder
from tidings.cluster.node import NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.logging import get_logger
from tidings.kit.metrics import Metrics
from tidings.kit.migrations import migrate
from tidings.kit.module import Hooks
from tidings.kit.options import Options
from tidings.kit.service import Context
from tidings.kit.strategies import made, strategy_factory

log = get_logger("router")

# Seconds that stanzas which came by a newer view wait for it, at most twice as long.
EARLY_TIMEOUT = 5.0

# Seconds for what a session was given to be written, before the next one of its full JID is bound.
WRITTEN_TIMEOUT = 1.0

# Seconds for the other routers to learn of this one and open their links to it.
KNOWN_TIMEOUT = 5.0

# Seconds that a draining router waits for streams without a session, and for what is under way when it has no
# sessions left; and between two looks.
UNBOUND_TIMEOUT = 10.0
UNDER_WAY_TIMEOUT = 5.0
LOOK = 0.02

# What our own components may register; others need --component-allow.
BUILT_IN_COMPONENTS = {"pubsub": ("pubsub.{vhost}",)}


def build(context: Context) -> Router:
    return Router(context)


class Router:
    """The router service."""

    def __init__(self, context: Context) -> None:
        options, tasks = context.options, context.tasks
        hosts = frozenset(options["virt-hosts"])
        own = context.node.incarnation
        self._tasks = tasks
        self._database = context.database
        self._serving = False
        self._member = context.member
        self._own = own
        self._accounts = SqlAccountStore(context.database)
        rosters = SqlRosterStore(context.database)
        self._messages = SqlMessageStore(context.database, context.member)
        table = SqlSessionTable(context.database)

        self.sessions = sessions = Sessions()
        hooks = Hooks()
        self._rosters = Rosters(rosters)
        rules = ArchiveRules(
            self._messages, self._rosters, lambda host: bool(options.for_host(host, "archive")), hosts
        )
        self._safety = safety = Safety(
            sessions, self._messages, options["message-durability"], options["pending-limit"],
            rules,
        )  # fmt: skip
        components = ComponentLinks(hosts, lambda name: allowed_to(options, name))
        self._links = ForwardLinks(context.node, context.channels, tasks, context.member)
        self.routing = routing = Routing(
            hosts, sessions, hooks, self._accounts, components, table, safety, self._links, own,
            context.member.newer_view, tasks.spawn,
        )  # fmt: skip
        factory = strategy_factory(options["sm-cluster-strategy-class"])
        strategy = made(factory, own, StrategyContext(routing, sessions))
        self._forwarder = Forwarder(strategy, routing)
        routing.start(strategy, self._forwarder)
        self._links.start(self._forwarder)
        self._links.is_unsettled = routing.is_unsettled

        self._tickets = Tickets()
        self._orphans = Orphans(own, table, routing, tasks.spawn, context.member, context.channels)
        routing.settle_by(self._orphans)
        self._peers = peers = Peers(context.channels, tasks.spawn)
        self._binding = Binding(own, sessions, table, self._orphans, context.member, peers, tasks.spawn)
        self._adoption = Adoption(sessions, self._binding, routing, self._tickets, hooks, tasks.spawn)
        self._hand_over = HandOver(own, sessions, self._binding, routing, hooks, peers, tasks.spawn)
        self._news = ClusterNews(sessions, routing.deliveries, lambda: _admins(options))
        self._stranded = Stranded(sessions, routing.deliveries, tasks.spawn)
        iterations = _per_host_iterations(options)
        authentication = Authentication(self._accounts, iterations, lambda: bool(options["c2s-allow-plaintext"]))
        self._acknowledgements = Acknowledgements(
            sessions, routing.deliveries, safety, lambda host: float(options.for_host(host, "resume-timeout"))
        )
        self._resumption = resumption = Resumption(
            own,
            sessions,
            table,
            safety,
            self._acknowledgements,
            self._hand_over,
            self._binding.is_reachable,
            tasks.spawn,
        )
        self._copies = copies = Copies(
            own, self._tickets, routing.deliveries.deadlines, lambda: self._forwarder.view, tasks.spawn,
            options["session-copies"] != 1,
        )  # fmt: skip
        self._negotiator = negotiator = Negotiator(
            own, routing, sessions, hooks, authentication, self._accounts, self._binding, self._hand_over,
            self._adoption, self._tickets, safety, self._acknowledgements, resumption,
            copies, peers.answered, tasks.spawn,
        )  # fmt: skip
        negotiator.written = lambda: written(self._messages, WRITTEN_TIMEOUT)
        safety.on_confirmed.append(copies.confirmed)
        routing.deliveries.is_far = lambda link: not copies.is_near(link)
        self._acknowledgements.cover = resumption.cover = copies.cover
        resumption.outdate, copies.old.is_in = copies.old.outdate_behind, self._member.is_in
        self._reattachment = negotiator.reattachment = Reattachment(
            own, sessions, table, self._binding, routing, safety, self._acknowledgements, self._tickets,
            self._hand_over, self._adoption, hooks, tasks.spawn,
        )  # fmt: skip
        self._reattachment.dismiss, self._reattachment.wait = negotiator.dismiss, resumption.wait
        resumption.end = negotiator.end
        resumption.whole, resumption.attached = self._adoption.whole, self._adoption.resumed
        self._adoption.wait, self._adoption.acknowledged = resumption.wait, safety.acknowledged
        self._adoption.moved = self._acknowledgements.moved
        resumption.send_on = negotiator.send_to_session
        routing.on_answer = self._acknowledgements.is_answer
        safety.waiting_elsewhere, safety.is_unsafe_elsewhere = self._links.unsafe_bytes, self._links.is_unsafe
        routing.deliveries.on_full = self._end_full
        routing.deliveries.withholds = safety.waits
        routing.deliveries.kept_as = safety.kept_as
        self._hand_over.dismiss = self._adoption.dismiss = negotiator.dismiss
        self._adoption.place = self._hand_over.place
        hooks.notes[GIVEN] = self._adoption.given

        self._backlogs = Backlogs(own, self._messages, routing.notes)
        hooks.notes[BACKLOG], hooks.notes[WRITTEN] = self._backlogs.noted, self._backlogs.asked

        stores = {
            AccountStore: self._accounts,
            RosterStore: rosters,
            MessageStore: self._messages,
            Safety: safety,
            Deliveries: routing.deliveries,
            Rosters: self._rosters,
            ArchiveRules: rules,
            Backlogs: self._backlogs,
        }
        router = module_loader.RouterForModules(
            routing, sessions, self._accounts, components, stores, negotiator, tasks.spawn
        )
        module_loader.load([*module_loader.installed(), components.module], hooks, router, options, context.metrics)
        hooks.presence_changed.append(self._binding.presence_changed)
        hooks.directed_changed.append(self._binding.directed_changed)

        self._api = RouterApi(
            own, negotiator, sessions, self._links, self._adoption, self._binding, tasks.spawn, lambda: self._serving
        )
        copies.links = lambda: self._api.links
        copies.old.keep, copies.old.is_here = self._binding.keep, lambda session: sessions.get(session.id) is session
        resumption.surrender, resumption.answers = self._api.surrender, self._answers
        self._taken_over = TakenOver(
            own, sessions, table, self._messages, lambda: bool(self._api.cut) or self._links.is_cut,
            negotiator.dismiss, tasks.spawn,
        )  # fmt: skip
        routing.cut, routing.check = self._api.cut, self._taken_over.check
        self._api.stood_still = self._taken_over.stood_still
        safety.offers.is_looking, safety.offers.looked = self._taken_over.notice, self._taken_over.looked
        hooks.notes[TAKEN] = self._taken_over.noted
        context.server.add(
            add_RouterServiceServicer_to_server,
            self._api,
            router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name,
        )
        context.server.add(
            add_AccountServiceServicer_to_server,
            AccountApi(hosts, self._accounts, sessions, negotiator, iterations),
            account_pb2.DESCRIPTOR.services_by_name["AccountService"].full_name,
        )
        context.server.add(
            add_ComponentServiceServicer_to_server,
            ComponentApi(components, routing, self._accounts, rosters, own, tasks.spawn, lambda: self._serving),
            component_pb2.DESCRIPTOR.services_by_name["ComponentService"].full_name,
        )
        self._retention = Retention(
            self._messages, options["virt-hosts"], lambda host: int(options.for_host(host, "archive-days"))
        )
        self._add_metrics(context.metrics)

    def _add_metrics(self, metrics: Metrics) -> None:
        routing, links = self.routing, self._links
        metrics.gauged("sessions", "Bound sessions", lambda: len(self.sessions))
        metrics.counted("stanzas_received", "Stanzas taken from sessions", lambda: routing.received)
        metrics.counted("stanzas_delivered", "Stanzas written to sessions", lambda: routing.deliveries.delivered)
        metrics.counted("stanzas_bounced", "Stanzas answered with an error", lambda: routing.answers.bounced)
        metrics.counted("forward_batches", "Batches sent to other routers", lambda: links.totals()[0])
        metrics.counted("forward_items", "Stanzas and notes sent to other routers", lambda: links.totals()[1])
        metrics.counted("forward_bytes", "Bytes of them", lambda: links.totals()[2])
        metrics.counted("forward_refusals", "Of them, refused", lambda: self._forwarder.refusals)
        metrics.gauged(
            "forward_flows", "Flows to other routers with something under way", lambda: len(self._forwarder)
        )
        metrics.counted("sessions_given", "Sessions handed to other routers", lambda: self._hand_over.given)
        metrics.counted("sessions_adopted", "Sessions taken from other routers", lambda: self._adoption.adopted)
        metrics.counted(
            "sessions_resumed", "Sessions that went on with another stream", lambda: self._resumption.resumed
        )
        metrics.counted("resumptions_refused", "Sessions that could not be resumed", lambda: self._resumption.refused)
        metrics.gauged(
            "unacknowledged", "Stanzas that clients have not acknowledged",
            lambda: sum(len(session.outbound.queue) for session in self.sessions),
        )  # fmt: skip
        metrics.gauged("store_waiting_bytes", "What waits to be committed", lambda: self._messages.waiting_bytes)
        metrics.gauged("store_waiting_seconds", "How long the oldest of it has waited", self._waited)
        metrics.counted(
            "sessions_reattached", "Sessions taken over from routers that failed", lambda: self._reattachment.taken
        )
        metrics.counted(
            "take_overs_refused", "Copies of sessions that had grown old, by their epochs",
            lambda: self._reattachment.refused,
        )  # fmt: skip
        metrics.counted("sessions_orphaned", "Sessions ended for routers that failed", lambda: self._orphans.ended)

    def _end_full(self, session: Session) -> None:
        ending = self._negotiator.close(session, "resource-constraint", "too much is not acknowledged")
        self._tasks.spawn(ending, "end a session that is full")

    async def _answers(self, router: str, seconds: float) -> bool:
        node = self._member.view.by_incarnation(router)
        if node is None or node.state is NodeState.FAILED:
            return False
        return await self._peers.answers(node, seconds)

    def _waited(self) -> float:
        oldest = self._messages.oldest_waiting
        return time.monotonic() - oldest if oldest else 0.0

    async def start(self) -> None:
        await migrate(self._database, "router", "services.router:migrations")
        self._tickets.start(await self._accounts.shared_key("ticket-key"))
        self._safety.start(await self._accounts.shared_key("message-id-key"))
        await self._messages.start()
        self._tasks.spawn(self._acknowledgements.run(), "router: acknowledgements")
        self._tasks.spawn(self._copies.tell_marked(self._messages), "router: what is confirmed and written")
        self._tasks.spawn(self._copies.run(self.sessions), "router: second holders of sessions")
        self._tasks.spawn(self._retention.run(), "router: age of archives")
        self._tasks.spawn(self.routing.deliveries.deadlines.run(), "router: IQ deadlines")
        self._tasks.spawn(self._binding.run(), "router: availability of sessions")
        self._tasks.spawn(self._binding.tidy(), "router: rows without session")
        self._tasks.spawn(self._orphans.run(), "router: sessions without router")
        self._tasks.spawn(self._taken_over.run(), "router: sessions that others have taken over")
        self._tasks.spawn(self._taken_over.beat(), "router: whether it has stood still")
        self._tasks.spawn(self._give_up_waiting(), "router: stanzas that came by a newer view")
        self._tasks.spawn(self._links.watch(), "router: what others have taken and not made safe")
        self._tasks.spawn(self._backlogs.run(), "router: what waits for the database for long")
        self._member.on_change(self._view_changed)
        self._view_changed(self._member.view)
        self._tasks.spawn(self._serve_when_known(), "router: until the others know it")

    async def _serve_when_known(self) -> None:
        """Sessions come when the other routers know of this one: what they send must not miss them."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + KNOWN_TIMEOUT
        known = await self._member.wait_until(self._is_up, KNOWN_TIMEOUT)
        known = known and await self._links.known(max(0.0, deadline - loop.time()))
        if not known:
            log.warning("not_known_to_all", waited=KNOWN_TIMEOUT)
        self._serving = not self._adoption.draining

    def _is_up(self, view: ClusterView) -> bool:
        node = view.by_incarnation(self._own)
        return node is not None and node.state in (NodeState.UP, NodeState.SUSPECT)

    def _view_changed(self, view: ClusterView) -> None:
        """The order matters: first it is known whose sessions wait to be taken over; then links, for the strategy may
        use them; what they give back goes by the new view; then sessions move."""
        self._orphans.view_changed(view)
        self._links.view_changed(view)
        self.routing.view_changed(view)
        self._forwarder.view_changed(view)
        self._links.view_applied(view)
        self._adoption.view_changed(view)
        self._hand_over.view_changed(view)
        self._api.view_changed(view)
        self._news.view_changed(view)
        self._stranded.view_changed(view)
        self._backlogs.view_changed(view)

    async def _give_up_waiting(self) -> None:
        while True:
            await asyncio.sleep(EARLY_TIMEOUT)
            self._forwarder.give_up_waiting()

    async def drain(self) -> None:
        """Takes no sessions of other routers, and hands its own to them. Streams without a session get a while to
        authenticate: behind that they go on elsewhere. Then what is under way gets a while to arrive."""
        self._adoption.draining = True
        loop = asyncio.get_running_loop()
        ends = loop.time() + UNBOUND_TIMEOUT
        await self._hand_over.drain(lambda: len(self._adoption) > 0 or (self._has_streams() and loop.time() < ends))
        self._negotiator.drained = True
        ends = loop.time() + UNDER_WAY_TIMEOUT
        while self.is_busy() and loop.time() < ends:  # noqa: ASYNC110 - bounded
            await asyncio.sleep(LOOK)
        self._serving = False

    def _has_streams(self) -> bool:
        return any(len(link) for link in self._api.links)

    def is_busy(self) -> bool:
        """Whether sessions are ending, or stanzas on their way, of which nobody else knows."""
        owed = self._hand_over.owed + self.routing.endings.owed
        return bool(self._negotiator.ending or owed or len(self._forwarder))

    async def stop(self) -> None:
        self._serving = False
        # Nobody's time is over by a router that has none.
        self._api.stop()
        self._resumption.stop()
        if self._member.is_put_out:
            # What other routers had sent here they have sent another way, and who has taken a session over has its
            # messages: written now they would come a second time, behind later ones, or though an error has gone out.
            self._messages.supersede(lambda origin: bool(origin) and self.sessions.get(origin) is None)
        await self._messages.stop()


class StrategyContext:
    """Satisfies `tidings.cluster.strategy.Context`."""

    def __init__(self, routing: Routing, sessions: Sessions) -> None:
        self._routing = routing
        self._sessions = sessions

    def tell(self, node: str, note: bytes) -> None:
        self._routing.forwarder.tell(node, note)

    def sessions(self) -> list[str]:
        return [session.jid_text for session in self._sessions]


def allowed_to(options: Options, name: str) -> Iterable[str]:
    """What a component of this name may register."""
    return (*BUILT_IN_COMPONENTS.get(name, ()), *options.for_name("component-allow", name))


def _admins(options: Options) -> list[str]:
    """The administrators of the cluster, and of each virtual host."""
    return sorted({admin for host in options["virt-hosts"] for admin in options.for_host(host, "admins")})


def _per_host_iterations(options: Options) -> Callable[[str], int]:
    return lambda host: int(options.for_host(host, "scram-iterations"))
