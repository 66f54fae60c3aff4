"""The database goes away under load, and comes back (DESIGN 7, 8): killed, or hung and silent.

LONG=1 keeps it away for 30 seconds, as long as the promise is; without, for less time. Counts are printed: pytest -s.
"""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from tests.cluster.conftest import Chat, Cluster, pairs, texts
from tidings.testing.client import RawClient, Tree
from tidings.xmpp import ns

AWAY = 30.0 if os.environ.get("LONG") else 10.0
PAIRS = 6


async def log_in_fails(cluster: Cluster, node: int) -> float:
    """RFC 6120 6.5.10: who logs in is told to try again; how long that took."""
    started = time.monotonic()
    client = RawClient(cluster.installation.client_addresses[node], cluster.installation.port, "localhost")
    await client.connect()
    await client.encrypt()
    await client.send(f"<auth xmlns='{ns.SASL}' mechanism='PLAIN'>AGNhcm9sAHNlY3JldA==</auth>")
    refused = await client.element(30)
    assert refused[0].tag == f"{{{ns.SASL}}}temporary-auth-failure"
    await client.abort()
    return time.monotonic() - started


async def refused(client: RawClient, stanza: str, id_: str) -> float:
    """RFC 6120 8.3.3.18: what needs the database is answered with an error that says to wait."""
    started = time.monotonic()
    await client.send(stanza)
    while (answer := await client.element(30)).get("id") != id_:
        pass
    assert answer.get("type") == "error"
    error: Tree = answer.find("{jabber:client}error")  # type: ignore[assignment]
    assert error.get("type") == "wait"
    assert error[0].tag.endswith("}resource-constraint")
    return time.monotonic() - started


@pytest.mark.parametrize("how", [pytest.param("killed", marks=pytest.mark.whole), "hung"])
async def test_a_database_that_goes_away_costs_nobody_a_session_and_no_message(three: Cluster, how: str) -> None:
    await three.up()
    await three.installation.add_accounts("carol@localhost", "dave@localhost", "absent@localhost")
    dave = await three.client(1, "dave")
    chat = Chat(await pairs(three, [0, 1, 2], PAIRS))
    back = asyncio.Event()
    slowest = 0.0

    async def away() -> None:
        nonlocal slowest
        started = time.monotonic()
        (three.mariadb.kill if how == "killed" else three.mariadb.hang)()
        while time.monotonic() < started + AWAY:
            slowest = max(
                slowest,
                await log_in_fails(three, 2),
                await refused(dave, "<message to='absent@localhost' id='m'><body>x</body></message>", "m"),
                await refused(
                    dave,
                    f"<iq type='set' id='r'><query xmlns='{ns.ROSTER}'><item jid='a@example.net'/></query></iq>",
                    "r",
                ),
            )
        (three.mariadb.start if how == "killed" else three.mariadb.go_on)()
        back.set()

    async with three.watching(0, 1, 2) as watch:
        async with asyncio.TaskGroup() as group:
            group.create_task(chat.run(back.is_set))
            group.create_task(away())
        returned = time.monotonic()
        carol = await three.back(2, "carol", timeout=30)
        took = time.monotonic() - returned
        # Those who were there all the time are still there, and what needs the database works again.
        await dave.send("<message to='carol@localhost'><body>there</body></message>")
        assert await texts(carol, 1) == ["there"]
        # Each node finds out for itself that it is back, within a moment.
        async with asyncio.timeout(10):
            while True:
                await dave.send("<message to='absent@localhost' type='chat' id='k'><body>kept</body></message>")
                if not any(answer.get("id") == "k" for answer in await dave.ping()):
                    break
        assert await texts(await three.client(0, "absent"), 1) == ["kept"]
        assert [event for event in watch.seen if event[3] in ("failed", "suspect", "left")] == []
    print(
        f"\ndatabase {how} for {AWAY:.0f} s: {chat.sent} messages between those online, the longest took "
        f"{chat.longest:.2f} s; the slowest refusal {slowest:.1f} s; log-ins again {took:.1f} s after it is back"
    )
    assert chat.strange == []
    assert chat.longest < 5
    assert await three.states() == dict.fromkeys(("n1.test", "n2.test", "n3.test"), "up")
    with pytest.raises(TimeoutError):
        await dave.element(0.05)  # nobody was told anything else
