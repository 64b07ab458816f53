"""Counters, gauges and histograms that are cheap to touch, exposed in Prometheus' text form.

An observation is one or two additions on a Python object (under 1 µs): no lock and no label look-up. Writers hold
the child for their label values, and all writers of one metric live in one thread (the event loop's). The
exposition goes through `prometheus_client`, which is imported only when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Kind = Literal["counter", "gauge", "histogram"]


class Value:
    """One time series of a counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = value


class Distribution:
    """One histogram's time series: counts per bucket (not cumulative) and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value` as seen `times` times: the tokens of one wake-up are one call."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus' buckets: (upper bound as text, observations at or below it), "+Inf" last."""
        total, buckets = 0, []
        for bound, count in zip([*self.bounds, float("inf")], self.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(total)))
        return buckets


ChildT = TypeVar("ChildT", Value, Distribution)


class Family(Generic[ChildT]):
    """A metric with its label names; `labels(...)` gives the child to keep."""

    def __init__(
        self, kind: Kind, name: str, help_text: str, label_names: Sequence[str], make: Callable[[], ChildT]
    ) -> None:
        self.kind, self.name, self.help = kind, name, help_text
        self.label_names = tuple(label_names)
        self._make: Callable[[], ChildT] = make
        self.children: dict[tuple[str, ...], ChildT] = {}

    def labels(self, *values: str) -> ChildT:
        if len(values) != len(self.label_names):
            raise ValueError(
                f"{self.name}: labels {self.label_names} need {len(self.label_names)} values, got {values}"
            )
        child = self.children.get(values)
        if child is None:
            child = self.children[values] = self._make()
        return child


class Registry:
    """The metrics of one process or application, under one prefix ("trine_"), in the order they were declared.

    `before_scrape` functions run at each exposition: they set the gauges whose value is somebody else's state.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.before_scrape: list[Callable[[], None]] = []
        self._families: dict[str, Family[Value] | Family[Distribution]] = {}

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Family[Value]:
        """A value that only grows; its exposed name ends in `_total`."""
        return self._add(Family("counter", name, help_text, labels, Value))

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Family[Value]:
        return self._add(Family("gauge", name, help_text, labels, Value))

    def histogram(
        self, name: str, help_text: str, labels: Sequence[str] = (), *, buckets: Sequence[float]
    ) -> Family[Distribution]:
        bounds = tuple(sorted(buckets))
        return self._add(Family("histogram", name, help_text, labels, lambda: Distribution(bounds)))

    def _add(self, family: Family[ChildT]) -> Family[ChildT]:
        if family.name in self._families:
            raise ValueError(f"metric {family.name} is declared twice")
        self._families[family.name] = family
        return family

    def __iter__(self) -> Iterator[Family[Value] | Family[Distribution]]:
        return iter(self._families.values())

    def exposition(self, *, prefix: str | None = None) -> bytes:
        """Prometheus' text format. `prefix` replaces the registry's own."""
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.registry import Collector

        for refresh in self.before_scrape:
            refresh()
        chosen = self.prefix if prefix is None else prefix
        families = [as_prometheus(family, chosen) for family in self]

        class Snapshot(Collector):
            def collect(self) -> Iterable[Metric]:
                return families

        registry = CollectorRegistry(auto_describe=False)
        registry.register(Snapshot())
        return generate_latest(registry)


def as_prometheus(family: Family[Value] | Family[Distribution], prefix: str) -> Metric:
    """The family as one of `prometheus_client`'s metric families."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    name = prefix + family.name
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.help, labels=family.label_names)
        for labels, child in family.children.items():
            assert isinstance(child, Distribution)
            histogram.add_metric(labels, buckets=child.cumulative(), sum_value=child.sum)
        return histogram
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = make(name, family.help, labels=family.label_names)
    for labels, child in family.children.items():
        assert isinstance(child, Value)
        metric.add_metric(labels, child.value)
    return metric
