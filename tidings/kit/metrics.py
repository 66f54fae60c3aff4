"""Prometheus metrics of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Where a process's parts register what they count; `/metrics` on the admin port prints it.

    What is counted on the way of a stanza is a plain integer attribute that `counted` reads when somebody
    asks: a prometheus counter takes a lock at every increment.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, meaning: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"tidings_{name}", meaning, tuple(labels), registry=self.registry)

    def gauge(self, name: str, meaning: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"tidings_{name}", meaning, tuple(labels), registry=self.registry)

    def histogram(self, name: str, meaning: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(f"tidings_{name}", meaning, buckets=tuple(buckets), registry=self.registry)

    def counted(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """A counter whose value `read` gives."""
        self.registry.register(_Reading(CounterMetricFamily, name, meaning, read))

    def gauged(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """A gauge whose value `read` gives."""
        self.registry.register(_Reading(GaugeMetricFamily, name, meaning, read))

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Reading(Collector):
    def __init__(
        self,
        family: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        meaning: str,
        read: Callable[[], float],
    ) -> None:
        self._family = family
        self._name = f"tidings_{name}"
        self._meaning = meaning
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return [self._family(self._name, self._meaning)]

    def collect(self) -> Iterable[Metric]:
        return [self._family(self._name, self._meaning, value=self._read())]
