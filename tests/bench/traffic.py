"""Counts what goes between nodes for each stanza, under each strategy, and writes docs/traffic.md and its plot.

For 1, 2, 3, 5 and 8 nodes that share one MariaDB: users log in, write to each other at a fixed rate, and log out.
Then three nodes, of which one is joined and one is killed while they write. QUICK=1 is for a look.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pymysql

sys.path.insert(0, str(Path(__file__).parents[2]))

from chatters import Chatters
from traffic_node import CAUSED, KINDS
from traffic_page import write_page

from tidings.api.router.v1.account_pb2 import CreateAccountRequest
from tidings.api.router.v1.account_pb2_grpc import AccountServiceStub
from tidings.kit.database_url import parse
from tidings.testing.mariadb import MariaDB
from tidings.testing.server import ONE_PROCESS, Installation

QUICK = bool(os.environ.get("QUICK"))
NODES = [int(number) for number in os.environ.get("NODES", "1,2,3" if QUICK else "1,2,3,5,8").split(",")]
STRATEGIES = os.environ.get("STRATEGIES", "broadcast,online-users,home").split(",")
USERS = int(os.environ.get("USERS", "48" if QUICK else "240"))
STANZAS = int(os.environ.get("STANZAS", "200" if QUICK else "1200"))
# Stanzas a second, the same for all.
RATE = float(os.environ.get("RATE", "100"))
# Seconds that are counted while nothing happens.
IDLE = 2.0 if QUICK else 5.0
# Seconds that are counted after a join and after a crash, and the first of them, which are shown apart.
MINUTE = float(os.environ.get("MINUTE", "8" if QUICK else "60"))
FIRST = 5.0
# Nodes before the join, and which of them is killed.
BEFORE, KILLED = 3, 1

NODE = Path(__file__).with_name("traffic_node.py")
OPTIONS = ["--c2s-allow-plaintext=true", "--scram-iterations=4096"]
# Seconds for a node to write its counts. All is still when they are the same after QUIET, which may take STILL.
ANSWER = 5.0
QUIET = 0.5
STILL = 30.0


@dataclass(frozen=True)
class Counted:
    """What has been counted until now, or between two readings."""

    seconds: float
    stanzas: int
    log_ins: int
    # By kind: gRPC messages, items, bytes.
    traffic: dict[str, tuple[int, int, int]]
    # Statements that the database got, and bytes to and from it.
    statements: int
    database_bytes: int

    def __sub__(self, before: Counted) -> Counted:
        return Counted(
            self.seconds - before.seconds,
            self.stanzas - before.stanzas,
            self.log_ins - before.log_ins,
            {
                kind: tuple(now - then for now, then in zip(self.traffic[kind], before.traffic[kind], strict=True))
                for kind in self.traffic
            },  # type: ignore[misc]
            self.statements - before.statements,
            self.database_bytes - before.database_bytes,
        )


class CountedNodes(Installation):
    """Nodes that count what they send to each other."""

    def spawn(self, name: str, words: Sequence[str], node: int = 0) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, str(NODE), "run", *words, *self.arguments(node), "--admin-port=0", "--log-format=json"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                env={**self.environment(), "TRAFFIC_FILE": str(self.counts_of(name))},
            )  # fmt: skip

    def counts_of(self, name: str) -> Path:
        return self.folder / f"{name}.counts"


class Meter:
    """Reads the counters. Those of a node that died stay as they were read last."""

    def __init__(self, nodes: CountedNodes, chatters: Chatters) -> None:
        self._nodes = nodes
        self._chatters = chatters
        self._last: dict[str, dict[str, list[int]]] = {}
        url = parse(nodes.database)
        host, port = url.hosts[0]
        self._database = pymysql.connect(host=host, port=port, user=url.user, password=url.password)

    async def read(self) -> Counted:
        # A node that has just been started has no file before it knows the signal.
        asked = {
            name: (process, json.loads(self._nodes.counts_of(name).read_text())["writes"])
            for name, process in self._nodes.processes.items()
            if process.poll() is None and self._nodes.counts_of(name).exists()
        }
        for process, _ in asked.values():
            process.send_signal(signal.SIGUSR1)
        async with asyncio.timeout(ANSWER):
            for name, (_, writes) in asked.items():
                while (found := json.loads(self._nodes.counts_of(name).read_text()))["writes"] == writes:
                    await asyncio.sleep(0.01)
                self._last[name] = found["counts"]
        with self._database.cursor() as cursor:
            cursor.execute("show global status")
            status = dict(cursor.fetchall())
        return Counted(
            time.monotonic(),
            self._chatters.sent,
            self._chatters.log_ins,
            {
                kind: tuple(sum(counts[kind][index] for counts in self._last.values()) for index in range(3))
                for kind in KINDS
            },  # type: ignore[misc]
            int(status["Questions"]),
            int(status["Bytes_received"]) + int(status["Bytes_sent"]),
        )

    async def still(self) -> Counted:
        """Waits until nothing goes between the nodes on behalf of stanzas and sessions; reads."""
        async with asyncio.timeout(STILL):
            before = await self.read()
            while True:
                await asyncio.sleep(QUIET)
                now = await self.read()
                if all(now.traffic[kind] == before.traffic[kind] for kind in CAUSED):
                    return now
                before = now


async def steady(nodes: CountedNodes) -> dict[str, Counted]:
    """Idle nodes, log-ins, stanzas, and log-outs, each by itself."""
    chatters = Chatters(USERS, nodes.client_addresses, nodes.port)
    meter = Meter(nodes, chatters)
    began = await meter.still()
    await asyncio.sleep(IDLE)
    idle = await meter.read()
    await chatters.log_in()
    logged_in = await meter.still()
    await chatters.write(STANZAS, RATE)
    await chatters.arrival()
    if chatters.missing or chatters.log_ins > USERS:
        raise SystemExit("stanzas or sessions were lost; what such nodes cost says nothing")
    written = await meter.still()
    await chatters.log_out()
    logged_out = await meter.still()
    return {
        "idle": idle - began,
        "log-in": logged_in - idle,
        "stanzas": written - logged_in,
        "log-out": logged_out - written,
    }


async def changes(nodes: CountedNodes) -> dict[str, Counted]:
    """Traffic before a join, after it, and after a crash, while users write."""
    chatters = Chatters(USERS, nodes.client_addresses[:BEFORE], nodes.port, nodes.client_addresses[BEFORE])
    meter = Meter(nodes, chatters)
    await meter.still()
    await asyncio.sleep(IDLE)
    await chatters.log_in()
    readings = [await meter.still()]
    writing = asyncio.create_task(chatters.write(10_000_000, RATE))
    found: dict[str, Counted] = {}

    async def count(phase: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        readings.append(await meter.read())
        found[phase] = readings[-1] - readings[-2]

    await count("before", min(MINUTE, 15.0))
    nodes.start_node(BEFORE)
    await count("join, first", FIRST)
    await count("join, then", MINUTE - FIRST)
    # What it has counted dies with it.
    await meter.read()
    process = nodes.processes[nodes.name_of(KILLED)]
    process.kill()
    process.wait()
    await count("crash, first", FIRST)
    await count("crash, then", MINUTE - FIRST)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    await chatters.arrival()
    print(
        f"  {chatters.sent} stanzas, {chatters.missing} missing, {chatters.errors} errors, {chatters.doubles} doubles in a "
        f"session, {chatters.to_next_session} also to the next one, {chatters.log_ins - USERS} log-ins again",
        flush=True,
    )
    await chatters.log_out()
    return found


def run(strategy: str, count: int, database: str, measured: str) -> dict[str, Counted]:
    """Starts nodes, measures, stops them."""
    print(f"{strategy}, {count} nodes, {measured}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        total = count + (measured == "changes")
        nodes = CountedNodes(
            ONE_PROCESS, Path(folder), OPTIONS, hosts="localhost", database=database, strategy=strategy, nodes=total
        )
        try:
            # One by one: eight at once would take a small machine longer than a node may take to start.
            for node in range(count):
                nodes.start_node(node)
                nodes.wait_node(node)
            return asyncio.run(changes(nodes) if measured == "changes" else steady(nodes))
        finally:
            codes = nodes.stop()
            print(f"  exit codes {codes}", flush=True)


async def register(node: Installation) -> None:
    """Makes the accounts, over one connection."""
    dialled = node.dial(node.router_address)
    accounts: Any = AccountServiceStub(dialled)
    for number in range(USERS):
        request = CreateAccountRequest(jid=f"u{number}@localhost", password="secret")
        await accounts.CreateAccount(request, timeout=20)
    await dialled.close()


def main() -> None:
    # What was started is stopped then too.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        mariadb = MariaDB(Path(folder))
        mariadb.start()
        try:
            database = mariadb.create_database()
            # All find the same accounts.
            (Path(folder) / "first").mkdir()
            first = Installation(ONE_PROCESS, Path(folder) / "first", OPTIONS, hosts="localhost", database=database)
            first.start()
            try:
                asyncio.run(register(first))
            finally:
                first.stop()
            stable = {
                (strategy, count): run(strategy, count, database, "steady")
                for strategy in STRATEGIES
                for count in NODES
            }
            changing = {strategy: run(strategy, BEFORE, database, "changes") for strategy in STRATEGIES}
        finally:
            mariadb.stop()
    print(f"all in {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    write_page(stable, changing, USERS, RATE, FIRST, MINUTE)


if __name__ == "__main__":
    main()
