"""The fault matrix: what dies, in one process or separate, strategy, durability, with XEP-0198 or not. It is walked so that
every pair of values of two columns comes up about equally often. Pure: the same walk every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from random import Random

from tests.drills.faults import DIES, KINDS, Kind
from tidings.testing.server import ONE_PROCESS, PROCESSES

WAYS = (ONE_PROCESS, PROCESSES)
STRATEGIES = ("home", "online-users", "broadcast")
DURABILITIES = ("database", "memory")
CLIENTS = ("0198", "plain")
# Faults of one life; a short one has so many seconds for them.
FAULTS, LONG_FAULTS = 4, 10
SECONDS = 28.0

Pairs = Counter[tuple[tuple[str, str], tuple[str, str]]]


@dataclass(frozen=True)
class Plan:
    """One life: where it is in the matrix, and what is done to it."""

    seed: int
    way: str
    strategy: str
    durability: str
    clients: str
    faults: tuple[Kind, ...]

    @property
    def networked(self) -> bool:
        return any(kind.networked for kind in self.faults)

    def values(self) -> list[tuple[str, str]]:
        return [
            ("way", self.way), ("strategy", self.strategy), ("durability", self.durability), ("clients", self.clients),
        ]  # fmt: skip

    def pairs(self) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
        """Pairs of values of two columns that it brings up, once for each of its faults."""
        for kind in self.faults:
            yield from combinations([("dies", kind.dies), *self.values()], 2)

    def __str__(self) -> str:
        return ", ".join([self.way, self.strategy, self.durability, self.clients])


def walk(seeds: int, long: bool) -> list[Plan]:
    """The plans of the first so many seeds: each takes what came up least until then."""
    done: Pairs = Counter()
    kinds: Counter[str] = Counter()
    plans = []
    for seed in range(seeds):
        plan = _next(seed, long, done, kinds)
        done.update(plan.pairs())
        kinds.update(kind.name for kind in plan.faults)
        plans.append(plan)
    return plans


def _next(seed: int, long: bool, done: Pairs, kinds: Counter[str]) -> Plan:
    random = Random(seed)
    cells = list(product(WAYS, STRATEGIES, DURABILITIES, CLIENTS))
    random.shuffle(cells)
    plans = [Plan(seed, *cell, _faults(cell, long, done, kinds, random)) for cell in cells]
    return min(plans, key=lambda plan: _worth(plan, done))


def _worth(plan: Plan, done: Pairs) -> float:
    """Less is more: pairs that came up seldom weigh most."""
    return sum(-1.0 / (1 + done[pair]) ** 3 for pair in plan.pairs()) / len(plan.faults)


def _faults(cell: Sequence[str], long: bool, done: Pairs, kinds: Counter[str], random: Random) -> tuple[Kind, ...]:
    """As many as fit, in random order: those of what died least in this cell; in long lives some last a minute."""
    names = ("way", "strategy", "durability", "clients")
    left = [kind for kind in KINDS if cell[0] in kind.ways]
    random.shuffle(left)
    here = {
        dies: sum(done[("dies", dies), (name, value)] for name, value in zip(names, cell, strict=True))
        for dies in DIES
    }
    ordered = []
    if long:
        ordered = [kind for kind in left if kind.minute]
        left = [kind for kind in left if not kind.minute]
    while left:
        kind = min(left, key=lambda one: (here[one.dies], kinds[one.name]))
        here[kind.dies] += len(names)
        ordered.append(kind)
        left.remove(kind)
    chosen = ordered[:LONG_FAULTS] if long else _that_fit(ordered)
    random.shuffle(chosen)
    return tuple(chosen)


def _that_fit(kinds: Sequence[Kind]) -> list[Kind]:
    """The first that leave enough time for the rest: the shortest ones can always follow."""
    chosen: list[Kind] = []
    for kind in kinds:
        others = [other.seconds for other in kinds if other not in chosen and other is not kind]
        rest = sum(sorted(others)[: FAULTS - len(chosen) - 1])
        if sum(one.seconds for one in chosen) + kind.seconds + rest <= SECONDS:
            chosen.append(kind)
        if len(chosen) == FAULTS:
            break
    return chosen


def table(plans: Sequence[Plan]) -> list[str]:
    """Faults per cell: for each value of the first column, how often it comes with each value of the others."""
    counts: Pairs = Counter(pair for plan in plans for pair in plan.pairs())
    columns = [("way", WAYS), ("strategy", STRATEGIES), ("durability", DURABILITIES), ("clients", CLIENTS)]
    values = [(column, value) for column, of in columns for value in of]
    lines = [f"{'':20}" + "".join(f"{value:>13}" for _, value in values)]
    for dies in DIES:
        row = [counts[("dies", dies), value] for value in values]
        lines.append(f"{dies:20}" + "".join(f"{count:>13}" for count in row))
    for place, value in enumerate(values[:-1]):
        row = [counts[value, other] if value[0] != other[0] else 0 for other in values[place + 1 :]]
        lines.append(f"{value[1]:20}" + " " * 13 * (place + 1) + "".join(f"{count:>13}" for count in row))
    kinds = Counter(kind.name for plan in plans for kind in plan.faults)
    return [*lines, "; ".join(f"{kind.name} {kinds[kind.name]}" for kind in KINDS)]
