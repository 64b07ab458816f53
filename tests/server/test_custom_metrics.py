"""Metrics that models declare: shared by name, gone with their last holder, read back by Prometheus' own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from trine.server.custom_metrics import CustomMetrics
from trine.server.errors import ServerError


def samples(metrics: CustomMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_holders_of_one_name_share_it() -> None:
    metrics = CustomMetrics()
    first, second = (metrics.family("steps", text, "gauge") for text in ("Steps", "another text"))
    assert first is second
    one, other = (metrics.series(first, {"b": 1, "a": "x"}, None) for _ in range(2))
    one.add(2)
    other.add(0.5)
    assert samples(metrics) == {("steps", (("a", "x"), ("b", "1"))): 2.5}
    assert b"# HELP steps Steps\n" in metrics.render()
    metrics.release_series(first, one)
    assert samples(metrics)
    metrics.release_series(first, other)
    assert samples(metrics) == {}
    metrics.release_family(first)
    metrics.release_family(second)
    assert metrics.render() == b""


def test_a_histogram_adds_up() -> None:
    metrics = CustomMetrics()
    family = metrics.family("sizes", "Sizes", "histogram")
    series = metrics.series(family, {}, [1, 2.5])
    for value in (1, 2, 2.5, 9):
        series.observe(value)
    assert samples(metrics) == {
        ("sizes_bucket", (("le", "1"),)): 1,
        ("sizes_bucket", (("le", "2.5"),)): 3,
        ("sizes_bucket", (("le", "+Inf"),)): 4,
        ("sizes_sum", ()): 14.5,
        ("sizes_count", ()): 4,
    }


@pytest.mark.parametrize("text", ['quotes "and"', "back\\slash", "two\nlines", "ö"])
def test_labels_and_help_come_back_as_they_were(text: str) -> None:
    metrics = CustomMetrics()
    metrics.series(metrics.family("x", text, "gauge"), {"label": text}, None)
    (family,) = text_string_to_metric_families(metrics.render().decode())
    assert family.documentation == text
    assert family.samples[0].labels == {"label": text}


@pytest.mark.parametrize(
    ("name", "kind", "labels", "buckets"),
    [
        ("no name", "gauge", {}, None),
        ("1st", "gauge", {}, None),
        ("nv_inference_count", "counter", {}, None),
        ("x", "summary", {}, None),
        ("x", "gauge", {"no label": 1}, None),
        ("x", "histogram", {"le": 1}, [1]),
        ("x", "histogram", {}, [2, 1]),
    ],
)
def test_what_can_not_be_is_refused(
    name: str, kind: str, labels: dict[str, object], buckets: list[float] | None
) -> None:
    metrics = CustomMetrics()
    with pytest.raises(ServerError):
        metrics.series(metrics.family(name, "", kind), labels, buckets)


def test_a_name_has_one_kind_and_a_series_one_set_of_buckets() -> None:
    metrics = CustomMetrics()
    family = metrics.family("x", "", "histogram")
    with pytest.raises(ServerError, match="histogram already"):
        metrics.family("x", "", "counter")
    metrics.series(family, {}, [1, 2])
    with pytest.raises(ServerError, match="other buckets already"):
        metrics.series(family, {}, [1, 3])
