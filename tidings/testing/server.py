"""An installation for a test: one process with all services, or one process for each."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidings.kit.channel import dial
from tidings.kit.options import load
from tidings.kit.own_node import authorities
from tidings.kit.pki import URI_CLIENT

START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0

# The ways of running an installation.
ONE_PROCESS = "in-process"
LOOPBACK = "loopback"
PROCESSES = "processes"
WAYS = (ONE_PROCESS, LOOPBACK, PROCESSES)

SERVICES = ("registry", "router", "pubsub", "connector")


def free_port(address: str) -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


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
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.address = "127.0.0.1" if self.way != PROCESSES else "127.0.0.14"
        self.router_address = "127.0.0.1" if self.way != PROCESSES else "127.0.0.12"
        self.registry_address = "127.0.0.1" if self.way != PROCESSES else "127.0.0.11"
        # Where clients can connect: one address for each node with a connector.
        self.client_addresses = [self.address]
        self.port = free_port(self.address)
        self.tls_port = free_port(self.address)
        self.cluster_port = free_port("127.0.0.1")
        self.admin_port = free_port("127.0.0.1")

    # --- life ---

    def start(self) -> None:
        if self.way == PROCESSES:
            registry = f"--registry={self.registry_address}:{self.cluster_port}"
            for number, service in enumerate(SERVICES, 11):
                extra = [] if service == "registry" else [registry]
                if self.database and service in ("registry", "router"):
                    extra += ["--user-db=mysql", f"--user-db-uri={self.database}"]
                self.spawn(service, [service, f"--bind-address=127.0.0.{number}", *extra])
            for service in SERVICES:
                self.wait(service)
        else:
            extra = ["--in-process=false"] if self.way == LOOPBACK else []
            if self.database:
                extra += ["--user-db=mysql", f"--user-db-uri={self.database}"]
            self.spawn("all", ["--bind-address=127.0.0.1", *extra])
            self.wait("all")

    def arguments(self) -> list[str]:
        """The options that all its processes, and commands, have in common."""
        return [
            f"--data-dir={self.folder / 'data'}",
            f"--virt-hosts={self.hosts}",
            f"--c2s-ports={self.port}",
            f"--c2s-tls-ports={self.tls_port}",
            f"--cluster-port={self.cluster_port}",
            "--scram-iterations=4096",
            *([f"--sm-cluster-strategy-class={self.strategy}"] if self.strategy else []),
            *self.options,
        ]

    def spawn(self, name: str, words: Sequence[str]) -> None:
        admin = f"--admin-port={self.admin_port}" if name == "all" else "--admin-port=0"
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "tidings", "run", *words, *self.arguments(), admin, "--log-format=json"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=self.environment(),
        )  # fmt: skip
        log.close()

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
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

    def rss_kib(self) -> int:
        """The resident memory of all processes."""
        total = 0
        for process in self.processes.values():
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1])
        return total

    # --- its API ---

    def dial(self, address: str, name: str = "test") -> Any:
        """A channel of grpc.aio, as a client of this machine."""
        accepted = authorities(load(self.arguments(), {}))
        pair = accepted[0].issue([f"{URI_CLIENT}{name}"], name)
        return dial(address, self.cluster_port, b"".join(one.pem for one in accepted), pair)

    async def add_account(self, jid: str, password: str = "secret") -> None:  # noqa: S107
        from tidings.api.router.v1.account_pb2 import CreateAccountRequest
        from tidings.api.router.v1.account_pb2_grpc import AccountServiceStub

        channel = self.dial(self.router_address)
        try:
            accounts: Any = AccountServiceStub(channel)
            await accounts.CreateAccount(CreateAccountRequest(jid=jid, password=password), timeout=20)
        finally:
            await channel.close()

    async def add_accounts(self, *jids: str) -> None:
        await asyncio.gather(*(self.add_account(jid) for jid in jids))
