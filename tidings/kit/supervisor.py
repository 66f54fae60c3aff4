"""All cores of one machine: routers and connectors as processes that share the client ports.

Each process is a node with a name and a cluster port of its own. They are started together, one that dies is
started again, and they stop as one: connectors first, so that their clients are told while routers still serve.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tidings.kit.child_process import spawn
from tidings.kit.logging import get_logger
from tidings.kit.options import OptionError, Options
from tidings.kit.own_node import local_address, own_address, own_name
from tidings.kit.ports import PortInUse, port_holder
from tidings.kit.service import LAST, installed
from tidings.kit.tasks import Tasks

log = get_logger("server")

MOST_PROCESSES = 64
# A connector costs 8-23 µs a message and a router 2-6 µs: one router for three or four connectors.
PROCESSES_PER_ROUTER = 4.5

# Seconds before a process that died is started again: twice as long each time, from the beginning after it has
# served for a while.
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
STEADY = 60.0

# Of the time that stopping may take, what each process gets, and when connectors have had theirs.
DRAIN_SHARE = 0.4
CONNECTORS_SHARE = 0.5

# The exit code of a process whose options are wrong.
USAGE = 2


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process: what it is called in logs, what it runs, and its options."""

    name: str
    services: tuple[str, ...]
    options: Options

    @property
    def serves_clients(self) -> bool:
        return LAST in self.services


