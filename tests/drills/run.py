"""Breaks real clusters at random moments, and says whether the promise of docs/guarantees.md was kept: `make drills`.

    python tests/drills/run.py

SEEDS=N walks the first N seeds of the fault matrix, SEED=n one of them again; LONG=1 has ten faults in a life, some of
which last a minute; DATABASE=galera gives them a database of three nodes, but for lives in which the network is cut.
The lines at the end are for a program; the exit status is 0 when every count is, but for that of
sessions that ended before their time: some die with their router, and none of their messages.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.drills.checker import DISORDERED, DOUBLED, ENDED_EARLY, KINDS, LOST, PHANTOM
from tests.drills.cluster import Cluster
from tests.drills.drill import Count, Drill
from tests.drills.faults import HOLDERS
from tests.drills.matrix import Plan, table, walk
from tests.drills.replicated import Replicated
from tidings.testing.mariadb import MariaDB

LONG = bool(os.environ.get("LONG"))
SEEDS = int(os.environ.get("SEEDS", "5"))
SEED = os.environ.get("SEED", "")
GALERA = os.environ.get("DATABASE") == "galera"
# Less than this proves nothing.
LEAST_MESSAGES = 1000
# Findings that are shown of one life; its whole history is in its folder.
SHOWN = 12
# Seconds between two faults, at most; and between two that kill a holder of sessions, at least: in the 5 s behind the
# first one a second one loses sessions.
BETWEEN = 1.5
APART = 6.0


@dataclass
class Result:
    """What has come out until now."""

    seeds: int = 0
    messages: int = 0
    repeated: int = 0
    found: Counter[str] = field(default_factory=Counter)
    complaints: int = 0
    counts: list[Count] = field(default_factory=list)

    def lines(self) -> list[str]:
        rest = ", ".join(
            f"{self.found[kind]} {kind}" for kind in KINDS if kind not in (LOST, DOUBLED, DISORDERED, PHANTOM)
        )
        counted = sum(count.counts for count in self.counts)
        return [
            f"others: {rest}, {self.complaints} complaints; {self.repeated} given again though confirmed",
            f"faults: {counted} counted, {self.found[PHANTOM]} phantoms",
            f"drills: {self.seeds} seeds, {self.messages} messages, {self.found[LOST]} lost, "
            f"{self.found[DOUBLED]} doubled, {self.found[DISORDERED]} out of order",
        ]

    def faults(self) -> int:
        """All that was found and must not be."""
        return self.found.total() - self.found[ENDED_EARLY] + self.complaints

    def failed(self) -> bool:
        return bool(self.faults() or self.messages < LEAST_MESSAGES)

    def pauses(self) -> list[str]:
        """How long clients were without service, by fault: a table for docs/guarantees.md."""
        lines = ["| seconds without service | faults | clients | p50 | max |", "|---|--:|--:|--:|--:|"]
        for what in sorted({count.what for count in self.counts}):
            counts = [count for count in self.counts if count.what == what]
            pauses = [pause for count in counts for pause in count.pauses]
            p50, most = (statistics.median(pauses), max(pauses)) if pauses else (0.0, 0.0)
            lines.append(f"| {what} | {len(counts)} | {len(pauses)} | {p50:.2f} | {most:.2f} |")
        return lines


async def live(plan: Plan, drill: Drill, result: Result) -> None:
    """One life."""
    try:
        await drill.cluster.serve()
        await drill.start()
        killed = 0.0
        for kind in plan.faults:
            await drill.pause(0.3, BETWEEN)
            kills = kind.dies in HOLDERS
            if kills:
                await asyncio.sleep(max(0.0, killed + APART - drill.history.now()))
            await kind.strike(drill)
            if kills:
                killed = drill.counts[-1].at
        verdict = await drill.settle()
    finally:
        await drill.stop()
    result.seeds += 1
    result.messages += verdict.messages
    result.repeated += verdict.repeated
    result.found.update(finding.kind for finding in verdict.findings)
    result.complaints += len(drill.complaints)
    result.counts += drill.counts
    for count in drill.counts:
        print(f"  {count.what}: {count.unacknowledged} unacknowledged{'' if count.counts else ' (not counted)'}")
    for line in [*map(str, verdict.findings), *drill.complaints][:SHOWN]:
        print(f"  {line}")


def one(plan: Plan, mariadb: MariaDB | Replicated, result: Result) -> None:
    print(f"seed {plan.seed}: {plan}: {'; '.join(kind.name for kind in plan.faults)}", flush=True)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"tidings-drill{plan.seed}-"))
    before = result.faults()
    cluster = Cluster(
        folder, plan.way, plan.strategy, plan.durability, plan.networked, None if plan.networked else mariadb
    )
    drill = Drill(cluster, Random(plan.seed), plan.clients == "0198", plan.durability != "none", LONG)
    try:
        cluster.start()
        asyncio.run(live(plan, drill, result))
    except Exception:
        # The other lives are still worth living.
        result.complaints += 1
        traceback.print_exc(file=sys.stdout)
    finally:
        cluster.stop()
        if before == result.faults() and sys.exc_info()[0] is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            (folder / "history.txt").write_text("\n".join(map(str, drill.judged or drill.history)))
            print(f"  logs and history: {folder}")
    print(f"  {time.monotonic() - started:.0f} s, {result.messages} messages until now", flush=True)


def main() -> int:
    plans = walk(int(SEED) + 1, LONG)[-1:] if SEED else walk(SEEDS, LONG)
    print("faults per cell:")
    print("\n".join(table(plans)), flush=True)
    result = Result()
    with tempfile.TemporaryDirectory(prefix="tidings-drills-") as folder:
        mariadb = Replicated(Path(folder)) if GALERA else MariaDB(Path(folder))
        mariadb.start()
        try:
            for plan in plans:
                one(plan, mariadb, result)
                if isinstance(mariadb, Replicated):
                    mariadb.heal()
        finally:
            mariadb.go_on()
            mariadb.stop()
    print("\n".join([*result.pauses(), *result.lines()]), flush=True)
    return int(result.failed())


if __name__ == "__main__":
    sys.exit(main())
