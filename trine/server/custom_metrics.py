"""Metrics that models declare: families shared by name, written in Prometheus' text form after the server's own.

A family's time series may differ in their label names, and both go when nobody holds them any more; that is why these
are not `trine.core.metrics`. All of it runs in the event loop's thread.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from trine.server.errors import ServerError

Labels = tuple[tuple[str, str], ...]
KINDS = ("counter", "gauge", "histogram")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_OWN = ("nv_inference_", "nv_cache_", "nv_cpu_", "nv_gpu_", "nv_pinned_memory_", "nv_energy_", "nv_model_", "trine_")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class Series:
    """One time series."""

    __slots__ = ("bounds", "counts", "holders", "labels", "total")

    def __init__(self, labels: Labels, bounds: tuple[float, ...] | None) -> None:
        self.labels = labels
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1) if bounds is not None else []
        self.total = 0.0
        self.holders = 0

    def add(self, value: float) -> None:
        self.total += value

    def observe(self, value: float) -> None:
        assert self.bounds is not None
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Family:
    """All time series of one name."""

    def __init__(self, name: str, help_text: str, kind: str) -> None:
        self.name = name
        self.help = help_text
        self.kind = kind
        self.series: dict[Labels, Series] = {}
        self.holders = 0

    def lines(self) -> list[str]:
        found = [f"# HELP {self.name} {_escaped(self.help, quotes=False)}", f"# TYPE {self.name} {self.kind}"]
        for series in self.series.values():
            if series.bounds is None:
                found.append(f"{self.name}{_labels(series.labels)} {_number(series.total)}")
            else:
                found += self._histogram(series, series.bounds)
        return found

    def _histogram(self, series: Series, bounds: tuple[float, ...]) -> list[str]:
        cumulative, lines = 0, []
        for bound, count in zip([*bounds, math.inf], series.counts, strict=True):
            cumulative += count
            lines.append(f"{self.name}_bucket{_labels((*series.labels, ('le', _number(bound))))} {cumulative}")
        shown = _labels(series.labels)
        return [f"{self.name}_count{shown} {cumulative}", f"{self.name}_sum{shown} {_number(series.total)}", *lines]


class CustomMetrics:
    """Every model's metrics."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}

    def family(self, name: str, help_text: str, kind: str) -> Family:
        """The family of that name, held once more. ServerError: not a name, or of another kind already."""
        if not _NAME.fullmatch(name):
            raise ServerError(f"'{name}' is not a metric's name: letters, digits, '_' and ':', no digit first")
        if name.startswith(_OWN):
            raise ServerError(f"metric '{name}' is the server's own, or might become so: choose another name")
        if kind not in KINDS:
            raise ServerError(f"metric '{name}': kind '{kind}' is none of {', '.join(KINDS)}")
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = Family(name, help_text, kind)
        elif family.kind != kind:
            raise ServerError(f"metric '{name}' is a {family.kind} already: it can't be a {kind} too")
        family.holders += 1
        return family

    def series(self, family: Family, labels: Mapping[str, Any], buckets: Sequence[float] | None) -> Series:
        """The family's time series with these labels, held once more."""
        for label in labels:
            if not _LABEL.fullmatch(label) or (family.kind == "histogram" and label == "le"):
                raise ServerError(f"metric '{family.name}': '{label}' can't be a label's name")
        bounds = None if family.kind != "histogram" else _bounds(family.name, buckets)
        key = tuple((name, str(value)) for name, value in sorted(labels.items()))
        series = family.series.get(key)
        if series is None:
            series = family.series[key] = Series(key, bounds)
        elif series.bounds != bounds:
            raise ServerError(f"metric '{family.name}': these labels have other buckets already: {series.bounds}")
        series.holders += 1
        return series

    def release_series(self, family: Family, series: Series) -> None:
        series.holders -= 1
        if series.holders == 0:
            del family.series[series.labels]

    def release_family(self, family: Family) -> None:
        family.holders -= 1
        if family.holders == 0:
            del self._families[family.name]

    def render(self) -> bytes:
        """The text for the metrics page."""
        lines = [line for family in self._families.values() for line in family.lines()]
        return "".join(f"{line}\n" for line in lines).encode()


def _bounds(name: str, buckets: Sequence[float] | None) -> tuple[float, ...]:
    bounds = tuple(float(bound) for bound in buckets or ())
    if any(low >= high for low, high in itertools.pairwise(bounds)):
        raise ServerError(f"metric '{name}': buckets {list(bounds)} must ascend")
    return tuple(bound for bound in bounds if bound != math.inf)


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value, quotes=True)}"' for name, value in labels) + "}"


def _escaped(text: str, *, quotes: bool) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _number(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    if value == -math.inf:
        return "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
