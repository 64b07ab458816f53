"""Metrics: what is counted is what Prometheus reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from trine.core.metrics import Distribution, Registry


def samples(registry: Registry, prefix: str | None = None) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(registry.exposition(prefix=prefix).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_counters_and_gauges() -> None:
    registry = Registry("x_")
    counter = registry.counter("things", "Things.", ("kind",))
    counter.labels("a").inc()
    counter.labels("a").inc(2)
    counter.labels('q"uo\nte').inc()
    registry.gauge("level", "Level.").labels().set(0.5)
    found = samples(registry)
    assert found["x_things_total", (("kind", "a"),)] == 3
    assert found["x_things_total", (("kind", 'q"uo\nte'),)] == 1
    assert found["x_level", ()] == 0.5
    assert ("level", ()) in samples(registry, prefix="")


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), max_size=30))
def test_histograms(observations: list[tuple[float, int]]) -> None:
    registry = Registry()
    child = registry.histogram("seconds", "Seconds.", buckets=(1.0, 5.0, 0.5)).labels()
    for value, times in observations:
        child.observe(value, times)
    found = samples(registry)
    every = [value for value, times in observations for _ in range(times)]
    for bound in (0.5, 1.0, 5.0):
        assert found["seconds_bucket", (("le", str(bound)),)] == sum(value <= bound for value in every)
    assert found["seconds_bucket", (("le", "+Inf"),)] == found["seconds_count", ()] == child.count == len(every)
    assert found["seconds_sum", ()] == pytest.approx(sum(every))


def test_a_value_on_a_bound_is_below_it() -> None:
    child = Distribution((1.0, 2.0))
    child.observe(1.0)
    assert child.cumulative() == [("1.0", 1.0), ("2.0", 1.0), ("+Inf", 1.0)]


def test_gauges_are_refreshed_at_each_scrape() -> None:
    registry = Registry()
    gauge = registry.gauge("now", "Now.").labels()
    registry.before_scrape.append(lambda: gauge.inc())
    assert samples(registry)["now", ()] == 1
    assert samples(registry)["now", ()] == 2


def test_mistakes_are_told() -> None:
    registry = Registry()
    family = registry.counter("a", "A.", ("x", "y"))
    with pytest.raises(ValueError, match="2 values"):
        family.labels("only one")
    with pytest.raises(ValueError, match="twice"):
        registry.gauge("a", "A.")
