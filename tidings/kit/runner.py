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
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from tidings.cluster.node import NodeState
from tidings.kit.admin import AdminServer
from tidings.kit.channel import Channels, dial
from tidings.kit.database_url import DatabaseUrl, database_url
from tidings.kit.db import Database
from tidings.kit.grpc_server import ClusterServer
from tidings.kit.identity import Caller, Identities
from tidings.kit.logging import get_logger
from tidings.kit.membership import Member
from tidings.kit.metrics import Metrics
from tidings.kit.options import OptionError, Options
from tidings.kit.own_node import authorities, cluster_addresses, load, own_keys, own_name, own_node
from tidings.kit.service import Context, Service, ServiceSpec, installed
from tidings.kit.tasks import Tasks

log = get_logger("server")

# Seconds to wait for a registry before the start is given up.
JOIN_PATIENCE = 60.0
# Seconds that others' calls get when the server stops.
SERVER_GRACE = 0.5
# Seconds that a service may take to stop.
STOP_TIMEOUT = 5.0

# After start what is there stays: collections need not look at it, nor come often.
GC_THRESHOLD = (20_000, 20, 50)


class Process:
    """A running process of services. `start` and `stop` once each."""

    def __init__(self, options: Options, specs: Sequence[ServiceSpec]) -> None:
        self._options = options
        self._specs = list(specs)
        self._undo = AsyncExitStack()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
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
        tasks = Tasks(lambda name, error: self.end(f"the task {name!r} died: {error}"))
        self._undo.push_async_callback(tasks.stop)

        accepted = authorities(options)
        name = own_name(options, names, alone="registry" in names and "router" in names)
        keys = own_keys(options, accepted[0], name)
        node = own_node(options, names, keys, name)
        identities = Identities(accepted)

        database = Database(database_url(options) if _needs_database(self._specs) else DatabaseUrl("none"))
        if database.url.backend != "none":
            await database.start()
            self._undo.push_async_callback(database.stop)

        roots = b"".join(authority.pem for authority in accepted)
        joining: list[Any] = []
        member = Member(node, lambda: joining, tasks, load, lambda: self.end("the cluster has put this node out"))
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
            channel = dial(host, port, roots, keys)
            self._undo.push_async_callback(channel.close)
            joining.append(channel)

        context = Context(options, node, member, channels, server, database, tasks, metrics)
        built = [self._build(spec, context, server) for spec in self._specs]
        self.context = context
        self._member = member
        self._server = server

        await server.start()
        self._undo.push_async_callback(server.stop, SERVER_GRACE)
        await self._start_admin(metrics)
        for spec_name, service, served in built:
            if spec_name == "registry":
                await self._start_service(spec_name, service)
                server.open(served)
        self._waiting_for = "waiting for a registry"
        await member.join(JOIN_PATIENCE)
        self._undo.push_async_callback(member.leave)
        member.on_change(lambda view: self._close_channels(channels, tasks, {one.incarnation for one in view}))
        for spec_name, service, served in built:
            if spec_name != "registry":
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

    def _close_channels(self, channels: Channels, tasks: Tasks, incarnations: set[str]) -> None:
        tasks.spawn(channels.keep_only(incarnations), "close channels")

    async def _stop_service(self, name: str, service: Service) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await service.stop()
        except Exception:
            log.exception("stop_failed", service=name)

    # --- ending ---

    def end(self, reason: str) -> None:
        """Makes `ended` return: something happened with which this process can't go on."""
        if not self._ended.done():
            self._ended.set_result(reason)

    async def ended(self) -> str:
        """Waits until the process should end by itself; the reason."""
        return await asyncio.shield(self._ended)

    async def stop(self) -> None:
        """Takes nothing new, says goodbye to clients, leaves the cluster, closes everything."""
        self._waiting_for = "stopping"
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
    """Runs a process until it is told to stop; the exit code."""
    process = Process(options, select(names))
    loop = asyncio.get_running_loop()
    told: asyncio.Event = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    starting = loop.create_task(process.start())
    waiting = loop.create_task(told.wait())
    await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 0
    await starting
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    if ready is not None:
        await ready(process)
    ending = loop.create_task(process.ended())
    await asyncio.wait((waiting, ending), return_when=asyncio.FIRST_COMPLETED)
    if ending.done():
        log.error("ending", reason=ending.result())
    else:
        log.info("stopping")
        # The second signal forces (DESIGN: the first drains).
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    try:
        async with asyncio.timeout(options["drain-timeout"]):
            await process.stop()
    except TimeoutError:
        log.error("stopped_hard", after_s=options["drain-timeout"])
    for task in (waiting, ending):
        task.cancel()
    return 1 if ending.done() and not ending.cancelled() else 0


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
