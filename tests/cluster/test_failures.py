"""What becomes of a cluster when its nodes join, leave, die and hang (DESIGN 7). Times are printed: pytest -s."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable

import pytest

from tests.cluster.conftest import Cluster, texts
from tidings.testing.client import Closed, RawClient, Tree


async def friends(cluster: Cluster, bob_at: int = 1) -> tuple[str, str]:
    """alice and bob, who see each other's presence; alice is at home at the first node."""
    names = (await cluster.at_home("alice", 0), await cluster.at_home("bob", bob_at))
    await cluster.installation.add_accounts(*(f"{name}@localhost" for name in names), "carol@localhost")
    alice, bob = await cluster.client(0, names[0]), await cluster.client(1, names[1])
    for one, other in ((alice, bob), (bob, alice)):
        await one.send(f"<presence type='subscribe' to='{other.jid.partition('/')[0]}'/>")
        await until_presence(other, "subscribe")
        await other.send(f"<presence type='subscribed' to='{one.jid.partition('/')[0]}'/>")
        await until_presence(one, None)
    await alice.close()
    await bob.close()
    return names


async def until_presence(client: RawClient, type_: str | None, timeout: float = 10.0, from_: str = "") -> Tree:
    while True:
        tree = await client.element(timeout)
        if tree.tag == "{jabber:client}presence" and tree.get("type") == type_:
            if tree.get("from", "").partition("/")[0] != client.jid.partition("/")[0]:
                if not from_ or tree.get("from") == from_:
                    return tree


@pytest.mark.whole
async def test_ten_nodes_that_start_at_once_on_an_empty_database_all_join(
    cluster_of: Callable[..., Cluster],
) -> None:
    cluster = cluster_of(10)
    started = time.monotonic()
    cluster.installation.start()
    await cluster.up(9)
    print(f"\nten nodes up after {time.monotonic() - started:.1f} s")


@pytest.mark.parametrize("bob_at", [1, 2], ids=["session dies too", "session is elsewhere"])
async def test_a_killed_node_is_known_to_all_within_a_second(three: Cluster, bob_at: int) -> None:
    await three.up()
    names = await friends(three, bob_at)
    alice, bob = await three.client(0, names[0]), await three.client(1, names[1])
    await until_presence(alice, None, from_=bob.jid)
    async with three.watching(0, 2) as watch:
        killed = time.monotonic()
        three.kill(1)
        told = await watch.all_tell((0, 2), "n2.test", "failed", 5) - killed
        # Somebody may have a copy of the session, and take it over: that is waited for (services/router/orphans.py).
        gone = await until_presence(alice, "unavailable", 10, from_=bob.jid)
        unseen = time.monotonic() - killed
    print(f"\nkill -9: all know after {told * 1000:.0f} ms, contacts after {unseen * 1000:.0f} ms")
    assert told < 1.0
    assert gone.get("from") == bob.jid
    # Exactly once: nothing more comes, not even from the sweep.
    await asyncio.wait_for(nothing_more(alice), 10)
    # What is sent to who is gone is stored, and offered when they come back elsewhere.
    await alice.send(f"<message to='{names[1]}@localhost' type='chat'><body>are you there?</body></message>")
    await alice.ping()
    again = await three.client(2, names[1])
    assert await texts(again, 1) == ["are you there?"]


async def nothing_more(client: RawClient) -> None:
    for _ in range(3):
        assert [tree.get("type") for tree in await client.ping() if tree.tag.endswith("}presence")] == []


async def test_a_hung_node_is_put_out_within_six_seconds_and_joins_again_when_it_wakes(three: Cluster) -> None:
    await three.up()
    names = await friends(three)
    alice, bob = await three.client(0, names[0]), await three.client(1, names[1])
    await until_presence(alice, None, from_=bob.jid)
    async with three.watching(0, 2) as watch:
        stopped = time.monotonic()
        three.process(1).send_signal(signal.SIGSTOP)
        told = await watch.all_tell((0, 2), "n2.test", "failed", 10) - stopped
        await until_presence(alice, "unavailable", 10, from_=bob.jid)
        print(f"\nSIGSTOP: all know after {told:.1f} s")
        assert 4.0 < told < 6.0, f"stopped at {stopped}: {watch.seen}"
        woken = time.monotonic()
        three.process(1).send_signal(signal.SIGCONT)
        back = await watch.all_tell((0, 2), "n2.test", "joined", 20) - woken
        print(f"SIGCONT: it has joined again after {back:.1f} s")
    with pytest.raises(Closed):
        while True:
            await bob.element(5)
    await three.up()
    again = await three.back(1, names[1])
    await until_presence(alice, None, from_=again.jid)
    await alice.send(f"<message to='{again.jid}'><body>hello again</body></message>")
    assert await texts(again, 1) == ["hello again"]


async def test_a_leaving_node_is_known_at_once_and_its_clients_are_told(three: Cluster) -> None:
    await three.up()
    names = await friends(three)
    alice, bob = await three.client(0, names[0]), await three.client(1, names[1])
    await until_presence(alice, None, from_=bob.jid)
    async with three.watching(0, 2) as watch:
        told = time.monotonic()
        three.process(1).send_signal(signal.SIGTERM)
        draining = await watch.all_tell((0, 2), "n2.test", "draining", 5) - told
        left = await watch.all_tell((0, 2), "n2.test", "left", 10) - told
    assert (await bob.closed()).condition in ("system-shutdown", "see-other-host")
    await until_presence(alice, "unavailable", 5, from_=bob.jid)
    assert three.process(1).wait(10) == 0
    print(f"\nSIGTERM: draining known after {draining * 1000:.0f} ms, left after {left * 1000:.0f} ms")
    assert draining < 1.0
    assert await three.states() == {"n1.test": "up", "n3.test": "up"}


