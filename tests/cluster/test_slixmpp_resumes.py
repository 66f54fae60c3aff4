"""A real client, slixmpp, goes on with its session when the connector, the router or all of the node behind it is killed
(XEP-0198 5)."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

import pytest
import slixmpp

from tests.cluster.conftest import Cluster, texts
from tidings.testing.server import PROCESSES, Installation

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Slix(slixmpp.ClientXMPP):
    def __init__(self, jid: str, cluster: Cluster) -> None:
        super().__init__(jid, "secret")
        self.ssl_context.check_hostname = False
        self.ssl_context.verify_mode = ssl.CERT_NONE
        self.register_plugin("xep_0198")
        self.happened: asyncio.Queue[str] = asyncio.Queue()
        self._cluster = cluster
        self.add_event_handler("session_start", lambda _event: self.send_presence())
        for event in ("sm_enabled", "session_resumed", "sm_failed", "disconnected"):
            self.add_event_handler(event, lambda _data, event=event: self.happened.put_nowait(event))
        self.add_event_handler("message", lambda message: self.happened.put_nowait(message["body"]))

    def go(self, node: int) -> None:
        installation = self._cluster.installation
        self.connect(installation.client_addresses[node], installation.port)

    async def until(self, wanted: str) -> list[str]:
        """What has happened before this, but for connections that were lost and tried again."""
        before: list[str] = []
        async with asyncio.timeout(20):
            while (event := await self.happened.get()) != wanted:
                before.append(event)
        return [event for event in before if event != "disconnected"]


async def links_are_up(installation: Installation) -> None:
    """Waits until the connector of the second node has its links: to the router of the first, to hold copies of its
    sessions; and to its own, without which nobody can resume there."""
    async with asyncio.timeout(20):
        for router in ("n1-router", "n2-router"):
            while not any(
                '"router_attached"' in line and router in line
                for line in installation.log("n2-connector").splitlines()
            ):
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("dies", ["connector", "router", "node"])
async def test_slixmpp_goes_on_when_what_is_behind_it_is_killed(
    cluster_of: Callable[..., Cluster], dies: str
) -> None:
    cluster = cluster_of(2, PROCESSES, "", "--debug=cluster,router,connector")
    installation = cluster.installation
    # As on two machines: the copy of a session is held on the other one.
    installation.environment_of_nodes = [{"TIDINGS_CLUSTER_HOST": host} for host in ("h1", "h2")]
    installation.start()
    await installation.add_accounts("romeo@localhost", "juliet@localhost")
    juliet = await cluster.back(1, "juliet", "j")
    await links_are_up(installation)
    romeo = Slix("romeo@localhost/r", cluster)
    romeo.go(0)
    await romeo.until("sm_enabled")
    # Its presence is there when it gets this.
    await juliet.send("<message to='romeo@localhost/r' type='chat'><body>before</body></message>")
    await romeo.until("before")
    killed = "n1-" if dies == "node" else f"n1-{dies}"
    processes = [process for name, process in installation.processes.items() if name.startswith(killed)]
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    await juliet.send("<message to='romeo@localhost/r' type='chat'><body>meanwhile</body></message>")
    if dies != "router":
        await romeo.until("disconnected")
        romeo.go(1)
        assert await romeo.until("session_resumed") == []
    assert await romeo.until("meanwhile") == []
    romeo.send_message("juliet@localhost/j", "after", mtype="chat")
    assert await texts(juliet, 1, 15) == ["after"]
    await romeo.disconnect()
    await juliet.close()
