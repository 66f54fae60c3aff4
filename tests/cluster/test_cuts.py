"""The four cuts of a node (DESIGN 7): from one peer, from all peers, from the database only, from everything.

Each node and the database is a host of its own (tidings.testing.network); a cut is silent. Clients reach all nodes
all the time. Times and counts are printed: pytest -s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, texts
from tidings.testing.client import RawClient
from tidings.testing.mariadb import MariaDB
from tidings.testing.network import Network
from tidings.testing.server import ONE_PROCESS, Installation

NODES = ("n1", "n2", "n3")
UP = dict.fromkeys(("n1.test", "n2.test", "n3.test"), "up")


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network(*NODES, "db")
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def cut(network: Network, tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes and their database, each on a host of its own."""
    database = MariaDB(tmp_path, network.hosts["db"])
    database.start()
    try:
        installation = Installation(
            ONE_PROCESS, tmp_path, ["--debug=cluster,registry"], database=database.create_database(), nodes=3,
            hosts_of_nodes=[network.hosts[name] for name in NODES],
        )  # fmt: skip
        try:
            for node in range(3):  # one after the other: which of two goes depends on who came later
                installation.start_node(node)
                installation.wait_node(node)
            yield Cluster(installation, database)
        finally:
            installation.end()
    finally:
        database.stop()


class Traffic:
    """Messages from the first node to the third and back, one after the other, for as long as it takes."""

    def __init__(self, one: RawClient, other: RawClient) -> None:
        self._pair = (one, other)
        self.sent = 0
        self.longest = 0.0
        self._over = False

    async def run(self) -> None:
        while not self._over:
            for sender, receiver in (self._pair, reversed(self._pair)):
                self.sent += 1
                started = time.monotonic()
                await sender.send(f"<message to='{receiver.jid}' type='chat'><body>{self.sent}</body></message>")
                assert await texts(receiver, 1, 15) == [str(self.sent)]
                self.longest = max(self.longest, time.monotonic() - started)

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            self._over = True
            await task


async def prepared(cluster: Cluster) -> tuple[Traffic, RawClient, tuple[str, str, str]]:
    """Chat between the first and the third node, and somebody at the second one."""
    await cluster.up()
    names = (await cluster.at_home("one", 0), await cluster.at_home("two", 1), await cluster.at_home("three", 2))
    await cluster.installation.add_accounts(*(f"{name}@localhost" for name in names))
    one, two, three = [await cluster.client(node, name) for node, name in enumerate(names)]
    return Traffic(one, three), two, names


async def as_before(cluster: Cluster, names: tuple[str, str, str], healed: float) -> float:
    """After healing all is as before, by itself: all nodes are up, and messages reach and leave each of them."""
    for node in range(3):
        await cluster.until(UP, node, 40)
    took = time.monotonic() - healed
    for node in range(3):
        client = await cluster.back(node, names[1], f"again{node}")
        other = await cluster.back((node + 1) % 3, names[0], f"again{node}")
        await other.send(f"<message to='{client.jid}' type='chat'><body>as before</body></message>")
        assert await texts(client, 1) == ["as before"]
        await client.close()
        await other.close()
    return took


async def test_of_two_nodes_that_do_not_reach_each_other_one_is_put_out(network: Network, cut: Cluster) -> None:
    traffic, two, names = await prepared(cut)
    async with cut.watching(2) as watch, traffic.going_on():
        started = time.monotonic()
        network.cut("n1", "n2")
        # Each of them is reached by the third; the later one goes.
        failed = await first(watch, "failed", 12) - started
        assert (await two.closed(15)).condition == "system-shutdown"
        # It joins anew, and waits as long as its peer does not reach it.
        await cut.until({**UP, "n2.test": "joining"}, 2, 15)
        assert [event[2] for event in watch.seen if event[3] == "failed"] == ["n2.test"]
        network.heal("n1", "n2")
        took = await as_before(cut, names, time.monotonic())
    print(
        f"\ncut from one peer: out after {failed:.1f} s, all as before {took:.1f} s after healing; "
        f"{traffic.sent} messages between the others, the longest took {traffic.longest:.1f} s"
    )
    assert failed < 8


async def first(watch: object, what: str, timeout: float) -> float:
    """When something was told first."""
    async with asyncio.timeout(timeout):
        while True:
            for at, _, _, kind in watch.seen:  # type: ignore[attr-defined]
                if kind == what:
                    return float(at)
            await asyncio.sleep(0.01)


async def test_a_node_that_reaches_no_peer_is_put_out_though_it_beats(network: Network, cut: Cluster) -> None:
    traffic, two, names = await prepared(cut)
    async with cut.watching(0, 2) as watch, traffic.going_on():
        started = time.monotonic()
        network.cut("n2", "n1", "n3")
        failed = await watch.all_tell((0, 2), "n2.test", "failed", 12) - started
        assert (await two.closed(15)).condition == "system-shutdown"
        closed = time.monotonic() - started
        await cut.until({**UP, "n2.test": "joining"}, 0, 15)
        network.heal("n2", "n1", "n3")
        took = await as_before(cut, names, time.monotonic())
    print(
        f"\ncut from all peers: out after {failed:.1f} s, its client closed after {closed:.1f} s, all as before "
        f"{took:.1f} s after healing; {traffic.sent} messages between the others, the longest {traffic.longest:.1f} s"
    )
    assert failed < 8
    assert {event[2] for event in watch.seen if event[3] == "failed"} == {"n2.test"}


async def test_a_node_that_does_not_reach_the_database_drains_when_its_peers_do(
    network: Network, cut: Cluster
) -> None:
    traffic, two, names = await prepared(cut)
    async with cut.watching(0, 2) as watch, traffic.going_on():
        started = time.monotonic()
        network.cut("n2", "db")
        draining = await watch.all_tell((0, 2), "n2.test", "draining", 12) - started
        assert (await two.closed(25)).condition == "system-shutdown"
        left = await watch.all_tell((0, 2), "n2.test", "left", 30) - started
        network.heal("n2", "db")
        took = await as_before(cut, names, time.monotonic())
    print(
        f"\ncut from the database only: draining after {draining:.1f} s, left after {left:.1f} s, all as before "
        f"{took:.1f} s after healing; {traffic.sent} messages between the others, the longest {traffic.longest:.1f} s"
    )
    assert draining < 6
    assert not [event for event in watch.seen if event[3] == "failed"]


async def test_a_node_that_is_cut_off_from_everything_closes_its_streams_and_is_failed(
    network: Network, cut: Cluster
) -> None:
    traffic, two, names = await prepared(cut)
    async with cut.watching(0, 2) as watch, traffic.going_on():
        started = time.monotonic()
        network.cut("n2", "n1", "n3", "db")
        failed = await watch.all_tell((0, 2), "n2.test", "failed", 12) - started
        assert (await two.closed(15)).condition == "system-shutdown"
        closed = time.monotonic() - started
        await watch.all_tell((0, 2), "n2.test", "left", 15)
        network.heal("n2", "n1", "n3", "db")
        took = await as_before(cut, names, time.monotonic())
    print(
        f"\ncut from everything: failed after {failed:.1f} s, its client closed after {closed:.1f} s, all as before "
        f"{took:.1f} s after healing; {traffic.sent} messages between the others, the longest {traffic.longest:.1f} s"
    )
    assert failed < 6.5