class Child(Protocol):
    """A process that was started."""

    async def serves(self) -> bool:
        """Waits until it serves: true; false when it ended before."""
        ...

    async def ended(self) -> int:
        """Waits until it ends: its exit code, or a signal's number below zero."""
        ...

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; nothing happens when it has ended."""
        ...


Spawn = Callable[[ChildSpec], Awaitable[Child]]
Ready = Callable[[], Coroutine[Any, Any, None]]


# --- what to run ---


def process_count(options: Options, names: Sequence[str]) -> int:
    """How many processes `--processes` asks for; `names`: the services that were named. Raises OptionError."""
    text: str = options["processes"]
    if text == "auto":
        count = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    elif text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_PROCESSES:
        count = int(text)
    else:
        raise OptionError([f"--processes={text}: say auto, or a number from 1 to {MOST_PROCESSES}"])
    if names and text != "1":
        raise OptionError(
            [
                f"--processes={text} decides itself which process runs which service; leave out "
                f"{' '.join(names)}, or set --processes=1"
            ]
        )
    if count > 1 and options["cluster-tls-cert-file"]:
        raise OptionError(
            [
                f"--processes={text} makes nodes with names of their own, and --cluster-tls-cert-file is made out to "
                "one; set --cluster-secret instead, or start each service by itself with its certificate"
            ]
        )
    if count > 1 and not options["cluster-port"]:
        raise OptionError([f"--processes={text} counts on from --cluster-port; set it to a port above 0"])
    return count


def plan(options: Options, count: int, machine: str, address: str, services: Sequence[str]) -> list[ChildSpec]:
    """The processes to run, at least two. `machine`: its name; `address`: where peers reach it; `services`: all
    that are installed. The first router keeps the ports that the options say: there commands look for it."""
    routers = min(max(1, round(count / PROCESSES_PER_ROUTER)), count - 1)
    beside = tuple(service for service in services if service != LAST)
    local = local_address(options)
    host = f"[{local}]" if ":" in local else local
    registries = [f"{host}:{options['cluster-port'] + number}" for number in range(routers)]
    specs = []
    for number in range(count):
        router = number < routers
        name = f"router{number + 1}" if router else f"connector{number - routers + 1}"
        changes = {
            "processes": "1",
            # All that files say is in these options already; a changed file counts from the next start of all.
            "config": "",
            "cluster_hostname": f"{name}.{machine}",
            "cluster_address": address,
            "cluster_port": str(options["cluster-port"] + number),
            "admin_port": str(options["admin-port"] and options["admin-port"] + number),
            "c2s_reuse_port": "true",
            "drain_timeout": f"{options['drain-timeout'] * DRAIN_SHARE:g}",
        }
        if not router:
            changes["registry"] = ",".join([*registries, *options["registry"]])
        specs.append(ChildSpec(name, beside if router else (LAST,), options.replace(**changes)))
    return specs


# --- watching ---


class Supervisor:
    """Keeps processes running until it is told to stop, or until going on is of no use."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        spawn: Spawn,
        ready: Ready,
        drain_timeout: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`ready` is called once, when all serve. `drain_timeout`: seconds that stopping may take."""
        self._specs = list(specs)
        self._spawn = spawn
        self._ready = ready
        self._drain_timeout = drain_timeout
        self._clock = clock
        self._sleep = sleep
        self._running: dict[str, Child] = {}
        self._served: set[str] = set()
        self._left: set[str] = set()
        self._killed = False
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tasks = Tasks(self._failed)

    async def run(self) -> int:
        """Runs all until `told`; the exit code. Raises what `ready` raises, after all have stopped."""
        for spec in self._specs:
            self._tasks.spawn(self._keep(spec), f"keep {spec.name}")
        try:
            code = await self._ended
        finally:
            await self._tasks.stop()
            await self._stop()
        return 1 if self._killed else code

    def told(self) -> None:
        """Stops all; told again, kills them."""
        if not self._ended.done():
            log.info("stopping")
            self._end(0)
            return
        self._killed = True
        for child in self._running.values():
            child.send(signal.SIGKILL)

    def _end(self, code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(code)

    def _failed(self, _task: str, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    async def _keep(self, spec: ChildSpec) -> None:
        """Runs one process, again and again."""
        pause = FIRST_PAUSE
        while True:
            child = self._running[spec.name] = await self._spawn(spec)
            since = None
            if await child.serves():
                since = self._clock()
                self._serving(spec)
            code = await child.ended()
            del self._running[spec.name]
            if code == 0:
                # It was told to: `tidings drain`, or a signal to it alone.
                log.info("process_left", process=spec.name)
                self._leave(spec)
                return
            if code == USAGE or spec.name not in self._served:
                # It could not even start, and would not the next time.
                log.error("process_failed", process=spec.name, exit_code=code)
                self._end(max(code, 1))
                return
            if since is not None and self._clock() - since >= STEADY:
                pause = FIRST_PAUSE
            log.error("process_died", process=spec.name, exit_code=code, again_in_s=pause)
            await self._sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _serving(self, spec: ChildSpec) -> None:
        first = len(self._served) < len(self._specs)
        self._served.add(spec.name)
        if first and len(self._served) == len(self._specs):
            self._tasks.spawn(self._announce(), "say that all serve")

    async def _announce(self) -> None:
        try:
            await self._ready()
        except Exception as error:
            self._failed("ready", error)  # whoever runs us says what is wrong

    def _leave(self, spec: ChildSpec) -> None:
        self._left.add(spec.name)
        if len(self._left) == len(self._specs):
            self._end(0)

    async def _stop(self) -> None:
        """Stops the connectors, then the routers, within the time for all."""
        start = asyncio.get_running_loop().time()
        for clients, share in ((True, CONNECTORS_SHARE), (False, 1.0)):
            running = {
                spec.name: self._running[spec.name]
                for spec in self._specs
                if spec.name in self._running and spec.serves_clients is clients
            }
            for child in running.values():
                child.send(signal.SIGTERM)
            try:
                async with asyncio.timeout_at(start + share * self._drain_timeout):
                    await asyncio.gather(*(child.ended() for child in running.values()))
            except TimeoutError:
                log.error("stopped_hard", processes=list(running), after_s=share * self._drain_timeout)
                for child in running.values():
                    child.send(signal.SIGKILL)
                await asyncio.gather(*(child.ended() for child in running.values()))


# --- the command ---


def run(options: Options, count: int, ready: Ready) -> int:
    """Runs `count` processes until a signal says otherwise; the exit code. Raises OptionError, PortInUse."""
    machine = own_name(options, (), alone=True)
    specs = plan(options, count, machine, own_address(options, machine), list(installed()))
    return asyncio.run(_supervise(options, specs, ready))


async def _supervise(options: Options, specs: list[ChildSpec], ready: Ready) -> int:
    await _check_ports(options)
    supervisor = Supervisor(specs, spawn, ready, options["drain-timeout"])
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.told)
    log.info("starting_processes", processes=[spec.name for spec in specs])
    return await supervisor.run()


async def _check_ports(options: Options) -> None:
    """Client ports that somebody else shares out would be shared in silence. Raises PortInUse."""
    loop = asyncio.get_running_loop()
    for address in options["bind-address"] or [""]:
        for port in (*options["c2s-ports"], *options["c2s-tls-ports"]):
            try:
                server = await loop.create_server(asyncio.Protocol, address or None, port, start_serving=False)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise PortInUse(address, port, port_holder(port, address)) from error
                raise
            server.close()
