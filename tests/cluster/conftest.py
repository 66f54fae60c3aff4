"""Three nodes on one MariaDB, as processes, for tests that break them."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.cluster.hashing import rendezvous
from tidings.kit.node_messages import node_from
from tidings.testing.client import Closed, RawClient, Tree, show
from tidings.testing.mariadb import MariaDB
from tidings.testing.server import ONE_PROCESS, Installation

# Whether a test has failed; and what the nodes of those that did have said.
FAILED = pytest.StashKey[bool]()
SAID = pytest.StashKey[list[str]]()
# Of each node that much of the end, without what every start and every client says.
MOST_LINES = 10
NOT_SHOWN = {"timestamp", "event", "level", "category"}
USUAL = {
    "migrating", "serving", "joined", "self_made_certificate", "component_attached", "component_detached",
    "call_ended",
}  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = report.failed or item.stash.get(FAILED, False)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Last: of a long report the end is what is seen."""
    said = terminalreporter.config.stash.get(SAID, [])
    if said:
        terminalreporter.section("what the nodes said")
        terminalreporter.write("".join(f"{line}\n" for line in said))


def pytest_unconfigure(config: pytest.Config) -> None:
    if SAID in config.stash:
        # A test that has failed has not closed its clients: what Python says of that at its end would stand behind.
        atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), sys.__stderr__.fileno())


def notable(name: str, log: str) -> list[str]:
    """The last lines of a node's log that say what befell it."""
    found: list[str] = []
    for line in log.partition('"event": "stopping"')[0].splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("level") != "debug" and entry.get("event") not in USUAL:
            rest = ", ".join(f"{key}={value}" for key, value in entry.items() if key not in NOT_SHOWN)
            found.append(f"{name} {str(entry.get('timestamp'))[14:23]} {entry.get('event')}: {rest}"[:160])
    return found[-MOST_LINES:]


class Cluster:
    """An installation of several nodes, and what tests ask of it."""

    def __init__(self, installation: Installation, mariadb: MariaDB) -> None:
        self.installation = installation
        self.mariadb = mariadb

    def name(self, node: int) -> str:
        return f"n{node + 1}.test"

    def process(self, node: int) -> Any:
        return self.installation.processes[self.installation.name_of(node)]

    def kill(self, node: int) -> None:
        self.process(node).kill()
        self.process(node).wait()

    def restart(self, node: int) -> None:
        """Starts a node again and waits until it serves."""
        log = self.installation.folder / f"{self.installation.name_of(node)}.log"
        log.rename(log.with_suffix(f".{time.monotonic_ns()}.log"))
        self.installation.start_node(node)

    async def client(self, node: int, name: str, resource: str = "", available: bool = True) -> RawClient:
        """A session at a node, which has sent presence."""
        client = RawClient(self.installation.client_addresses[node], self.installation.port, "localhost")
        try:
            await client.log_in(name, "secret", resource)
            earlier: list[Tree] = []
            if available:
                await client.send("<presence/>")
                # What was sent to the account may come before the session's own presence does.
                while (tree := await client.element()).get("from") != client.jid:
                    earlier.append(tree)
            client.put_back(earlier)
        except BaseException:
            await client.abort()
            raise
        return client

    async def back(self, node: int, name: str, resource: str = "", timeout: float = 20.0) -> RawClient:
        """The same, tried until the server lets it in."""
        async with asyncio.timeout(timeout):
            while True:
                try:
                    return await self.client(node, name, resource)
                except (Closed, OSError, AssertionError, TimeoutError):
                    await asyncio.sleep(0.05)

    @asynccontextmanager
    async def registry(self, node: int = 0) -> AsyncIterator[Any]:
        """The registry of a node, for a client of that node's machine."""
        channel = self.installation.dial(self.installation.address_of(node, "registry"), node=node)
        try:
            yield RegistryServiceStub(channel)
        finally:
            await channel.close()

    async def at_home(self, stem: str, node: int) -> str:
        """A name whose account is at home at a node (strategy `home`), by the present view."""
        async with self.registry() as registry:
            listed = (await registry.ListNodes(pb.ListNodesRequest(), timeout=5)).nodes
        routers = sorted(found.incarnation for found in listed)
        wanted = next(found.incarnation for found in listed if found.hostname == self.name(node))
        return next(
            name for number in range(1000)
            if rendezvous(f"{(name := f'{stem}{number}')}@localhost", routers) == wanted
        )  # fmt: skip

    async def states(self, node: int = 0) -> dict[str, str]:
        async with self.registry(node) as registry:
            listed = (await registry.ListNodes(pb.ListNodesRequest(), timeout=5)).nodes
            return {found.hostname: found.state.value for found in map(node_from, listed)}

    async def until(self, wanted: dict[str, str], node: int = 0, timeout: float = 20.0) -> float:
        """Waits for a table of nodes, as a node's registry tells it; the seconds that it took."""
        started = time.monotonic()
        seen: dict[str, str] = {}
        try:
            async with asyncio.timeout(timeout):
                while seen != wanted:
                    try:
                        seen = await self.states(node)
                    except grpc.aio.AioRpcError as error:
                        # On a busy machine a handshake may be given up: asked again, like everything here.
                        if error.code() is not grpc.StatusCode.UNAVAILABLE:
                            raise
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{seen} did not become {wanted}") from None
        return time.monotonic() - started

    async def up(self, node: int = 0, timeout: float = 20.0) -> float:
        return await self.until(dict.fromkeys(map(self.name, range(self.installation.nodes)), "up"), node, timeout)

    @asynccontextmanager
    async def watching(self, *nodes: int) -> AsyncIterator[Watch]:
        """Watches the registries of some nodes."""
        watch = Watch()
        tasks = [asyncio.create_task(self._watch(node, watch)) for node in nodes]
        while len(watch.ready) < len(nodes):
            await asyncio.sleep(0.01)
        try:
            yield watch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, node: int, watch: Watch) -> None:
        async with self.registry(node) as registry:
            async for update in registry.WatchNodes(pb.WatchNodesRequest()):
                watch.ready.add(node)
                if update.HasField("change"):
                    kind = pb.NodeChangeKind.Name(update.change.kind).removeprefix("NODE_CHANGE_KIND_").lower()
                    watch.seen.append((time.monotonic(), node, update.change.node.hostname, kind))
                    watch.versions.setdefault(node, []).append(update.view_version)


