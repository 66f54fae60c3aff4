"""Plants bugs into clusters, and says whether the drills find them: `make drills-planted`.

    python tests/drills/planted/run.py

RUNS=N walks the first N seeds of each case; BUG=name,name takes some of them. The same lives without a bug come first, unless
there is only one run, and nothing may be found in them. The exit status is 0 when each bug is found in all runs but a
twentieth.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.drills import faults
from tests.drills.checker import DISORDERED, DOUBLED, ENDED_EARLY, LOST, Verdict
from tests.drills.cluster import NODES, Cluster
from tests.drills.drill import Drill
from tests.drills.faults import Kind
from tidings.testing.mariadb import MariaDB
from tidings.testing.server import ONE_PROCESS, PROCESSES

RUNS = int(os.environ.get("RUNS", "20"))
BUG = os.environ.get("BUG", "")
# Of twenty runs one may miss a bug.
MISSED = 0.05
# Seconds for all to arrive. Without a bug nothing takes as long.
WITHIN = 4.0
COMPLAINT, BROKEN = "complaint", "broken"
# Findings of a life without a bug that are shown.
SHOWN = 12


@dataclass(frozen=True)
class Case:
    """The smallest life that shows a bug, and as what."""

    bug: str
    fault: str
    # Any of these kinds shows it.
    shown_as: tuple[str, ...]
    clients: str = "0198"
    nodes: int = NODES
    strategy: str = "broadcast"
    way: str = ONE_PROCESS
    # How often it strikes: of those who were at the node only some had their session at its router, too.
    strikes: int = 1

    @property
    def kind(self) -> Kind:
        return next(kind for kind in faults.KINDS if kind.name == self.fault)

    def life(self) -> tuple[str, str, int, str, str, int]:
        """What it has in common with those of other bugs."""
        return self.fault, self.clients, self.nodes, self.strategy, self.way, self.strikes


CASES = (
    Case("acknowledged_before_the_commit", "no commit, then kill", (LOST,), clients="plain"),
    Case("answers_not_held_back", "no commit, then kill", (LOST,), clients="plain"),
    Case("queue_dropped_when_the_stream_breaks", "cut clients", (LOST,), nodes=1),
    Case("delivered_when_written", "cut clients", (LOST,), clients="plain", nodes=1),
    Case("not_returned_at_the_end", "cut clients", (LOST,), clients="plain", nodes=1),
    Case("repetitions_not_known", "no commit, then kill", (DOUBLED,)),
    Case("hops_not_known", "no commit, then kill", (DOUBLED,)),
    Case("batches_dropped_at_reconnect", "cut for a moment", (LOST, COMPLAINT), strategy="home", way=PROCESSES),
    Case("live_before_stored", "log-in under fire", (DISORDERED,), nodes=1),
    Case("groups_reversed", "cut clients", (DISORDERED,), clients="plain", nodes=1),
    Case("old_epoch_accepted", "old copies", (LOST, DOUBLED), way=PROCESSES, strikes=3),
    Case("parser_fed_on", "cut in a body", (COMPLAINT,), nodes=1),
)


async def live(drill: Drill, case: Case) -> Verdict:
    try:
        await drill.cluster.serve()
        await drill.start()
        for _ in range(case.strikes):
            await drill.pause(0.3, 1.0)
            await case.kind.strike(drill)
        return await drill.settle(WITHIN)
    finally:
        await drill.stop()


def found(case: Case, seed: int, mariadb: MariaDB, bug: str) -> Counter[str]:
    """What is found in a life with a bug, or with none, by kinds."""
    folder = Path(tempfile.mkdtemp(prefix="tidings-planted-"))
    networked = case.kind.networked
    cluster = Cluster(
        folder, case.way, case.strategy, "database", networked, None if networked else mariadb, case.nodes, bug
    )
    drill = Drill(cluster, Random(seed), case.clients == "0198", True, False)
    try:
        cluster.start()
        verdict = asyncio.run(live(drill, case))
    except Exception:
        # That shows nothing; the other lives are still worth living.
        traceback.print_exc(file=sys.stdout)
        return Counter({BROKEN: 1})
    finally:
        cluster.stop()
    kinds = Counter(finding.kind for finding in verdict.findings)
    kinds[COMPLAINT] = len(drill.complaints)
    if not bug and any(count for kind, count in kinds.items() if kind != ENDED_EARLY):
        (folder / "history.txt").write_text("\n".join(map(str, drill.judged)))
        print("\n".join(map(str, [*verdict.findings, *drill.complaints][:SHOWN])))
        print(f"logs and history: {folder}", flush=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return +kinds


def sound(case: Case, mariadb: MariaDB) -> bool:
    """Whether nothing is found in such a life when nothing is planted."""
    kinds = found(case, 0, mariadb, "")
    del kinds[ENDED_EARLY]
    return not kinds


def told(case: Case, mariadb: MariaDB) -> bool:
    """Whether the bug is found often enough."""
    hits, others, seconds = 0, Counter[str](), 0.0
    for seed in range(RUNS):
        started = time.monotonic()
        kinds = found(case, seed, mariadb, case.bug)
        seconds += time.monotonic() - started
        hits += any(kinds[kind] for kind in case.shown_as)
        others.update(kinds)
    counts = ", ".join(f"{count} {kind}" for kind, count in others.items())
    print(f"{case.bug:40}{case.fault:24}{hits:>4} of {RUNS}{seconds / RUNS:>7.1f} s each: {counts}", flush=True)
    return RUNS - hits <= RUNS * MISSED


def main() -> int:
    cases = [case for case in CASES if not BUG or case.bug in BUG.split(",")]
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tidings-planted-") as folder:
        mariadb = MariaDB(Path(folder))
        mariadb.start()
        try:
            if RUNS > 1:
                lives = {case.life(): case for case in cases}.values()
                failed += [f"{case.fault} without a bug" for case in lives if not sound(case, mariadb)]
            failed += [case.bug for case in cases if not told(case, mariadb)]
        finally:
            mariadb.go_on()
            mariadb.stop()
    print(f"planted: {len(cases)} bugs, {RUNS} runs each, failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
