"""Measures Tidings with the load driver, and writes the table docs/benchmarks.md.

One all-in-one process, and four processes, with default limits; the driver speaks no TLS, so that authentication in
clear is switched on, and a client of ours opens the idle TLS connections. Then chat on two nodes that share a MariaDB,
with each pair on both, and on all cores of this machine. Medians of RUNS runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from machine import written_by
from tables import Acknowledged, Figures, acknowledged, acknowledged_table, beside, medians, table

from tidings.testing.client import RawClient
from tidings.testing.mariadb import MariaDB
from tidings.testing.server import ONE_PROCESS, PROCESSES, START_TIMEOUT, Installation

DRIVER = Path(__file__).with_name("xmppload")
RUNS = int(os.environ.get("RUNS", "3"))
SECS = os.environ.get("SECS", "5")
LOG_IN = ["--c2s-allow-plaintext=true", "--registration=true", "--scram-iterations=10000"]
# Nothing is kept of what arrives: what the path alone costs.
OPTIONS = [*LOG_IN, "--message-durability=none", "--archive=false"]
IDLE = 500

# Label, mode of the driver, its options.
CHAT = (
    ("chat, 100 pairs, 1 in flight", "chat", "--users", "200", "--window", "1"),
    ("chat, 100 pairs, 10 in flight", "chat", "--users", "200", "--window", "10"),
    ("chat at 2,000 a second", "open", "--users", "200", "--rate", "2000"),
    ("chat at 20,000 a second", "open", "--users", "200", "--rate", "20000"),
)
# With XEP-0198: a message counts when it has arrived and its sender has the <a/>. Who sends asks after five, and
# whenever it waits.
ACKED = tuple(
    (f"{window} in flight", ["--users", "200", "--body", "100", "--window", str(window), "--sm", "5", "--acked", "1"])
    for window in (1, 5, 10)
)
PING = ("ping", "iq", "--users", "200", "--window", "1")


class AllCores(Installation):
    """One machine with as many processes as it has cores, behind one that watches them."""

    def start_node(self, node: int) -> None:
        self.spawn("all", ["--processes=auto", f"--bind-address={self.address}"])

    def wait_node(self, node: int) -> None:
        """All write the same log."""
        deadline = time.monotonic() + START_TIMEOUT
        while self.log("all").count('"event": "serving"') < len(os.sched_getaffinity(0)):
            if self.processes["all"].poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"not all processes serve:\n{self.log('all')[-4000:]}")
            time.sleep(0.02)


# --- the driver ---


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def drive(installation: Installation, mode: str, *words: str) -> dict[str, Any]:
    """One run: user i is at the address i mod n, so that the partners of a pair are on different nodes."""
    pids = {name: process.pid for name, process in installation.processes.items()}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    result = subprocess.run(
        [
            str(DRIVER), "--mode", mode, "--pids", ",".join(map(str, pids.values())), "--secs", SECS,
            "--targets", ",".join(f"{address}:{installation.port}" for address in installation.client_addresses), *words,
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"the driver failed ({mode}): {result.stderr or result.stdout}")
    found: dict[str, Any] = json.loads(result.stdout)
    if found["error"]:
        print("  driver:", found["error"], file=sys.stderr)
    used = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    total = sum(used.values()) or 1.0
    found["share"] = {name: seconds / total for name, seconds in used.items()}
    return found


def measure(installation: Installation, label: str, mode: str, *words: str) -> Figures:
    print(f"  {label} …", flush=True)
    figures = medians(label, [drive(installation, mode, *words) for _ in range(RUNS)])
    # Told at once: who has waited for so long keeps it, whatever happens to the rest.
    print(table([figures])[-1], flush=True)
    return figures


def log_ins(installation: Installation) -> str:
    print("  log-ins and memory …", flush=True)
    runs = [drive(installation, "login", "--users", "1000", "--conc", "50", "--idle", "1") for _ in range(RUNS)]
    rate = statistics.median(run["logins_per_s"] for run in runs)
    cpu = statistics.median(run["login_server_cpu_us"] for run in runs)
    return (
        f"Log-ins (SASL PLAIN against SCRAM keys of 10,000 iterations): {rate:,.0f} a second, {cpu:,.0f} µs of "
        "CPU each."
    )


# --- memory ---


def idle_memory(way: str, tls: bool) -> float:
    """KiB of resident memory for each idle, bound session, in an installation that has done nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        installation = Installation(way, Path(folder), OPTIONS, hosts="localhost")
        installation.start()
        try:
            return asyncio.run(idle_sessions(installation, tls))
        finally:
            installation.stop()