async def test_a_fast_restart_under_the_same_name_is_another_node(three: Cluster) -> None:
    await three.up()
    names = await friends(three)
    alice, bob = await three.client(0, names[0]), await three.client(1, names[1])
    await until_presence(alice, None, from_=bob.jid)
    started = time.monotonic()
    three.kill(1)
    three.restart(1)
    three.installation.wait_node(1)
    print(f"\nrestarted and serving after {time.monotonic() - started:.1f} s")
    await until_presence(alice, "unavailable", 5, from_=bob.jid)
    again = await three.client(1, names[1])
    await until_presence(alice, None, 5, from_=again.jid)
    await three.up()


async def test_a_second_node_under_a_taken_name_is_refused_and_told_why(three: Cluster) -> None:
    await three.up()
    installation = three.installation
    installation.spawn(
        "impostor",
        [
            "--bind-address=127.0.0.99", "--cluster-mode=true", "--cluster-hostname=n2.test",
            "--user-db=mysql", f"--user-db-uri={installation.database}",
        ],
        node=7,
    )  # fmt: skip
    process = installation.processes["impostor"]
    for _ in range(2000):
        if process.poll() is not None:
            break
        await asyncio.sleep(0.01)
    assert process.poll() == 1
    assert "give this one another --cluster-hostname" in installation.log("impostor")
    del installation.processes["impostor"]
    assert await three.states() == dict.fromkeys(("n1.test", "n2.test", "n3.test"), "up")


async def test_a_node_with_another_strategy_or_other_hosts_is_refused_and_told_why(three: Cluster) -> None:
    await three.up()
    installation = three.installation
    for number, (option, said) in enumerate(
        (
            ("--sm-cluster-strategy-class=broadcast", "the same --sm-cluster-strategy-class"),
            ("--virt-hosts=example.com", "give all nodes the same --virt-hosts"),
        )
    ):
        name = f"other{number}"
        installation.spawn(name, [], node=8 + number)  # ended at once: its options come below
        installation.processes[name].kill()
        installation.processes[name].wait()
        installation.processes[name] = spawn_with(installation, name, 8 + number, option)
        for _ in range(2000):
            if installation.processes[name].poll() is not None:
                break
            await asyncio.sleep(0.01)
        assert installation.processes[name].poll() == 1
        assert said in installation.log(name)
        del installation.processes[name]


def spawn_with(installation: object, name: str, node: int, option: str) -> object:
    import subprocess
    import sys

    installation_: object = installation
    arguments = [one for one in installation.arguments(node) if not option.startswith(one.partition("=")[0] + "=")]  # type: ignore[attr-defined]
    log = (installation.folder / f"{name}.log").open("ab")  # type: ignore[attr-defined]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "tidings", "run", f"--bind-address=127.0.0.{90 + node}", "--cluster-mode=true",
            f"--cluster-hostname={name}.test", "--user-db=mysql", f"--user-db-uri={installation.database}",  # type: ignore[attr-defined]
            *arguments, option, "--admin-port=0", "--log-format=json",
        ],
        stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=installation.environment(),  # type: ignore[attr-defined]
    )  # fmt: skip
    log.close()
    assert installation_ is installation
    return process


async def test_watching_goes_on_where_it_ended(three: Cluster) -> None:
    """registry.v1 WatchNodes: `since` gives the changes behind a version, in order, and no snapshot."""
    from tidings.api.registry.v1 import registry_pb2 as pb

    await three.up()
    async with three.registry(0) as registry:
        before = (await registry.ListNodes(pb.ListNodesRequest(), timeout=5)).view_version
        three.kill(2)
        await three.until({"n1.test": "up", "n2.test": "up", "n3.test": "failed"})
        call = registry.WatchNodes(pb.WatchNodesRequest(since=before))
        update = await asyncio.wait_for(call.read(), 5)
        assert update.HasField("change")
        assert (update.change.node.hostname, update.view_version) == ("n3.test", before + 1)
        call.cancel()


@pytest.mark.parametrize("strategy", ["broadcast", "home"])
async def test_an_account_that_is_removed_loses_its_sessions_at_all_nodes(
    cluster_of: Callable[..., Cluster], strategy: str
) -> None:
    """RFC 6120 4.9.3.12, XEP-0077 3.2: whichever node removes it."""
    three = cluster_of(3, strategy=strategy)
    three.installation.start()
    await three.up()
    await three.installation.add_account("gone@localhost")
    sessions = [await three.client(node, "gone", f"r{node}") for node in range(3)]
    removed = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidings", "user", "remove", "gone@localhost",
        f"--bind-address={three.installation.address_of(1, 'router')}", *three.installation.arguments(1),
        env=three.installation.environment(), cwd=three.installation.folder,
    )  # fmt: skip
    assert await asyncio.wait_for(removed.wait(), 30) == 0
    assert [(await session.closed(10)).condition for session in sessions] == ["not-authorized"] * 3
