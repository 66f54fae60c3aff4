"""Sessions outlive their router, their connector, and the whole node (DESIGN 9): another router takes them over."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import pytest

from tests.cluster.conftest import Cluster, texts
from tidings.testing.client import RawClient, Tree, show
from tidings.testing.server import PROCESSES
from tidings.xmpp import ns

SM = ns.SM


async def managed(client: RawClient) -> str:
    """Enables stream management; what resumption asks for."""
    await client.send(f"<enable xmlns='{SM}' resume='true'/>")
    while (tree := await client.element()).tag != f"{{{SM}}}enabled":
        pass
    return str(tree.get("id"))


async def resumed(cluster: Cluster, node: int, name: str, previous: str, h: int) -> tuple[RawClient, int]:
    """The client goes on with another stream, at whichever node, and hears how much was handled."""
    client = RawClient(cluster.installation.client_addresses[node], cluster.installation.port, "localhost")
    await client.connect()
    await client.encrypt()
    await client.authenticate(name, "secret")
    await client.send(f"<resume xmlns='{SM}' previd='{previous}' h='{h}'/>")
    tree = await client.element(15)
    client.jid = f"{name}@localhost/r"
    assert tree.tag == f"{{{SM}}}resumed", show(tree)
    return client, int(tree.get("h", ""))


async def pair(cluster: Cluster, home: int, at: int, friend_at: int) -> tuple[RawClient, RawClient]:
    """Romeo, whose account is at home at one node and whose stream is at another, and Juliet at home at hers; each
    sees the other's presence, which came directly."""
    romeo, juliet = await cluster.at_home("romeo", home), await cluster.at_home("juliet", friend_at)
    await cluster.installation.add_accounts(f"{romeo}@localhost", f"{juliet}@localhost")
    one, other = await cluster.client(at, romeo, "r"), await cluster.client(friend_at, juliet, "j")
    await one.send(f"<presence to='{other.jid}'/>")
    while (await other.element()).get("from") != one.jid:
        pass
    return one, other


async def numbered(client: RawClient, to: RawClient, *numbers: int) -> None:
    for number in numbers:
        await client.send(f"<message to='{to.jid}' type='chat'><body>{number}</body></message>")


async def nothing_but_messages(client: RawClient, until: str) -> list[str]:
    """What a client gets up to a message; fails on presence."""
    got: list[str] = []
    while not got or got[-1] != until:
        tree: Tree = await client.element(10)
        assert tree.tag != "{jabber:client}presence", show(tree)
        if tree.tag == "{jabber:client}message":
            got.append(str(tree.findtext("{jabber:client}body")))
        elif tree.get("type") == "get":
            await client.send(f"<iq type='result' id='{tree.get('id')}' to='localhost'/>")
    return got


def name_of(client: RawClient) -> str:
    return client.jid.partition("@")[0]


@pytest.mark.parametrize("home", [0, 1], ids=["router here", "router elsewhere"])
async def test_a_session_outlives_its_whole_node(three: Cluster, home: int) -> None:
    """Its client comes back to another node, has lost nothing, and nobody has seen it go."""
    await three.up()
    romeo, juliet = await pair(three, home, 0, 2)
    previous = await managed(romeo)
    await numbered(juliet, romeo, 1)
    assert await texts(romeo, 1) == ["1"]
    await numbered(juliet, romeo, 2)
    await numbered(romeo, juliet, 1, 2)
    assert await nothing_but_messages(juliet, "2") == ["1", "2"]
    three.kill(0)
    await romeo.abort()
    await numbered(juliet, romeo, 3)
    started = time.monotonic()
    romeo, handled = await resumed(three, 1, name_of(romeo), previous, 1)
    print(f"\nkill -9 of the node: resumed elsewhere after {time.monotonic() - started:.1f} s")
    assert await texts(romeo, 2) == ["2", "3"]
    # What it repeats is not passed on again.
    await numbered(romeo, juliet, *range(handled + 1, 4))
    assert await nothing_but_messages(juliet, "3") == ["3"]
    await romeo.close()
    await juliet.close()


@pytest.mark.parametrize("manages", [True, False], ids=["0198", "plain"])
async def test_a_stream_goes_on_when_its_router_is_killed(cluster_of: Callable[..., Cluster], manages: bool) -> None:
    """The client keeps its connection and notices a pause; nobody sees presence."""
    cluster = cluster_of(2, PROCESSES, "", "--debug=cluster")
    cluster.installation.start()
    one, other = "romeo", "juliet"
    await cluster.installation.add_accounts(f"{one}@localhost", f"{other}@localhost")
    romeo, juliet = await cluster.back(0, one, "r"), await cluster.back(1, other, "j")
    await romeo.send(f"<presence to='{juliet.jid}'/>")
    while (await juliet.element()).get("from") != romeo.jid:
        pass
    if manages:
        await managed(romeo)
    await numbered(romeo, juliet, 1)
    assert await nothing_but_messages(juliet, "1") == ["1"]
    process = cluster.installation.processes["n1-router"]
    process.kill()
    process.wait()
    started = time.monotonic()
    await numbered(romeo, juliet, 2)
    assert await nothing_but_messages(juliet, "2") == ["2"]
    print(f"\nkill -9 of a router: a message sent then took {time.monotonic() - started:.2f} s")
    await numbered(juliet, romeo, 3)
    assert await texts(romeo, 1, 10) == ["3"]
    await romeo.close()
    await juliet.close()


async def test_a_hung_owner_is_taken_over_and_does_no_harm_when_it_wakes(three: Cluster) -> None:
    """SIGSTOP of the node that has the session; its client resumes elsewhere; SIGCONT."""
    await three.up()
    romeo, juliet = await pair(three, 0, 1, 2)
    previous = await managed(romeo)
    await numbered(juliet, romeo, 1)
    assert await texts(romeo, 1) == ["1"]
    three.process(0).send_signal(signal.SIGSTOP)
    try:
        await romeo.abort()
        started = time.monotonic()
        romeo, _ = await resumed(three, 1, name_of(romeo), previous, 1)
        took = time.monotonic() - started
        print(f"\nSIGSTOP of the router: resumed elsewhere after {took:.1f} s")
        await numbered(juliet, romeo, 2)
        assert await texts(romeo, 1, 15) == ["2"]
    finally:
        three.process(0).send_signal(signal.SIGCONT)
    await three.up(1)
    await numbered(juliet, romeo, 3)
    assert await texts(romeo, 1, 15) == ["3"]
    await asyncio.wait_for(romeo.ping(), 10)
    await romeo.close()
    await juliet.close()