async def idle_sessions(installation: Installation, tls: bool) -> float:
    clients: list[RawClient] = []

    async def open_sessions(accounts: range) -> None:
        for number in accounts:
            await installation.add_account(f"idle{number}@localhost")
            for resource in range(50):
                port = installation.tls_port if tls else installation.port
                client = RawClient(installation.address, port, "localhost")
                await client.connect(tls)
                await client.open()
                await client.authenticate(f"idle{number}", "secret")
                await client.bind(f"r{resource}")
                clients.append(client)

    await open_sessions(range(2))
    before, first = installation.rss_kib(), len(clients)
    await open_sessions(range(2, 2 + IDLE // 50))
    after = installation.rss_kib()
    each = (after - before) / (len(clients) - first)
    for client in clients:
        await client.abort()
    return each


# --- the ways of running ---


def whole(way: str) -> tuple[list[Figures], list[str]]:
    """Everything, in one way of running: the figures, and what is said below their table."""
    with tempfile.TemporaryDirectory() as folder:
        installation = Installation(way, Path(folder), OPTIONS, hosts="localhost")
        installation.start()
        try:
            drive(installation, "register", "--users", "1000", "--conc", "20")
            figures = [measure(installation, *one) for one in (*CHAT, PING)]
            logged_in = log_ins(installation)
        finally:
            installation.stop()
    plain, tls = (idle_memory(way, under_tls) for under_tls in (False, True))
    return figures, [
        logged_in,
        f"Resident memory of an idle session: {plain:.0f} KiB plain, {tls:.0f} KiB under TLS.",
    ]


def chat(installation: Installation) -> list[Figures]:
    """Chat only."""
    installation.start()
    try:
        drive(installation, "register", "--users", "200", "--conc", "20")
        return [measure(installation, *one) for one in CHAT]
    finally:
        installation.stop()


def two_nodes() -> list[Figures]:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as database_folder:
        mariadb = MariaDB(Path(database_folder))
        mariadb.start()
        try:
            database = mariadb.create_database()
            return chat(Installation(ONE_PROCESS, Path(folder), OPTIONS, "localhost", database, nodes=2))
        finally:
            mariadb.stop()


def acked() -> list[Acknowledged]:
    """By the defaults (each message is stored twice: for its receiver, and in its sender's archive) and otherwise, each
    beside the others: they run at once, and are measured in turn."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        mariadb = MariaDB(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        mariadb.start()
        stack.callback(mariadb.stop)
        installations: dict[str, Installation] = {}
        for label, durability, where, nodes in (
            ("`database`, MariaDB", "database", mariadb.create_database(), 1),
            ("`database`, SQLite", "database", "", 1),
            ("`none`, MariaDB", "none", mariadb.create_database(), 1),
            ("two nodes, `database`", "database", mariadb.create_database(), 2),
            ("two nodes, `memory`", "memory", mariadb.create_database(), 2),
            ("two nodes, `none`", "none", mariadb.create_database(), 2),
        ):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            options = [*LOG_IN, f"--message-durability={durability}"]
            installation = Installation(ONE_PROCESS, folder, options, "localhost", where, nodes=nodes)
            # As on two machines: the copy of a session is held on the other one.
            installation.environment_of_nodes = [{"TIDINGS_CLUSTER_HOST": f"h{node}"} for node in range(nodes)]
            installation.start()
            stack.callback(installation.stop)
            installations[label] = installation
            drive(installation, "register", "--users", "200", "--conc", "20")
        for name, words in ACKED:
            print(f"  {name}", flush=True)
            for _ in range(RUNS):
                for label, installation in installations.items():
                    runs.setdefault((label, name), []).append(drive(installation, "chat", *words))
    return [acknowledged(f"{label}, {name}", runs[label, name]) for label in installations for name, _ in ACKED]


def all_cores() -> list[Figures]:
    with tempfile.TemporaryDirectory() as folder:
        return chat(AllCores(ONE_PROCESS, Path(folder), OPTIONS, "localhost"))


HEAD = f"""# Benchmarks

{written_by("bench")}

Medians of {RUNS} runs of {SECS} s, with the default limits. The load driver (`tests/bench/xmppload.c`) runs on the
same machine and takes up to one core, so rates are lower bounds; CPU per message is the figure to plan with.
Clients of the driver use no TLS. SQLite (two nodes: MariaDB, whose CPU is not counted). But for the first table, nothing
is stored (`--message-durability=none --archive=false`). What goes between nodes for a stanza is in [traffic.md](traffic.md).
"""


def main() -> None:
    print("acknowledged", flush=True)
    stored = acked()
    print("\n".join(acknowledged_table(stored)), flush=True)
    print("one process", flush=True)
    one, below_one = whole(ONE_PROCESS)
    print("four processes", flush=True)
    four, below_four = whole(PROCESSES)
    print("two nodes", flush=True)
    two = two_nodes()
    print("--processes=auto", flush=True)
    cores = all_cores()
    ways = {"one process": one, "four processes": four, "two nodes": two, "`--processes=auto`": cores}
    lines = [
        HEAD,
        "### Acknowledged messages, by the defaults", "",
        "A message counts when it has arrived and its sender has the `<a/>` for it: with `database` it is stored by then. 100 "
        "pairs, on two nodes each on both; the archive is on; the CPU of MariaDB is not counted.", "",
        *acknowledged_table(stored), "",
        "### Chat, by how it runs", "",
        *beside({way: figures[: len(CHAT)] for way, figures in ways.items()}), "",
        "### One process", "", *table(one), "", *below_one, "",
        "### Four processes (connector, router, registry, pubsub)", "", *table(four), "", *below_four, "",
        "### Two nodes, each pair on both", "",
        "Two all-in-one processes, strategy `home`.", "", *table(two), "",
        f"### All cores of one machine: `--processes=auto`, {len(os.sched_getaffinity(0))} cores", "", *table(cores), "",
    ]  # fmt: skip
    path = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    path.write_text("\n".join(lines))
    print(path.read_text())


if __name__ == "__main__":
    main()
