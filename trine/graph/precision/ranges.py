"""Ranges of activations: what calibrators make of the values that a network really sees.

A calibrator picks the range [low, high] that 8 bits are spread over, zero always inside. A wide one rounds coarsely,
a narrow one cuts off what lies outside; the four methods weigh that differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from trine.core.errors import ConfigurationError
from trine.graph.dtypes import DType

BINS = 2048
_LEVELS = 255
_PERCENTILE = 99.99
Floats = NDArray[np.float64]


@dataclass
class Seen:
    """What calibration saw of one value: its extremes, then (in a second pass) a histogram between them.

    `channels` are the least and the greatest of each index of the last axis, where these are kept.
    """

    low: float = float("inf")
    high: float = float("-inf")
    counts: Floats = field(default_factory=lambda: np.zeros(BINS))
    keeps_channels: bool = False
    channels: tuple[torch.Tensor, torch.Tensor] | None = None

    def extend(self, x: torch.Tensor) -> None:
        """Widen the extremes by x, float32 of any shape."""
        if x.numel():
            low, high = torch.aminmax(x)
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
            if self.keeps_channels:
                lows, highs = torch.aminmax(x.reshape(-1, x.shape[-1]), dim=0)
                before = self.channels or (lows, highs)
                self.channels = torch.minimum(before[0], lows), torch.maximum(before[1], highs)

    def count(self, x: torch.Tensor) -> None:
        """Add x to the histogram, which spans the extremes."""
        if self.high > self.low:
            counts = torch.histc(x.float(), BINS, self.low, self.high)
            self.counts += counts.numpy().astype(np.float64)

    @property
    def centres(self) -> Floats:
        edges = np.linspace(self.low, self.high, BINS + 1)
        return (edges[1:] + edges[:-1]) / 2


@dataclass(frozen=True)
class Range:
    """Values from `low` to `high` are told apart; zero is among them. `lows` and `highs` are those of each channel."""

    low: float
    high: float
    lows: tuple[float, ...] = ()
    highs: tuple[float, ...] = ()

    def scale(self, dtype: DType) -> tuple[float, int]:
        """Scale and zero point of 8-bit integers; int8 is symmetric, uint8 spends all its steps on the range."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if dtype is DType.INT8:
            step = float(np.float32(max(-low, high) / 127))
            return (step if step > 0 else 1.0), 0
        step = float(np.float32((high - low) / 255))
        return (step, round(-low / step)) if step > 0 else (1.0, 0)


def minmax(seen: Seen) -> Range:
    """All that was seen: nothing is cut off."""
    return Range(seen.low, seen.high)


def percentile(seen: Seen) -> Range:
    """Without the 0.01 % farthest out on each side."""
    total = seen.counts.sum()
    if not total:
        return minmax(seen)
    cumulated = np.cumsum(seen.counts) / total
    width = (seen.high - seen.low) / BINS
    first = int(np.searchsorted(cumulated, 1 - _PERCENTILE / 100, side="right"))
    last = int(np.searchsorted(cumulated, _PERCENTILE / 100))
    return Range(seen.low + first * width, seen.low + (last + 1) * width)


def mse(seen: Seen) -> Range:
    """The range whose rounding and cutting together move the values the least, in squares; both ends are cut alike."""
    if not seen.counts.any():
        return minmax(seen)
    ranges = [Range(seen.low * part, seen.high * part) for part in np.linspace(0.1, 1.0, 91)]
    return min(ranges, key=lambda found: _moved(seen, found))


def _moved(seen: Seen, found: Range) -> float:
    """The sum of squares by which eight bits over the range move what was seen."""
    scale, zero = found.scale(DType.UINT8)
    stored = (np.clip(np.rint(seen.centres / scale) + zero, 0, _LEVELS) - zero) * scale
    return float((seen.counts * (stored - seen.centres) ** 2).sum())


def entropy(seen: Seen) -> Range:
    """The range that loses the least information: least Kullback-Leibler divergence of the values' distribution from
    what 8 bits keep of it (Migacz, "8-bit inference with TensorRT", GTC 2017), here with the range's own zero point.
    """
    if not seen.counts.any():
        return minmax(seen)
    centres, counts = seen.centres, seen.counts
    counts = np.where(np.abs(centres) <= (seen.high - seen.low) / BINS, 0, counts)  # exact zeros say nothing
    if not counts.any():
        return minmax(seen)
    best, least = minmax(seen), float("inf")
    for part in np.linspace(0.1, 1.0, 91):
        low, high = min(seen.low, 0.0) * part, max(seen.high, 0.0) * part
        divergence = _divergence(counts, centres, low, high)
        if divergence < least:
            best, least = Range(low, high), divergence
    return best


def _divergence(counts: Floats, centres: Floats, low: float, high: float) -> float:
    """Of the counts, cut to [low, high], from the same spread evenly within each of 255 steps."""
    inside = (centres >= low) & (centres <= high)
    kept = counts[inside]
    if kept.size < _LEVELS:
        return float("inf")
    reference = kept.copy()
    reference[0] += counts[centres < low].sum()
    reference[-1] += counts[centres > high].sum()
    steps = np.minimum(np.arange(kept.size) * _LEVELS // kept.size, _LEVELS - 1)
    there = kept > 0
    sums = np.bincount(steps, kept, _LEVELS)
    places = np.bincount(steps, there, _LEVELS)
    spread = np.where(there, (sums / np.maximum(places, 1))[steps], 0)
    if not spread.any():
        return float("inf")
    p, q = reference / reference.sum(), spread / spread.sum()
    use = (p > 0) & (q > 0)
    missing = float(p[(p > 0) & (q == 0)].sum())
    return float((p[use] * np.log(p[use] / q[use])).sum()) + missing * 20.0


CALIBRATORS: dict[str, Callable[[Seen], Range]] = {
    "entropy": entropy,
    "percentile": percentile,
    "minmax": minmax,
    "mse": mse,
}


def calibrator(name: str) -> Callable[[Seen], Range]:
    """By name; ConfigurationError names those that there are."""
    try:
        return CALIBRATORS[name]
    except KeyError:
        raise ConfigurationError(f"calibration method {name!r}: {', '.join(CALIBRATORS)}") from None
