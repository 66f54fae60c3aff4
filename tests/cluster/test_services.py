"""Services as processes: any order of starting, and what becomes of the others when one is gone."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.kit.node_messages import node_from
from tidings.testing.client import Closed, RawClient
from tidings.testing.server import PROCESSES, SERVICES, Installation


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Installation]:
    installation = Installation(PROCESSES, tmp_path)
    yield installation
    installation.end()


def start(four: Installation, *services: str) -> None:
    for service in services:
        number = 11 + SERVICES.index(service)
        words = [service, f"--bind-address=127.0.0.{number}"]
        if service != "registry":
            words.append(f"--registry=127.0.0.11:{four.cluster_port}")
        four.spawn(service, words)


async def nodes(four: Installation) -> dict[str, str]:
    channel = four.dial(four.registry_address)
    stub: Any = RegistryServiceStub(channel)
    listed = map(node_from, (await stub.ListNodes(ListNodesRequest(), timeout=10)).nodes)
    await channel.close()
    return {node.services[0]: node.state.value for node in listed}


async def until(four: Installation, wanted: dict[str, str], timeout: float = 20.0) -> None:
    """Waits for a table of nodes."""
    seen: dict[str, str] = {}
    try:
        async with asyncio.timeout(timeout):
            while (seen := await nodes(four)) != wanted:
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"{seen} did not become {wanted}") from None


async def a_client(four: Installation, name: str) -> RawClient:
    """Logs in, again and again until it is let in."""
    async with asyncio.timeout(20):
        while True:
            client = RawClient(four.address, four.port, "localhost")
            try:
                await client.log_in(name, "secret")
                return client
            except (Closed, OSError, AssertionError):
                await client.abort()
                await asyncio.sleep(0.05)


UP = dict.fromkeys(SERVICES, "up")


@pytest.mark.parametrize(
    "order", [("connector", "pubsub", "router", "registry"), ("router", "connector", "registry", "pubsub")]
)
async def test_services_start_in_any_order(four: Installation, order: tuple[str, ...]) -> None:
    start(four, *order)
    for service in order:
        four.wait(service)
    await until(four, UP)
    await four.add_account("a@localhost")
    await (await a_client(four, "a")).close()


async def test_a_router_that_was_killed_is_noticed_and_its_successor_taken(four: Installation) -> None:
    start(four, *SERVICES)
    for service in SERVICES:
        four.wait(service)
    await four.add_account("a@localhost")
    client = await a_client(four, "a")
    four.processes["router"].kill()
    four.processes["router"].wait()
    assert (await client.closed()).condition == "system-shutdown", "the connector says so to its clients"
    await client.abort()
    await until(four, {**UP, "router": "failed"})
    (four.folder / "router.log").write_text("")
    start(four, "router")
    four.wait("router")
    await until(four, UP)
    again = await a_client(four, "a")
    assert await again.ping() == []
    await again.close()


async def test_a_registry_that_is_gone_stops_nobody(four: Installation) -> None:
    """DESIGN 3: with no registry reachable the last view holds."""
    start(four, *SERVICES)
    for service in SERVICES:
        four.wait(service)
    await four.add_account("a@localhost")
    client = await a_client(four, "a")
    four.processes["registry"].kill()
    four.processes["registry"].wait()
    assert await client.ping() == []
    other = await a_client(four, "a")
    await other.close()
    (four.folder / "registry.log").write_text("")
    start(four, "registry")
    four.wait("registry")
    await until(four, UP)
    assert await client.ping() == []
    await client.close()


async def test_a_connector_that_was_killed_leaves_no_sessions(four: Installation) -> None:
    start(four, *SERVICES)
    for service in SERVICES:
        four.wait(service)
    await four.add_account("a@localhost")
    client = await a_client(four, "a")
    assert client.jid
    four.processes["connector"].kill()
    four.processes["connector"].wait()
    from tidings.api.router.v1.account_pb2 import ListAccountsRequest
    from tidings.api.router.v1.account_pb2_grpc import AccountServiceStub

    channel = four.dial(four.router_address)
    stub: Any = AccountServiceStub(channel)
    async with asyncio.timeout(20):
        while any((await stub.ListAccounts(ListAccountsRequest(), timeout=10)).accounts[0].resources):
            await asyncio.sleep(0.05)
    await channel.close()
    await client.abort()


@pytest.mark.parametrize("when", ["failed", pytest.param("gone", marks=pytest.mark.whole)])
async def test_a_connector_that_was_put_out_while_it_hung_joins_again(tmp_path: Path, when: str) -> None:
    """It has no registry of its own: another process must tell it, though it is no node any more."""
    four = Installation(PROCESSES, tmp_path, ["--cluster-lease=3s"])
    four.start()
    try:
        await four.add_account("a@localhost")
        connector = four.processes["connector"]
        connector.send_signal(signal.SIGSTOP)
        await until(four, {**UP, "connector": "failed"})
        if when == "gone":
            await until(four, {service: "up" for service in SERVICES if service != "connector"})
        connector.send_signal(signal.SIGCONT)
        woken = time.monotonic()
        await until(four, UP)
        client = await a_client(four, "a")
        print(f"\nwoken when its row was {when}: logged in through it after {time.monotonic() - woken:.1f} s")
        await client.close()
        assert "put_out" in four.log("connector")
    finally:
        four.processes["connector"].send_signal(signal.SIGCONT)
        four.stop()


@pytest.mark.whole
async def test_a_router_that_stands_still_holds_its_clients_up_and_loses_nothing(tmp_path: Path) -> None:
    """Back-pressure reaches the sending client's socket; memory is bounded, and all arrives in order afterwards."""
    # No rate holds the client up but the router; and it reads more slowly than the router then catches up.
    limits = ("max-stanzas-per-second", "max-bytes-per-second", "max-send-queue-bytes")
    four = Installation(PROCESSES, tmp_path, [f"--{limit}=0" for limit in limits])
    four.start()
    try:
        await four.add_account("a@localhost")
        client = await a_client(four, "a")
        body = "x" * 20_000
        four.processes["router"].send_signal(signal.SIGSTOP)
        before = four.rss_kib()
        sent = 0
        try:
            # For less time than a link needs to notice (tidings.kit.channel).
            async with asyncio.timeout(1.5):
                while sent < 20_000:
                    await client.send(f"<message to='{client.jid}' id='{sent}'><body>{body}</body></message>")
                    sent += 1
        except TimeoutError:
            pass
        assert 0 < sent < 20_000, "at some point the socket takes no more"
        assert four.rss_kib() - before < 160 * 1024
        four.processes["router"].send_signal(signal.SIGCONT)
        received = 0
        async with asyncio.timeout(30):
            while received < sent:
                assert (await client.element()).get("id") == str(received)
                received += 1
        await client.abort()
    finally:
        four.processes["router"].send_signal(signal.SIGCONT)
        four.stop()


async def test_stopping_is_leaving(four: Installation) -> None:
    start(four, *SERVICES)
    for service in SERVICES:
        four.wait(service)
    four.processes["pubsub"].terminate()
    assert four.processes["pubsub"].wait(10) == 0
    await until(four, {service: "up" for service in SERVICES if service != "pubsub"}, timeout=2.0)