class Watch:
    """What registries have told: (time, by the registry of which node, about whom, what)."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int, str, str]] = []
        self.versions: dict[int, list[int]] = {}
        self.ready: set[int] = set()

    async def all_tell(self, nodes: tuple[int, ...], about: str, what: str, timeout: float) -> float:
        """Waits until all of them have told something; when the last one did (monotonic)."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    told = {node: at for at, node, name, kind in self.seen if (name, kind) == (about, what)}
                    if set(told) >= set(nodes):
                        return max(told[node] for node in nodes)
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not all of {nodes} told that {about} {what}: {self.seen}") from None


@pytest.fixture
def cluster_of(mariadb: MariaDB, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Cluster]]:
    """Makes a cluster; the nodes that still run at the end are ended by their ids."""
    made: list[Installation] = []

    def make(nodes: int = 3, way: str = ONE_PROCESS, strategy: str = "", *options: str) -> Cluster:
        installation = Installation(
            way, tmp_path, options, database=mariadb.create_database(), nodes=nodes, strategy=strategy
        )
        made.append(installation)
        return Cluster(installation, mariadb)

    yield make
    for installation in made:
        installation.end()
        if request.node.stash.get(FAILED, False):
            said = request.config.stash.setdefault(SAID, [])
            for name in installation.processes:
                said += notable(name, installation.log(name))


@pytest.fixture
def three(cluster_of: Callable[..., Cluster]) -> Cluster:
    cluster = cluster_of(3, ONE_PROCESS, "", "--debug=cluster,router,connector")
    cluster.installation.start()
    return cluster


class Chat:
    """Pairs of clients, each writing to the other without a pause; what came, in which order, and what else came."""

    def __init__(self, pairs: list[tuple[RawClient, RawClient]]) -> None:
        self._pairs = pairs
        self.sent = 0
        self.longest = 0.0
        self.strange: list[str] = []

    async def run(self, until: Callable[[], bool]) -> None:
        await asyncio.gather(*(self._pair(*pair, until) for pair in self._pairs))

    async def _pair(self, one: RawClient, other: RawClient, until: Callable[[], bool]) -> None:
        number = 0
        while not until():
            number += 1
            for sender, receiver in ((one, other), (other, one)):
                started = time.monotonic()
                to = receiver.jid if number % 2 else receiver.jid.partition("/")[0]
                await sender.send(f"<message to='{to}' type='chat'><body>{number}</body></message>")
                while True:
                    tree = await receiver.element(15)
                    if tree.tag == "{jabber:client}message":
                        break
                    self.strange.append(show(tree))
                assert tree.findtext("{jabber:client}body") == str(number), show(tree)
                self.longest = max(self.longest, time.monotonic() - started)
                self.sent += 1


async def pairs(cluster: Cluster, nodes: list[int], count: int = 12) -> list[tuple[RawClient, RawClient]]:
    names = [f"user{number}" for number in range(2 * count)]
    await cluster.installation.add_accounts(*(f"{name}@localhost" for name in names))
    clients = [await cluster.client(nodes[n % len(nodes)], name, "r") for n, name in enumerate(names)]
    return list(zip(clients[::2], clients[1::2], strict=True))


async def texts(client: RawClient, count: int, timeout: float = 10.0) -> list[str]:
    """The bodies of the next messages."""
    found: list[str] = []
    async with asyncio.timeout(timeout):
        while len(found) < count:
            tree: Tree = await client.element(timeout)
            if tree.tag == "{jabber:client}message":
                found.append(tree.findtext("{jabber:client}body") or "")
    return found
