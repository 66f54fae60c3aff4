"""One process of Tidings: services started in order, stopped in reverse.

Start: options, keys, the database's pool, services built, the cluster port bound, the registry started (where
it is one of ours), the cluster joined, the other services started, health on. Each step registers its undo
beside it.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from asyncio import sslproto
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tidings.api.node.v1.node_pb2 import DESCRIPTOR as NODE_DESCRIPTOR
from tidings.api.node.v1.node_pb2 import DrainRequest, DrainResponse, ProbeRequest, ProbeResponse
from tidings.api.node.v1.node_pb2_grpc import NodeServiceServicer, add_NodeServiceServicer_to_server
from tidings.cluster.node import NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.admin import AdminServer
from tidings.kit.channel import Channels, dial
from tidings.kit.database_url import DatabaseUrl, database_url
from tidings.kit.db import Database, DatabaseAway
from tidings.kit.grpc_server import ClusterServer
from tidings.kit.identity import Caller, Identities
from tidings.kit.logging import get_logger
from tidings.kit.membership import Expelled, Member
from tidings.kit.metrics import Metrics
from tidings.kit.options import OptionError, Options
from tidings.kit.own_node import Place, authorities, cluster_addresses, load, own_keys, own_node, own_place
from tidings.kit.pki import REGISTRY_DNS_NAME
from tidings.kit.ports import PortInUse
from tidings.kit.probe import probe
from tidings.kit.service import LAST, Context, Service, ServiceSpec, installed
from tidings.kit.tasks import Tasks

log = get_logger("server")

# Seconds to wait for a registry before the start is given up.
JOIN_PATIENCE = 60.0
FOREVER = 10.0 * 365 * 86400
# Seconds to wait until the peers reach this node, at its first start: one of them may be dying just now.
REACH_PATIENCE = 15.0
# Seconds between two starts while the database or the cluster is out of reach.
RETRY = 1.0
# Seconds that others' calls get when the server stops.
SERVER_GRACE = 0.5
# Seconds that a service may take to stop.
STOP_TIMEOUT = 5.0

# After start what is there stays: collections need not look at it, nor come often.
GC_THRESHOLD = (20_000, 20, 50)


class Then(Enum):
    """What follows when a process ends by itself."""

    STOP = "stop"
    FAIL = "fail"
    # Another start of the same node, under a new incarnation: at once, or when it has drained.
    JOIN_AGAIN = "join again"
    DRAIN_AND_JOIN_AGAIN = "drain, and join again"


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a process ends, and what then."""

    reason: str
    then: Then


_AFTER = {Expelled.PUT_OUT: Then.JOIN_AGAIN, Expelled.LEAVES: Then.DRAIN_AND_JOIN_AGAIN}


class NodeApi(NodeServiceServicer):
    """Serves node.v1."""

    def __init__(self, drain: Callable[[str], None]) -> None:
        self._drain = drain

    async def Drain(self, request: DrainRequest, context: Any) -> DrainResponse:
        self._drain(request.asked_by)
        return DrainResponse()

    async def Probe(self, request: ProbeRequest, context: Any) -> ProbeResponse:
        return ProbeResponse(outcome=(await probe(request.address, request.port)).value)


