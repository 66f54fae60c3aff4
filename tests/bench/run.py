"""Measures Tidings with the load driver, and writes the table docs/benchmarks.md.

One all-in-one process, then four processes; default limits; the driver speaks no TLS, so that authentication in
clear is switched on, and a client of ours opens the idle TLS connections. Medians of RUNS runs.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tidings import __version__
from tidings.testing.client import RawClient
from tidings.testing.server import ONE_PROCESS, PROCESSES, Installation

DRIVER = Path(__file__).with_name("xmppload")
RUNS = int(os.environ.get("RUNS", "3"))
SECS = os.environ.get("SECS", "5")
OPTIONS = ["--c2s-allow-plaintext=true", "--registration=true", "--scram-iterations=10000"]
IDLE = 500


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def drive(installation: Installation, mode: str, *words: str) -> dict[str, Any]:
    pids = {name: process.pid for name, process in installation.processes.items()}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    result = subprocess.run(
        [
            str(DRIVER), "--mode", mode, "--targets", f"{installation.address}:{installation.port}",
            "--pids", ",".join(map(str, pids.values())), "--secs", SECS, *words,
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if not result.stdout:
        raise SystemExit(f"the driver failed: {result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout)
    if found.get("error"):
        print("  driver:", found["error"], file=sys.stderr)
    used = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    total = sum(used.values()) or 1.0
    found["share"] = {name: seconds / total for name, seconds in used.items()}
    return found


def median(installation: Installation, label: str, mode: str, *words: str) -> str:
    print(f"  {label} …", flush=True)
    runs = [drive(installation, mode, *words) for _ in range(RUNS)]
    rate = statistics.median(run["per_s"] for run in runs)
    cpu = statistics.median(run["server_cpu_us_per"] for run in runs)
    p50 = statistics.median(run["lat_ms"]["p50"] for run in runs)
    p99 = statistics.median(run["lat_ms"]["p99"] for run in runs)
    share = runs[-1]["share"]
    parts = (
        ", ".join(f"{name} {cpu * part:.1f}" for name, part in share.items() if part > 0.01) if len(share) > 1 else ""
    )
    return f"| {label} | {rate:,.0f} | {cpu:.1f}{f' ({parts})' if parts else ''} | {p50:.2f} | {p99:.2f} |"


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


def measure(way: str, title: str) -> list[str]:
    print(title, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        installation = Installation(way, Path(folder), OPTIONS, hosts="localhost")
        installation.start()
        try:
            drive(installation, "register", "--users", "1000", "--conc", "20")
            rows = [
                f"### {title}",
                "",
                "| | per second | server CPU µs each | p50 ms | p99 ms |",
                "|---|---|---|---|---|",
                median(installation, "chat, 100 pairs, 1 in flight", "chat", "--users", "200", "--window", "1"),
                median(installation, "chat, 100 pairs, 10 in flight", "chat", "--users", "200", "--window", "10"),
                median(installation, "chat at 2,000 a second", "open", "--users", "200", "--rate", "2000"),
                median(installation, "chat at 20,000 a second", "open", "--users", "200", "--rate", "20000"),
                median(installation, "ping", "iq", "--users", "200", "--window", "1"),
                "",
            ]
            print("  log-ins and memory …", flush=True)
            logins = [
                drive(installation, "login", "--users", "1000", "--conc", "50", "--idle", "1") for _ in range(RUNS)
            ]
            rate = statistics.median(run["logins_per_s"] for run in logins)
            cpu = statistics.median(run["login_server_cpu_us"] for run in logins)
            rows += [
                f"Log-ins (SASL PLAIN against SCRAM keys of 10,000 iterations): {rate:,.0f} a second, {cpu:,.0f} µs of "
                "CPU each.",
            ]
        finally:
            installation.stop()
    plain, tls = (idle_memory(way, under_tls) for under_tls in (False, True))
    rows += [f"Resident memory of an idle session: {plain:.0f} KiB plain, {tls:.0f} KiB under TLS.", ""]
    return rows


def main() -> None:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    head = [
        "# Benchmarks",
        "",
        f"Written by `make bench` on {datetime.date.today():%Y-%m-%d}, Tidings {__version__}: {os.cpu_count()} cores "
        f"({model}), Python {platform.python_version()}, {platform.system()} {platform.release().split('-')[0]}.",
        "",
        f"Medians of {RUNS} runs of {SECS} s, with the default limits. The load driver (`tests/bench/xmppload.c`) runs on the",
        "same machine and takes up to one core, so rates are lower bounds; CPU per message is the figure to plan with.",
        "Clients of the driver use no TLS. SQLite, `--message-durability` as by default (not in effect yet).",
        "",
    ]
    rows = measure(ONE_PROCESS, "One process") + measure(
        PROCESSES, "Four processes (connector, router, registry, pubsub)"
    )
    path = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    path.write_text("\n".join(head + rows))
    print(path.read_text())


if __name__ == "__main__":
    main()
