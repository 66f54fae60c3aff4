"""Three nodes on a Galera cluster of three (DESIGN 10): the database node that all use dies, or hangs.

Times are printed: pytest -s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import Chat, Cluster, pairs, texts
from tidings.testing.client import Closed, RawClient
from tidings.testing.galera import Galera
from tidings.testing.server import ONE_PROCESS, Installation

UP = dict.fromkeys(("n1.test", "n2.test", "n3.test"), "up")
# Seconds for which users go on logging in after the fault.
AFTER = 12.0


class LogIns:
    """Users who log in at all nodes, one after the other, and leave again."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        # When each attempt began and ended (monotonic), and whether it was let in.
        self.tries: list[tuple[float, float, bool]] = []

    async def run(self, node: int, over: Callable[[], bool]) -> None:
        installation = self._cluster.installation
        while not over():
            started = time.monotonic()
            client = RawClient(installation.client_addresses[node], installation.port, "localhost")
            try:
                async with asyncio.timeout(20):
                    await client.log_in("carol", "secret", f"r{node}-{len(self.tries)}")
                    await client.send("<presence/>")
                    await client.ping()
                ok = True
            except (Closed, OSError, AssertionError, TimeoutError):
                ok = False
            await client.abort()
            self.tries.append((started, time.monotonic(), ok))
            await asyncio.sleep(0.05)

    def pause(self, fault: float) -> float:
        """Seconds from the fault until log-ins that began after it work, at whichever node that is last."""
        failed = [ended for started, ended, ok in self.tries if not ok and ended > fault]
        last = max(failed, default=fault)
        return min(ended for started, ended, ok in self.tries if ok and started > fault and ended > last) - fault


@pytest.fixture
def on_galera(galera: Galera, tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes on three database nodes."""
    installation = Installation(
        ONE_PROCESS, tmp_path, ["--debug=cluster,router,database"], database=galera.create_database(), nodes=3
    )
    try:
        installation.start()
        yield Cluster(installation, galera)  # type: ignore[arg-type]
    finally:
        installation.end()
        galera.heal()


@pytest.mark.whole
@pytest.mark.parametrize(("how", "most"), [("killed", 5.0), ("hung", 15.0)])
async def test_the_database_node_in_use_goes_away_and_log_ins_go_on(
    on_galera: Cluster, galera: Galera, how: str, most: float
) -> None:
    cluster, victim = on_galera, galera.nodes[0]
    await cluster.up()
    await cluster.installation.add_accounts("carol@localhost", "dave@localhost", "absent@localhost")
    dave = await cluster.client(1, "dave")
    chat = Chat(await pairs(cluster, [0, 1, 2], 3))
    log_ins = LogIns(cluster)
    over = asyncio.Event()
    fault = 0.0

    async def break_it() -> None:
        nonlocal fault
        while len(log_ins.tries) < 9:
            await asyncio.sleep(0.05)
        fault = time.monotonic()
        (victim.kill if how == "killed" else victim.hang)()
        while time.monotonic() < fault + AFTER:
            await asyncio.sleep(0.05)
        over.set()

    async with cluster.watching(0, 1, 2) as watch:
        async with asyncio.TaskGroup() as group:
            group.create_task(break_it())
            group.create_task(chat.run(over.is_set))
            for node in range(3):
                group.create_task(log_ins.run(node, over.is_set))
        healing = time.monotonic()
        await asyncio.to_thread(galera.heal)
        healed = time.monotonic() - healing
        await dave.send("<message to='absent@localhost' type='chat'><body>kept</body></message>")
        await dave.ping()
        assert await texts(await cluster.client(0, "absent"), 1) == ["kept"]
        told = [event for event in watch.seen if event[3] in ("failed", "left")]
    suspected = [event for event in watch.seen if event[3] == "suspect"]
    refused = sum(not ok for started, _, ok in log_ins.tries if started > fault)
    print(
        f"\ndatabase node {how}: log-ins work again after {log_ins.pause(fault):.1f} s ({refused} of "
        f"{len(log_ins.tries)} refused); {chat.sent} messages between those online, the longest took "
        f"{chat.longest:.2f} s; suspected {len(suspected)}; in sync again {healed:.1f} s after its start"
    )
    assert told == [], "nobody is dead for it"
    assert all(ok for _, ended, ok in log_ins.tries if ended < fault)
    assert log_ins.pause(fault) < most
    assert chat.strange == []
    assert await cluster.states() == UP