class Process:
    """A running process of services. `start` and `stop` once each."""

    def __init__(
        self, options: Options, specs: Sequence[ServiceSpec], place: Place, patience: float = JOIN_PATIENCE
    ) -> None:
        """`patience`: seconds to wait for a registry that lets this node in."""
        self._options = options
        self.place = place
        self._patience = patience
        self._specs = list(specs)
        self._undo = AsyncExitStack()
        self._ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._waiting_for = "starting"
        self._services: list[tuple[str, Service]] = []
        self.context: Context | None = None
        self._member: Member | None = None
        self._server: ClusterServer | None = None

    async def start(self) -> None:
        """Starts all services. What has been started is stopped again when a step fails."""
        try:
            await self._start()
        except BaseException:
            await self._undo.aclose()
            raise

    async def _start(self) -> None:
        options = self._options
        names = [spec.name for spec in self._specs]
        registries = _registries(options)
        if "registry" not in names and not registries:
            raise OptionError(
                [f"{', '.join(names)} without a registry: set --registry=HOST:{options['cluster-port']}"]
            )
        metrics = Metrics()
        tasks = Tasks(lambda name, error: self.end(f"the task {name!r} died: {error}", Then.FAIL))
        accepted = authorities(options)
        name = self.place.name
        keys = own_keys(options, accepted[0], name)
        node = own_node(options, names, keys, self.place)
        identities = Identities(accepted)

        database = Database(database_url(options) if _needs_database(self._specs) else DatabaseUrl("none"))
        if database.url.backend != "none":
            await database.start()
            self._undo.push_async_callback(database.stop)

        roots = b"".join(authority.pem for authority in accepted)
        joining: list[Any] = []
        member = Member(
            node,
            lambda: joining,
            tasks,
            load,
            lambda why, how: self.end(why, _AFTER[how]),
            peers=lambda: [
                (peer, channels.to(peer))
                for peer in member.view.with_service("registry")
                if peer.incarnation != node.incarnation and peer.state is not NodeState.FAILED
            ],
            lease=options["cluster-lease"],
            own_registry="registry" in names,
        )
        server = ClusterServer(
            cluster_addresses(options), options["cluster-port"], keys,
            lambda: roots + b"".join(node.certificate.encode() for node in member.view),
            lambda leaf: identities.identify(leaf, member.view),
            Caller("local", name, frozenset(names), node.incarnation),
            member.newer_view,
        )  # fmt: skip
        local = server.local_channel()
        channels = Channels(keys, node.incarnation, local if options["in-process"] else None)
        self._undo.push_async_callback(channels.close)
        if "registry" in names:
            joining.append(local)
        for host, port in registries:
            channel = dial(host, port, roots, keys, REGISTRY_DNS_NAME)
            self._undo.push_async_callback(channel.close)
            joining.append(channel)

        server.add(
            add_NodeServiceServicer_to_server,
            NodeApi(lambda who: self.end(f"{who} asked this node to drain", Then.STOP)),
            NODE_DESCRIPTOR.services_by_name["NodeService"].full_name,
        )
        context = Context(options, node, member, channels, server, database, tasks, metrics)
        built = [self._build(spec, context, server) for spec in self._specs]
        self.context = context
        self._member = member
        self._server = server

        # Before what they use is closed.
        self._undo.push_async_callback(tasks.stop)
        await server.start()
        self._undo.push_async_callback(server.stop, SERVER_GRACE)
        await self._start_admin(metrics)
        for spec_name, service, served in built:
            if spec_name == "registry":
                await self._start_service(spec_name, service)
                server.open(served)
        self._waiting_for = "waiting for a registry"
        await member.join(self._patience)
        self._undo.push_async_callback(member.leave)
        member.on_change(lambda _view: server.view_changed())
        member.on_change(lambda view: self._close_channels(channels, tasks, view))
        self._waiting_for = "waiting for peers that reach this node"
        await member.reached(min(self._patience, REACH_PATIENCE) if self._patience != FOREVER else FOREVER)
        for spec_name, service, served in built:
            if spec_name == "registry":
                continue
            if spec_name == LAST and "router" in names:
                # Others must know of the router before it has sessions.
                await member.set_state(NodeState.UP)
            self._waiting_for = f"starting {spec_name}"
            await self._start_service(spec_name, service)
            server.open(served)
        await member.set_state(NodeState.UP)
        await server.set_serving(True)
        self._waiting_for = ""
        log.info("serving", node=name, services=names, cluster_port=options["cluster-port"])

    def _build(self, spec: ServiceSpec, context: Context, server: ClusterServer) -> tuple[str, Service, list[str]]:
        """A service, and the gRPC services that it serves: they are held until it has started."""
        before = len(server.services)
        service = spec.load()(context)
        served = server.services[before:]
        server.hold(served)
        return spec.name, service, served

    async def _start_service(self, name: str, service: Service) -> None:
        await service.start()
        self._services.append((name, service))
        self._undo.push_async_callback(self._stop_service, name, service)
        log.debug("service_started", service=name)

    async def _start_admin(self, metrics: Metrics) -> None:
        if not self._options["admin-port"]:
            return
        bound = self._options["bind-address"]
        address = self._options["admin-bind-address"] or (
            bound[0] if bound and bound[0].startswith(("127.", "::1")) else "127.0.0.1"
        )
        admin = AdminServer(address, self._options["admin-port"], metrics, lambda: self._waiting_for)
        await admin.start()
        self._undo.push_async_callback(admin.stop)

    def _close_channels(self, channels: Channels, tasks: Tasks, view: ClusterView) -> None:
        alive = {node.incarnation for node in view if node.state is not NodeState.FAILED}
        tasks.spawn(channels.keep_only(alive), "close channels")

    async def _stop_service(self, name: str, service: Service) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await service.stop()
        except Exception:
            log.exception("stop_failed", service=name)

    # --- ending ---

    @property
    def drain_timeout(self) -> float:
        return float(self._options["drain-timeout"])

    def end(self, reason: str, then: Then) -> None:
        """Makes `ended` return: something happened with which this process can't go on."""
        if not self._ended.done():
            self._ended.set_result(Ending(reason, then))

    async def ended(self) -> Ending:
        """Waits until the process should end by itself: why, and what then."""
        return await asyncio.shield(self._ended)

    async def stop(self, drain: bool = True) -> None:
        """Takes nothing new, says goodbye to clients, hands over, leaves the cluster, closes everything.

        Without `drain` nothing is handed over: it is others' already.
        """
        self._waiting_for = "stopping"
        if drain:
            if self._member is not None:
                await self._member.set_state(NodeState.DRAINING)
            if self._server is not None:
                await self._server.set_serving(False)
            for name, service in reversed(self._services):
                try:
                    await service.drain()
                except Exception:
                    log.exception("drain_failed", service=name)
        await self._undo.aclose()


