"""The tables of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figures:
    """Medians of what the driver measured in some runs."""

    label: str
    per_second: float
    # µs of CPU of the server for each, and which of its processes takes which part of it.
    cpu: float
    share: dict[str, float]
    # Milliseconds.
    p50: float
    p99: float


def _median(runs: Sequence[dict[str, Any]]) -> Callable[[Callable[[dict[str, Any]], float]], float]:
    """Takes one figure of each run."""
    return lambda pick: statistics.median(pick(run) for run in runs)


def medians(label: str, runs: Sequence[dict[str, Any]]) -> Figures:
    median = _median(runs)
    return Figures(
        label,
        median(lambda run: run["per_s"]),
        median(lambda run: run["server_cpu_us_per"]),
        runs[-1]["share"],
        median(lambda run: run["lat_ms"]["p50"]),
        median(lambda run: run["lat_ms"]["p99"]),
    )


@dataclass(frozen=True)
class Acknowledged:
    """The same for messages that count when they have arrived and their sender has the <a/> for them."""

    label: str
    per_second: float
    cpu: float
    # Milliseconds from sending to the <a/>; and the age of the oldest one without it at the end.
    p50: float
    p99: float
    oldest: float


def acknowledged(label: str, runs: Sequence[dict[str, Any]]) -> Acknowledged:
    median = _median(runs)
    return Acknowledged(
        label,
        median(lambda run: run["acked_per_s"]),
        median(lambda run: run["server_cpu_us_per"]),
        median(lambda run: run["ack_ms"]["p50"]),
        median(lambda run: run["ack_ms"]["p99"]),
        median(lambda run: run["oldest_unacked_ms"]),
    )


def acknowledged_table(figures: Sequence[Acknowledged]) -> list[str]:
    lines = [
        "| | acknowledged per second | server CPU µs each | p50 ms to `<a/>` | p99 ms | oldest at the end, ms |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for one in figures:
        lines.append(
            f"| {one.label} | {one.per_second:,.0f} | {one.cpu:.1f} | {one.p50:.1f} | {one.p99:.1f} | {one.oldest:.0f} |"
        )
    return lines


def table(figures: Sequence[Figures]) -> list[str]:
    """One way of running."""
    lines = ["| | per second | server CPU µs each | p50 ms | p99 ms |", "|---|--:|--:|--:|--:|"]
    for one in figures:
        parts = ", ".join(f"{name} {one.cpu * part:.1f}" for name, part in one.share.items() if part > 0.01)
        cpu = f"{one.cpu:.1f} ({parts})" if len(one.share) > 1 else f"{one.cpu:.1f}"
        lines.append(f"| {one.label} | {one.per_second:,.0f} | {cpu} | {one.p50:.2f} | {one.p99:.2f} |")
    return lines


def beside(ways: dict[str, Sequence[Figures]]) -> list[str]:
    """The same measurements in all ways of running, by the way: what goes through, and what it costs."""
    first = next(iter(ways.values()))
    lines = [f"| per second (server CPU µs each) | {' | '.join(ways)} |", f"|---|{'--:|' * len(ways)}"]
    for index, one in enumerate(first):
        cells = (figures[index] for figures in ways.values())
        texts = " | ".join(f"{cell.per_second:,.0f} ({cell.cpu:.1f})" for cell in cells)
        lines.append(f"| {one.label} | {texts} |")
    return lines
