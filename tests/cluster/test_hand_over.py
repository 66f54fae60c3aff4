"""Sessions go from router to router while their clients chat (DESIGN 8, 9): on joins, drains and restarts."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.conftest import Chat, Cluster, pairs, texts
from tidings.testing.client import Closed, RawClient
from tidings.testing.server import ONE_PROCESS, PROCESSES


class OneWay:
    """A client that writes numbers to others, every two milliseconds, to their full and their bare JIDs in turn, and
    waits for nobody: what comes while a session goes from router to router comes in the midst of it."""

    def __init__(self, sender: RawClient, receivers: list[RawClient]) -> None:
        self._sender = sender
        self._receivers = receivers
        self.sent = 0
        self._last = 0

    @classmethod
    async def make(cls, cluster: Cluster, count: int = 8) -> OneWay:
        """The sender at one node, the receivers at the other one."""
        names = ["writer", *(f"reader{number}" for number in range(count))]
        await cluster.installation.add_accounts(*(f"{name}@localhost" for name in names))
        sender, *receivers = [await cluster.client(0 if name == "writer" else 1, name, "r") for name in names]
        return cls(sender, receivers)

    async def run(self, until: Callable[[], bool]) -> None:
        """Every number has to come, once and in order."""
        reading = [asyncio.create_task(self._read(receiver)) for receiver in self._receivers]
        while not self._last:
            self.sent += 1
            if until():
                self._last = self.sent
            await self._sender.send("".join(self._message(receiver) for receiver in self._receivers))
            await asyncio.sleep(0.002)
        for receiver, got in zip(self._receivers, await asyncio.gather(*reading), strict=True):
            assert got == list(range(1, self.sent + 1)), f"to {receiver.jid}, {_amiss(got, self.sent)}"

    def _message(self, receiver: RawClient) -> str:
        to = receiver.jid if self.sent // 3 % 2 else receiver.jid.partition("/")[0]
        return f"<message to='{to}' type='chat'><body>{self.sent}</body></message>"

    async def _read(self, receiver: RawClient) -> list[int]:
        got: list[int] = []
        while not self._last or self._last not in got[-20:]:
            try:
                got += map(int, await texts(receiver, 1, 15))
            except TimeoutError:
                break
        return got


def _amiss(got: list[int], sent: int) -> str:
    missing = sorted(set(range(1, sent + 1)) - set(got))
    return f"of {sent} messages: missing {missing}, {len(got) - len(set(got))} twice"


OTHER_STRATEGIES = [pytest.param(name, marks=pytest.mark.whole) for name in ("online-users", "broadcast")]


@pytest.mark.parametrize("strategy", ["home", *OTHER_STRATEGIES])
async def test_a_node_joins_while_clients_chat(cluster_of: Callable[..., Cluster], strategy: str) -> None:
    """No stanza is lost, doubled or out of order, and no contact sees presence."""
    three = cluster_of(3, ONE_PROCESS, strategy, "--debug=cluster")
    for node in (0, 1):
        three.installation.start_node(node)
    for node in (0, 1):
        three.installation.wait_node(node)
    await three.until({"n1.test": "up", "n2.test": "up"})
    chat = Chat(await pairs(three, [0, 1]))
    one_way = await OneWay.make(three)
    joined = 0.0

    async def join() -> None:
        nonlocal joined
        three.installation.start_node(2)
        await three.up()
        joined = time.monotonic()

    def over() -> bool:
        """Sessions that the new router did not take at once go a second later."""
        return joined > 0 and time.monotonic() > joined + 2.5

    await asyncio.gather(chat.run(over), one_way.run(over), join())
    moved = sum(three.installation.log(name).count('"session_moved"') for name in ("n1", "n2"))
    print(
        f"\n{strategy}: {moved} sessions moved, {chat.sent} messages there and back, the longest took "
        f"{chat.longest * 1000:.0f} ms; {one_way.sent} one way to each of 8"
    )
    assert (moved > 0) == (strategy == "home")
    assert chat.strange == []
    assert chat.sent > 200


@pytest.mark.whole
async def test_a_router_of_its_own_drains_and_no_client_notices(cluster_of: Callable[..., Cluster]) -> None:
    """Draining a router, registry or pubsub closes no client stream (DESIGN 3)."""
    cluster = cluster_of(2, PROCESSES, "", "--debug=cluster")
    installation = cluster.installation
    installation.start()
    chat = Chat(await pairs(cluster, [0, 1]))
    one_way = await OneWay.make(cluster)
    done = asyncio.Event()

    async def drain() -> None:
        for name in ("n1-router", "n1-pubsub", "n1-registry"):
            process = installation.processes[name]
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                while process.poll() is None:
                    await asyncio.sleep(0.02)
            assert process.poll() == 0, installation.log(name)[-2000:]
        done.set()

    await asyncio.gather(chat.run(done.is_set), one_way.run(done.is_set), drain())
    moved = installation.log("n1-router").count('"session_moved"')
    print(
        f"\n{moved} sessions moved under {chat.sent} messages there and back; the longest took "
        f"{chat.longest * 1000:.0f} ms; {one_way.sent} one way to each of 8"
    )
    assert moved > 0
    assert chat.strange == []


async def test_a_rolling_restart_with_clients_that_reconnect(three: Cluster) -> None:
    """Every node is drained and comes back; clients that are told to go connect elsewhere, and messages to those
    who are on their way are there when they come."""
    await three.up()
    names = [f"r{number}" for number in range(6)]
    await three.installation.add_accounts(*(f"{name}@localhost" for name in (*names, "sender")))
    got: dict[str, list[str]] = {name: [] for name in names}
    rolled, over = asyncio.Event(), asyncio.Event()

    async def live(name: str, node: int) -> None:
        while not over.is_set():
            client = await three.back(node % 3, name, "r", 40)
            node += 1
            try:
                while True:
                    try:
                        got[name] += await texts(client, 1, 0.5)
                    except TimeoutError:
                        if over.is_set():
                            await client.close()
                            return
            except Closed:
                await client.abort()

    async def write() -> int:
        number, node = 0, 0
        sender = await three.back(node, "sender")
        unanswered: list[str] = []
        while not rolled.is_set():
            number += 1
            try:
                for name in names:
                    await sender.send(f"<message to='{name}@localhost' type='chat'><body>{number}</body></message>")
                await sender.ping()
            except (Closed, OSError, TimeoutError):
                unanswered.append(str(number))
                node += 1
                await sender.abort()
                sender = await three.back(node % 3, "sender", "", 40)
            await asyncio.sleep(0.02)
        answered = {str(n) for n in range(1, number + 1)} - set(unanswered)
        await asyncio.sleep(0.09)
        for name in names:
            missing = answered - set(got[name])
            try:
                async with asyncio.timeout(10):
                    while missing:
                        await asyncio.sleep(0.05)
                        missing = answered - set(got[name])
            except TimeoutError:
                raise AssertionError(f"{name} never got {sorted(missing, key=int)} of {len(answered)}") from None
            order = [int(text) for text in got[name] if text in answered]
            assert len(order) == len(set(order)), f"{name} got something twice"
        over.set()
        return len(answered)

    async def roll() -> None:
        for node in range(3):
            three.process(node).send_signal(signal.SIGTERM)
            async with asyncio.timeout(40):
                while three.process(node).poll() is None:
                    await asyncio.sleep(0.02)
            assert three.process(node).poll() == 0
            three.restart(node)
            await three.until(dict.fromkeys(("n1.test", "n2.test", "n3.test"), "up"), (node + 1) % 3, 30)
        rolled.set()

    lives = [asyncio.create_task(live(name, number)) for number, name in enumerate(names)]
    writing = asyncio.create_task(write())
    await roll()
    count = await writing
    await asyncio.gather(*lives)
    print(f"\nrolling restart: {count} rounds of {len(names)} messages, all there")
    assert count > 20


@pytest.mark.parametrize("strategy", ["home", *OTHER_STRATEGIES])
async def test_of_two_who_bind_one_full_jid_at_once_exactly_one_stays(
    cluster_of: Callable[..., Cluster], strategy: str
) -> None:
    """RFC 6120 7.7.2.2 across nodes."""
    three = cluster_of(3, strategy=strategy)
    three.installation.start()
    await three.up()
    await three.installation.add_account("twin@localhost")

    async def attempt(node: int) -> tuple[RawClient, bool]:
        client = RawClient(three.installation.client_addresses[node], three.installation.port, "localhost")
        await client.connect()
        await client.encrypt()
        await client.authenticate("twin", "secret")
        await ready.wait()
        try:
            await client.bind("same")
        except (Closed, AssertionError):
            return client, False
        return client, True

    for _ in range(4):
        ready = asyncio.Event()
        tasks = [asyncio.create_task(attempt(node)) for node in range(3)]
        await asyncio.sleep(0.09)
        ready.set()
        clients: list[Any] = [client for client, _ in await asyncio.gather(*tasks)]
        alive = []
        for client in clients:
            if await ended(client) is None:
                alive.append(client)
        # Who has answered may have been replaced behind it.
        still = [client for client in alive if await ended(client) is None]
        conditions = {await ended(client) for client in clients if client not in still}
        assert conditions == {"conflict"}
        assert len(still) == 1, f"{len(still)} sessions of one full JID"
        await still[0].close()


async def ended(client: RawClient) -> str | None:
    """How the server has closed a stream; None when it goes on."""
    try:
        await client.ping()
    except Closed as closed:
        return closed.condition
    return None


@pytest.mark.whole
async def test_an_iq_gets_one_error_when_who_should_answer_dies(three: Cluster) -> None:
    """RFC 6120 8.2.3: one answer or one error, within 30 s, whatever dies."""
    await three.up()
    names = [await three.at_home("asker", 0), await three.at_home("mute", 2)]
    await three.installation.add_accounts(*(f"{name}@localhost" for name in names))
    asker, mute = await three.client(0, names[0]), await three.client(1, names[1])
    await asker.send(f"<iq type='get' id='q1' to='{mute.jid}'><query xmlns='urn:example:mute'/></iq>")
    assert (await mute.element()).get("id") == "q1"
    started = time.monotonic()
    three.kill(1)
    answer = await asker.element(35)
    print(f"\nthe error came after {time.monotonic() - started:.1f} s")
    assert (answer.get("id"), answer.get("type"), answer.get("from")) == ("q1", "error", mute.jid)
    assert await asker.ping() == []
