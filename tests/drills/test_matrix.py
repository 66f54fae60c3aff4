"""The walk through the fault matrix."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

from tests.drills.faults import DIES, KINDS
from tests.drills.matrix import CLIENTS, DURABILITIES, FAULTS, LONG_FAULTS, STRATEGIES, WAYS, walk
from tidings.testing.server import ONE_PROCESS, SERVICES

COLUMNS = [
    ("dies", DIES),
    ("way", WAYS),
    ("strategy", STRATEGIES),
    ("durability", DURABILITIES),
    ("clients", CLIENTS),
]


def test_two_hundred_seeds_bring_up_every_pair_of_values_at_least_twenty_times() -> None:
    counts = Counter(pair for plan in walk(200, long=False) for pair in plan.pairs())
    for (one, ones), (other, others) in combinations(COLUMNS, 2):
        for value in ones:
            for against in others:
                if value in SERVICES and against == ONE_PROCESS:
                    continue  # there a service does not die alone
                assert counts[(one, value), (other, against)] >= 20, (value, against)


def test_twenty_long_seeds_bring_up_every_fault_of_a_minute_twenty_times() -> None:
    counts = Counter(kind.name for plan in walk(20, long=True) for kind in plan.faults)
    assert all(counts[kind.name] == 20 for kind in KINDS if kind.minute)


def test_every_kind_comes_and_a_life_has_its_faults() -> None:
    plans = walk(60, long=False)
    assert {kind.name for plan in plans for kind in plan.faults} == {kind.name for kind in KINDS}
    assert {len(plan.faults) for plan in plans} == {FAULTS}
    assert {len(plan.faults) for plan in walk(5, long=True)} == {LONG_FAULTS}


def test_a_seed_is_the_same_life_however_many_are_walked() -> None:
    assert walk(9, long=False)[4] == walk(5, long=False)[4]


def test_a_service_dies_alone_only_where_it_is_a_process() -> None:
    for plan in walk(60, long=False):
        assert all(plan.way in kind.ways for kind in plan.faults)
