"""Runs the tests in parts, with the time of each at the end. `make test` and its relatives call it.

- python tests/run.py test      what every change must pass: a named subset where the whole takes long
- python tests/run.py cluster   the plays in every way of running, and all drills on clusters
- python tests/run.py test plays    one part of them, by its name
- python tests/run.py drills    lives of clusters, and each planted bug once
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import product

PLAYS = "tests/conformance/test_plays.py"
VIOLATIONS = "tests/conformance/test_violations.py"
CLIENTS = "tests/conformance/test_clients.py"
COMPONENTS = "tests/contract/test_component.py"
# Programs that say themselves what came out; they are told here how much of it is to be done in CI.
DRILLS = "tests/drills/run.py"
PLANTED = "tests/drills/planted/run.py"
AMOUNTS = {"SEEDS": "5", "RUNS": "1"}
# What every change must pass: one life, and bugs that show in every life.
FEW = {
    "SEED": "1",
    "RUNS": "1",
    "BUG": "answers_not_held_back,delivered_when_written,hops_not_known,repetitions_not_known,parser_fed_on",
}

# Each part is some calls of pytest, or of a program. `starttls` picks one of the two transports of each play.
TEST = {
    "unit and contract": [["tests/unit", "tests/contract", "tests/drills"]],
    "plays on one node": [
        ["tests/conformance"],
        [PLAYS, COMPONENTS, "--way=processes", "-k", "not [tls"],
        [VIOLATIONS, "--way=loopback"],
        [CLIENTS, "--loop=asyncio"],
    ],
    "plays on three nodes": [
        [PLAYS, "--nodes=3", "--strategy=home", "-k", "starttls"],
        [PLAYS, "--nodes=3", "--strategy=broadcast", "-k", "starttls"],
        [PLAYS, "--nodes=3", "--strategy=online-users", "--way=processes", "-k", "starttls"],
    ],
    "cluster": [["tests/cluster", "-m", "not whole", "--durations=12"]],
    "drills": [[DRILLS], [PLANTED]],
    "packaging and benchmarks": [["tests/packaging", "tests/bench"]],
}
MATRIX = [
    [PLAYS, f"--nodes={nodes}", f"--strategy={strategy}", f"--way={way}", "--database=mysql"]
    for nodes, strategy, way in product((1, 3), ("home", "online-users", "broadcast"), ("in-process", "processes"))
]
CLUSTER = {"plays": MATRIX, "cluster": [["tests/cluster", "-s"]]}
PARTS = {"test": TEST, "drills": {"drills": [[DRILLS], [PLANTED]]}, "cluster": CLUSTER}


def main(name: str, only: list[str]) -> int:
    times: list[tuple[str, float]] = []
    if name == "cluster":
        os.environ["LONG"] = "1"
    parts = {part: calls for part, calls in PARTS[name].items() if part in (only or PARTS[name])}
    for part, calls in parts.items():
        started = time.monotonic()
        for words in calls:
            command = words if words[0] in (DRILLS, PLANTED) else ["-m", "pytest", "-q", *words]
            print(f"\n{part}: {' '.join(command)}", flush=True)
            amounts = FEW if name == "test" else AMOUNTS
            code = subprocess.call([sys.executable, *command], env={**amounts, **os.environ})
            if code:
                print(f"{part}: failed", file=sys.stderr)
                return code
        times.append((part, time.monotonic() - started))
    print()
    for part, seconds in times:
        print(f"{part:26} {seconds:5.0f} s")
    print(f"{'all':26} {sum(seconds for _, seconds in times):5.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
