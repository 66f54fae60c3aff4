"""An installation for a test: one process with all services, or one process for each."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidings.kit.channel import dial
from tidings.kit.options import load
from tidings.kit.own_node import authorities
from tidings.kit.pki import URI_CLIENT
from tidings.testing.network import Host

START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0
# Ports for tests: below those that Linux gives to connections (net.ipv4.ip_local_port_range, 32768 and more).
FIRST_PORT = 12_000
LAST_PORT = 32_000

# The ways of running an installation.
ONE_PROCESS = "in-process"
LOOPBACK = "loopback"
PROCESSES = "processes"
WAYS = (ONE_PROCESS, LOOPBACK, PROCESSES)

SERVICES = ("registry", "router", "pubsub", "connector")


def free_port(address: str) -> int:
    """A port that nobody uses now, and that the system gives to no connection in the moment until it is used."""
    while True:
        port = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((address, port))
            return port


@dataclass
class Installation:
    """Processes of Tidings, with what a test must know of them."""

    way: str
    folder: Path
    options: Sequence[str] = ()
    hosts: str = "localhost,example.net"
    # Where the database is; '' for SQLite in the data folder. Only services that need it are told.
    database: str = ""
    # The strategy by which its routers share users; '' for the default.
    strategy: str = ""
    # How many nodes (each with all services) share the database; with several it must be one that can be shared.
    nodes: int = 1
    # The hosts that the nodes run on, in namespaces of their own; none: all on this machine, by loopback addresses.
    hosts_of_nodes: Sequence[Host] = ()
    # What the processes of each node find in their environment beside that of the test.
    environment_of_nodes: Sequence[Mapping[str, str]] = ()
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.address = self.address_of(0, "connector")
        self.router_address = self.address_of(0, "router")
        self.registry_address = self.address_of(0, "registry")
        # Where clients can connect: one address for each node with a connector.
        self.client_addresses = [self.address_of(node, "connector") for node in range(self.nodes)]
        here = "127.0.0.1" if self.hosts_of_nodes else self.address
        self.port = free_port(here)
        self.tls_port = free_port(here)
        self.cluster_port = free_port("127.0.0.1")
        self.admin_port = free_port("127.0.0.1")

    def address_of(self, node: int, service: str) -> str:
        """Where a service of a node listens. Nothing is shared between nodes but the database."""
        if self.hosts_of_nodes:
            return self.hosts_of_nodes[node].address
        if self.way == PROCESSES:
            return f"127.0.{node}.{11 + SERVICES.index(service)}"
        return "127.0.0.1" if self.nodes == 1 else f"127.0.0.{11 + node}"

    def name_of(self, node: int, service: str = "") -> str:
        """The process of a node, or of one of its services."""
        if self.nodes == 1:
            return service or "all"
        return f"n{node + 1}-{service}" if service else f"n{node + 1}"

    # --- life ---

    def start(self) -> None:
        for node in range(self.nodes):
            self.start_node(node)
        for node in range(self.nodes):
            self.wait_node(node)

    def start_node(self, node: int) -> None:
        """Starts the processes of one node."""
        if self.way != PROCESSES:
            extra = ["--in-process=false"] if self.way == LOOPBACK else []
            self._spawn_node(node, "", [f"--bind-address={self.address_of(node, 'connector')}", *extra])
            return
        for service in SERVICES:
            self.start_service(node, service)

    def start_service(self, node: int, service: str) -> None:
        """Starts one service of a node, where each is a process."""
        registry = f"--registry={self.address_of(node, 'registry')}:{self.cluster_port}"
        extra = [] if service == "registry" else [registry]
        self._spawn_node(node, service, [service, f"--bind-address={self.address_of(node, service)}", *extra])

    def _spawn_node(self, node: int, service: str, words: list[str]) -> None:
        if self.database and service in ("", "registry", "router"):
            words += ["--user-db=mysql", f"--user-db-uri={self.database}"]
        if self.nodes > 1:
            words.append(f"--cluster-hostname={self.name_of(node, service)}.test")
            if service in ("", "registry", "router"):
                words.append("--cluster-mode=true")
        self.spawn(self.name_of(node, service), words, node)

    def wait_node(self, node: int) -> None:
        for service in SERVICES if self.way == PROCESSES else ("",):
            self.wait(self.name_of(node, service))

    def arguments(self, node: int = 0) -> list[str]:
        """The options that all processes of a node, and commands, have in common."""
        return [
            f"--data-dir={self.folder / (f'data{node}' if node else 'data')}",
            f"--virt-hosts={self.hosts}",
            f"--c2s-ports={self.port}",
            f"--c2s-tls-ports={self.tls_port}",
            f"--cluster-port={self.cluster_port}",
            "--scram-iterations=4096",
            *([f"--sm-cluster-strategy-class={self.strategy}"] if self.strategy else []),
            *self.options,
        ]

    def spawn(self, name: str, words: Sequence[str], node: int = 0) -> None:
        admin = f"--admin-port={self.admin_port}" if name == "all" else "--admin-port=0"
        log = (self.folder / f"{name}.log").open("ab")
        place = self.hosts_of_nodes[node].command() if self.hosts_of_nodes else []
        arguments = [*words, *self.arguments(node), admin, "--log-format=json"]
        self.processes[name] = subprocess.Popen(
            [*place, sys.executable, "-m", "tidings", "run", *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=self.environment(node),
        )  # fmt: skip
        log.close()

    def environment(self, node: int = 0) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
        if self.environment_of_nodes:
            kept.update(self.environment_of_nodes[node])
        return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def wait(self, name: str) -> None:
        """Waits until a process says that it serves."""
        deadline = time.monotonic() + START_TIMEOUT
        while '"event": "serving"' not in self.log(name):
            if self.processes[name].poll() is not None:
                raise AssertionError(f"{name} ended while it started:\n{self.log(name)[-4000:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} does not serve after {START_TIMEOUT:.0f} s:\n{self.log(name)[-4000:]}")
            time.sleep(0.02)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        return "\n".join(self.log(name) for name in self.processes)

    def stop(self) -> dict[str, int]:
        """Ends all processes by their ids; their exit codes."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        codes: dict[str, int] = {}
        for name, process in self.processes.items():
            try:
                codes[name] = process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[name] = process.wait()
        return codes

    def end(self) -> None:
        """Ends all processes by their ids, at once: for who does not look at how they end."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()

    def rss_kib(self) -> int:
        """The resident memory of all processes."""
        total = 0
        for process in self.processes.values():
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1])
        return total

    # --- its API ---

    def dial(self, address: str, name: str = "test", node: int = 0) -> Any:
        """A channel of grpc.aio, as a client of this machine."""
        accepted = authorities(load(self.arguments(node), {}))
        pair = accepted[0].issue([f"{URI_CLIENT}{name}"], name)
        return dial(address, self.cluster_port, b"".join(one.pem for one in accepted), pair)

    async def add_account(self, jid: str, password: str = "secret") -> None:  # noqa: S107
        from tidings.api.router.v1.account_pb2 import CreateAccountRequest
        from tidings.api.router.v1.account_pb2_grpc import AccountServiceStub

        channel = self.dial(self.router_address)
        try:
            accounts: Any = AccountServiceStub(channel)
            # On a machine that is busy the first tries to connect may take too long (channel.OPTIONS).
            request = CreateAccountRequest(jid=jid, password=password)
            await accounts.CreateAccount(request, timeout=20, wait_for_ready=True)
        finally:
            await channel.close()

    async def add_accounts(self, *jids: str) -> None:
        await asyncio.gather(*(self.add_account(jid) for jid in jids))
