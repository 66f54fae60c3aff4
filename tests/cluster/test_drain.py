"""A node is drained by command; who watches sees it, and administrators are told (issue items 4 and 7)."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable

from tests.cluster.conftest import Cluster, texts
from tidings.testing.client import RawClient


async def command(cluster: Cluster, *words: str) -> Process:
    """`tidings …` on the machine of the first node."""
    installation = cluster.installation
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidings", *words,
        f"--bind-address={installation.address_of(0, 'registry')}", *installation.arguments(0),
        stdout=PIPE, stderr=PIPE, env=installation.environment(), cwd=installation.folder,
    )  # fmt: skip


async def test_a_drained_node_sends_its_clients_elsewhere_and_leaves(cluster_of: Callable[..., Cluster]) -> None:
    """RFC 6120 4.9.3.19: streams without a session are told where to go; 4.9.3.20 for those that have one."""
    cluster = cluster_of(3, "in-process", "", "--admins=admin@localhost")
    cluster.installation.start()
    await cluster.up()
    await cluster.installation.add_accounts("admin@localhost", "bob@localhost", "carol@localhost")
    admin = await cluster.client(0, "admin")
    bob, carol = await cluster.client(1, "bob"), await cluster.client(2, "carol")
    unbound = RawClient(cluster.installation.client_addresses[1], cluster.installation.port, "localhost")
    await unbound.connect()
    await unbound.encrypt()

    watching = await command(cluster, "nodes", "--watch", "--json")
    assert watching.stdout is not None
    known = [json.loads(await watching.stdout.readline()) for _ in range(3)]
    assert {one["hostname"] for one in known} == {"n1.test", "n2.test", "n3.test"}

    started = time.monotonic()
    draining = await command(cluster, "drain", "n2.test")
    assert (await unbound.closed(15)).condition == "see-other-host"
    other = unbound.error[0].text if unbound.error is not None else ""
    assert other in [f"{cluster.installation.client_addresses[node]}:{cluster.installation.port}" for node in (0, 2)]
    assert (await bob.closed(15)).condition == "system-shutdown"
    _, said = await asyncio.wait_for(draining.communicate(), 30)
    took = time.monotonic() - started
    assert draining.returncode == 0, said
    assert b"n2.test has left." in said
    assert cluster.process(1).wait(10) == 0
    print(f"\ntidings drain: the node had left after {took:.1f} s")

    told = [json.loads(await asyncio.wait_for(watching.stdout.readline(), 5)) for _ in range(2)]
    assert [(one["hostname"], one["change"]) for one in told] == [("n2.test", "draining"), ("n2.test", "left")]
    watching.terminate()
    await watching.wait()
    news: list[str] = []
    while "Node n2.test has left." not in news:
        news += await texts(admin, 1)  # that the last node is up may come as well
    assert news[-2:] == ["Node n2.test drains.", "Node n2.test has left."]

    # Who was drained comes back elsewhere, and what is written to them goes there.
    again = await cluster.client(0, "bob")
    await carol.send(f"<message to='{again.jid}'><body>welcome back</body></message>")
    assert await texts(again, 1) == ["welcome back"]

    unknown = await command(cluster, "drain", "n9.test")
    _, said = await asyncio.wait_for(unknown.communicate(), 30)
    assert unknown.returncode == 1
    assert b"there is no node 'n9.test'; there are n1.test, n3.test" in said