def _needs_database(specs: Sequence[ServiceSpec]) -> bool:
    return any(spec.database for spec in specs)


def _registries(options: Options) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for text in options["registry"]:
        host, colon, port = text.rpartition(":")
        if not colon or text.endswith("]"):
            host, port = text, str(options["cluster-port"])
        if not port.isdigit():
            raise OptionError([f"--registry: {text!r} is no host with a port"])
        found.append((host.strip("[]"), int(port)))
    return found


def select(names: Sequence[str]) -> list[ServiceSpec]:
    """The services to run, in starting order; all installed ones where none is named."""
    known = installed()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise OptionError([f"there is no service {unknown[0]!r}; there are {', '.join(known)}"])
    return [spec for name, spec in known.items() if not names or name in names]


async def serve(options: Options, names: Sequence[str], ready: Any = None) -> int:
    """Runs a process until it is told to stop; the exit code. A node that was put out joins again."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    specs = select(names)
    place = own_place(options, [spec.name for spec in specs])
    patience = JOIN_PATIENCE
    deadline = loop.time() + JOIN_PATIENCE
    waiting = False
    while True:
        try:
            ending = await _serve_once(Process(options, specs, place, patience), told, ready)
        except (DatabaseAway, PortInUse) as error:
            first = patience != FOREVER
            if first and (isinstance(error, PortInUse) or loop.time() >= deadline):
                raise
            if not waiting:
                waiting = True
                log.warning("waiting_to_start", reason=str(error))
            try:
                async with asyncio.timeout(RETRY):
                    await told.wait()
                return 0
            except TimeoutError:
                continue
        ready = None
        waiting = False
        if ending is None or ending.then is Then.STOP:
            return 0
        if ending.then is Then.FAIL:
            return 1
        # It had its place in the cluster; it gets it back when the cluster can be reached, however late.
        patience = FOREVER


async def _serve_once(process: Process, told: asyncio.Event, ready: Any) -> Ending | None:
    """One start of a node; None when a signal ended it."""
    loop = asyncio.get_running_loop()
    starting = loop.create_task(process.start())
    waiting = loop.create_task(told.wait())
    await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return None
    await starting
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    if ready is not None:
        await ready(process)
    ending = loop.create_task(process.ended())
    await asyncio.wait((waiting, ending), return_when=asyncio.FIRST_COMPLETED)
    ended = ending.result() if ending.done() else None
    if ended is None:
        log.info("stopping")
    else:
        (log.info if ended.then is Then.STOP else log.error)("ending", reason=ended.reason, then=ended.then.value)
    for task in (waiting, ending):
        task.cancel()
    await _stop(process, told, drain=ended is None or ended.then is not Then.JOIN_AGAIN)
    return ended


async def _stop(process: Process, told: asyncio.Event, drain: bool) -> None:
    """Drains and stops; the second signal forces, and so does the deadline."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    try:
        async with asyncio.timeout(process.drain_timeout):
            await process.stop(drain)
    except TimeoutError:
        log.error("stopped_hard", after_s=process.drain_timeout)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)


def run(options: Options, names: Sequence[str], ready: Any = None) -> int:
    """Runs services in this process on the fastest event loop there is; the exit code."""
    wanted = options["event-loop"]
    if wanted != "asyncio":
        try:
            import uvloop
        except ImportError:
            if wanted == "uvloop":
                raise OptionError(["--event-loop=uvloop: uvloop is not installed; pip install uvloop"]) from None
        else:
            return uvloop.run(serve(options, names, ready))
    # asyncio gives each TLS connection a buffer of 256 KiB; a record is 16 KiB.
    sslproto.SSLProtocol.max_size = 32 * 1024
    return asyncio.run(serve(options, names, ready))
