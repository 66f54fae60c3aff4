"""Receivers that do not read: however much others write to them, the memory of the servers is bounded."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, texts
from tests.cluster.flood import Flood, add_accounts, log_in
from tidings.testing.client import RawClient
from tidings.testing.server import ONE_PROCESS, Installation

SENDERS = 1000
RECEIVERS = 10
SECONDS = float(os.environ.get("FLOOD_SECONDS", "15"))
MOST_MIB = 256
PATIENCE = 30.0

OPTIONS = ("--c2s-allow-plaintext=true",)


async def flooded(installation: Installation, senders_at: str, receivers_at: str) -> None:
    flood = Flood(installation, SENDERS, RECEIVERS)
    try:
        await flood.start(senders_at, receivers_at)
        await add_accounts(installation, ["alice", "bob"])
        alice = await log_in(senders_at, installation.port, "alice", "r")
        bob = await log_in(receivers_at, installation.port, "bob", "r")
        before = most = installation.rss_kib()

        def look() -> None:
            nonlocal most
            most = max(most, installation.rss_kib())

        chat = asyncio.create_task(chats(alice, bob), name="chat")
        await flood.run(SECONDS, look)
        waited = await asyncio.wait_for(chat, PATIENCE)
        added = (most - before) // 1024
        print(
            f"{SENDERS} senders, {flood.taken >> 20} MiB written, {flood.lost} of them cut off: "
            f"{before >> 10} MiB before, {added} MiB added; a message of others took {waited:.1f} s"
        )
        assert added <= MOST_MIB
        assert flood.lost == 0
        await alice.abort()
        await bob.abort()
    finally:
        await flood.stop()


async def chats(one: RawClient, other: RawClient) -> float:
    """The longest that a message took, of some that others write meanwhile."""
    longest = 0.0
    for number in range(3):
        started = time.monotonic()
        await one.send(f"<message to='{other.jid}' type='chat'><body>{number}</body></message>")
        assert await texts(other, 1, PATIENCE) == [str(number)]
        longest = max(longest, time.monotonic() - started)
    return longest


@pytest.mark.whole
async def test_receivers_that_do_not_read_fill_no_memory(tmp_path: Path) -> None:
    installation = Installation(ONE_PROCESS, tmp_path, OPTIONS)
    installation.start()
    try:
        await flooded(installation, installation.address, installation.address)
    finally:
        installation.stop()


@pytest.mark.whole
async def test_receivers_at_another_node_that_do_not_read_fill_no_memory(
    cluster_of: Callable[..., Cluster],
) -> None:
    cluster = cluster_of(2, ONE_PROCESS, "", *OPTIONS)
    cluster.installation.start()
    await cluster.up()
    first, second = cluster.installation.client_addresses
    await flooded(cluster.installation, first, second)
