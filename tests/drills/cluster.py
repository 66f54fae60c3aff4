"""A real cluster to break: three nodes on one MariaDB, each a host of its own, in one process or in one for each service."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.drills.replicated import Replicated
from tidings.testing.mariadb import MariaDB
from tidings.testing.network import Host, Network
from tidings.testing.server import ONE_PROCESS, PROCESSES, SERVICES, Installation

NODES = 3
# What their logs show in detail; `cluster` shows each decision of the strategy, too, and takes much of a small machine.
DEBUG = os.environ.get("DEBUG", "router,connector")
# Where Python finds what plants bugs.
PLANTED = Path(__file__).parent / "planted"
# Seconds for all that was started to serve: twelve processes take long where others compute.
SERVE = 60.0


class Places(Installation):
    """An installation whose services have addresses of their own within the host of their node."""

    network: Network | None = None
    # A bug that its processes have (planted/bugs.py); '' for none.
    bug = ""

    def environment(self, node: int = 0) -> dict[str, str]:
        found = super().environment(node)
        if self.bug:
            found |= {"PLANTED_BUG": self.bug, "PYTHONPATH": os.pathsep.join([str(PLANTED), found["PYTHONPATH"]])}
        return found

    def arguments(self, node: int = 0) -> list[str]:
        # Each node is a host of its own, as far as copies of sessions are concerned.
        return [*super().arguments(node), f"--cluster-host=host{node + 1}"]

    def address_of(self, node: int, service: str) -> str:
        if self.network is not None and self.way == PROCESSES:
            return self.network.hosts[_place(node, service)].address
        return super().address_of(node, service)


def _place(node: int, service: str) -> str:
    return f"n{node + 1}-{service}"


class Cluster:
    """Some nodes, and what can be done to them. What was started serves when `serve` returns."""

    def __init__(
        self, folder: Path, way: str, strategy: str, durability: str, networked: bool, mariadb: MariaDB | Replicated | None = None,
        nodes: int = NODES, bug: str = "",
    ) -> None:  # fmt: skip
        """`networked`: each node and the database in a network namespace, so that ways between them can be cut.
        Else `mariadb` may be one that runs already. `bug`: one of planted/bugs.py."""
        self.way = way
        self.nodes = nodes
        self._bug = bug
        self._folder = folder
        self._strategy = strategy
        self._durability = durability
        self.network = Network("n1", "n2", "n3", "db") if networked else None
        self._own_database = mariadb is None
        host = self.network.hosts["db"] if self.network else None
        self.mariadb: MariaDB | Replicated = mariadb or MariaDB(folder, host)
        self.installation: Places = None  # type: ignore[assignment]
        # Processes that stand still.
        self._hung: set[str] = set()

    # --- life ---

    def start(self) -> None:
        if self.network:
            self.network.start()
            self._give_addresses(self.network)
        if self._own_database:
            self.mariadb.start()
        hosts = [self.network.hosts[f"n{node + 1}"] for node in range(self.nodes)] if self.network else []
        Places.network, Places.bug = self.network, self._bug
        self.installation = Places(
            self.way, self._folder,
            ["--c2s-allow-plaintext=true", f"--message-durability={self._durability}", f"--debug={DEBUG}"],
            hosts="localhost", database=self.mariadb.create_database(), strategy=self._strategy, nodes=self.nodes,
            hosts_of_nodes=hosts,
            environment_of_nodes=[{"TIDINGS_CLUSTER_HOST": f"h{node + 1}"} for node in range(self.nodes)],
        )  # fmt: skip
        for node in range(self.nodes):
            self.installation.start_node(node)

    def _give_addresses(self, network: Network) -> None:
        """Each service of a node gets an address in the node's namespace."""
        for node in range(NODES):
            host = network.hosts[f"n{node + 1}"]
            prefix = host.address.rpartition(".")[0]
            for number, service in enumerate(SERVICES):
                address = f"{prefix}.{100 + 10 * node + number}"
                words = ["ip", "-n", host.namespace, "addr", "add", f"{address}/24", "dev", "eth0"]
                subprocess.run(words, check=True, capture_output=True)
                network.hosts[_place(node, service)] = Host(host.namespace, address)

    def stop(self) -> None:
        """Ends all that runs, by process id."""
        self.wake()
        if self.installation is not None:
            for process in self.installation.processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if self._own_database:
            self.mariadb.go_on()
            self.mariadb.stop()
        if self.network:
            self.network.stop()

    def names(self, node: int, service: str = "") -> list[str]:
        """The processes of a node, or the one of a service; where a node is one process, that is it."""
        if self.way == ONE_PROCESS:
            return [self.installation.name_of(node)]
        return [self.installation.name_of(node, one) for one in ([service] if service else SERVICES)]

    # --- what dies ---

    def kill(self, node: int, service: str = "") -> None:
        """SIGKILL to all of a node, or to one of its services."""
        names = self.names(node, service)
        for name in names:
            self.installation.processes[name].kill()
        for name in names:
            self.installation.processes[name].wait()

    def start_again(self, node: int) -> None:
        """Starts whatever of a node does not run."""
        for name in self.names(node):
            if self.installation.processes[name].poll() is None:
                continue
            log = self._folder / f"{name}.log"
            log.rename(log.with_suffix(f".{time.monotonic_ns()}.log"))
            if self.way == ONE_PROCESS:
                self.installation.start_node(node)
            else:
                self.installation.start_service(node, name.partition("-")[2])

    async def serve(self) -> None:
        """Starts what does not run, and waits until all serve. Raises AssertionError."""
        self.wake()
        for node in range(self.nodes):
            self.start_again(node)
        deadline = time.monotonic() + SERVE
        for node in range(self.nodes):
            for name in self.names(node):
                while '"event": "serving"' not in self.installation.log(name):
                    assert self.installation.processes[name].poll() is None, (
                        f"{name}: {self.installation.log(name)[-2000:]}"
                    )
                    assert time.monotonic() < deadline, (
                        f"{name} does not serve: {self.installation.log(name)[-2000:]}"
                    )
                    await asyncio.sleep(0.05)

    def drain(self, node: int) -> None:
        """SIGTERM to all of a node; see `left`."""
        for name in self.names(node):
            self.installation.processes[name].terminate()

    def left(self, node: int) -> bool:
        return all(self.installation.processes[name].poll() is not None for name in self.names(node))

    # --- what hangs ---

    def hang(self, node: int, service: str = "") -> None:
        for name in self.names(node, service):
            self.installation.processes[name].send_signal(signal.SIGSTOP)
            self._hung.add(name)

    def wake(self) -> None:
        """SIGCONT to all that stand still."""
        while self._hung:
            process = self.installation.processes[self._hung.pop()]
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)

    # --- what is cut ---

    def cut(self, one: int, other: int) -> None:
        self._ways(one, other, "cut")

    def heal(self, one: int, other: int) -> None:
        self._ways(one, other, "heal")

    def _ways(self, one: int, other: int, what: str) -> None:
        assert self.network is not None
        # Each pair stops each of the two hosts from finding one address of the other.
        for name, peer in zip(self._names_in_network(one), self._names_in_network(other), strict=True):
            getattr(self.network, what)(name, peer)

    def _names_in_network(self, node: int) -> list[str]:
        own = [_place(node, service) for service in SERVICES] if self.way == PROCESSES else []
        return [f"n{node + 1}", *own]
