"""Nodes whose clocks differ by hours (DESIGN 7: no two clocks are compared)."""

from __future__ import annotations

import time
from collections.abc import Callable
from glob import glob

import pytest

from tests.cluster.conftest import Cluster, texts
from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.kit.node_messages import node_from

LIBRARY = "/usr/lib/*/faketime/libfaketime.so.1"
HOUR_MS = 3600 * 1000


@pytest.fixture
def skewed(cluster_of: Callable[..., Cluster]) -> Cluster:
    """Three nodes: one whose clock is right, one an hour ahead, and one an hour behind."""
    found = glob(LIBRARY)
    assert found, "libfaketime is wanted: apt-get install libfaketime"
    cluster = cluster_of(3)
    cluster.installation.environment_of_nodes = [
        {"LD_PRELOAD": found[0], "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        for shift in ("+0", "+1h", "-1h")
    ]
    cluster.installation.start()
    return cluster


async def test_clocks_that_differ_by_hours_make_nobody_dead_and_a_death_is_told_as_soon(skewed: Cluster) -> None:
    await skewed.up()
    installation = skewed.installation
    await installation.add_accounts("alice@localhost", "bob@localhost")
    alice, bob = await skewed.client(0, "alice"), await skewed.client(2, "bob")
    async with skewed.watching(0, 2) as watch:
        sent = 0
        # Longer than the lease.
        ends = time.monotonic() + 7
        while time.monotonic() < ends:
            sent += 1
            await alice.send(f"<message to='{bob.jid}' type='chat'><body>{sent}</body></message>")
            assert await texts(bob, 1) == [str(sent)]
        assert watch.seen == []
        async with skewed.registry() as registry:
            listed = (await registry.ListNodes(pb.ListNodesRequest(), timeout=5)).nodes
        first, second, third = (node_from(node).last_update_unix_ms for node in listed)
        assert second - first > HOUR_MS * 0.9
        assert first - third > HOUR_MS * 0.9
        killed = time.monotonic()
        skewed.kill(1)
        told = await watch.all_tell((0, 2), "n2.test", "failed", 5) - killed
    print(f"\nclocks an hour ahead and behind: {sent} messages, nobody dead; kill -9 known to all after {told:.2f} s")
    assert told < 1.0
