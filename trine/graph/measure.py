"""Throughput and latency of a plan."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trine.graph.api import Plan


@dataclass(frozen=True)
class Measured:
    """Seconds of each run, and from the first to the last."""

    seconds: list[float]
    elapsed: float

    @property
    def throughput(self) -> float:
        """Runs a second, of all streams together."""
        return len(self.seconds) / self.elapsed

    def percentile(self, percent: float) -> float:
        """Milliseconds that so many of a hundred runs took at most (the nearest rank)."""
        ordered = sorted(self.seconds)
        rank = -(-len(ordered) * percent // 100)
        return ordered[max(int(rank) - 1, 0)] * 1e3

    def summary(self, percentiles: Sequence[float] = (90, 95, 99)) -> dict[str, Any]:
        """Throughput, and latency in milliseconds."""
        latency = {
            "min": min(self.seconds) * 1e3,
            "max": max(self.seconds) * 1e3,
            "mean": sum(self.seconds) / len(self.seconds) * 1e3,
            "median": self.percentile(50),
            **{f"p{percent:g}": self.percentile(percent) for percent in percentiles},
        }
        return {"throughput_qps": self.throughput, "runs": len(self.seconds), "latency_ms": latency}


def measure(
    plan: Plan,
    inputs: Mapping[str, Any],
    *,
    seconds: float,
    least: int = 1,
    warm_up: float = 0.0,
    streams: int = 1,
) -> Measured:
    """Run for so many seconds and so many times at least, `streams` runs at a time, each in a thread of its own.

    `warm_up` seconds (one run at least) come before and don't count. The first error of any run is raised.
    """
    _runs(plan, inputs, warm_up, 1)
    if streams == 1:
        began = time.perf_counter()
        times = _runs(plan, inputs, seconds, least)
        return Measured(times, time.perf_counter() - began)
    found: list[list[float]] = [[] for _ in range(streams)]
    errors: list[Exception] = []
    ready = threading.Barrier(streams + 1)

    def stream(times: list[float]) -> None:
        try:
            _runs(plan, inputs, 0, 1)
        except Exception as error:
            errors.append(error)
        ready.wait()
        if not errors:
            try:
                times += _runs(plan, inputs, seconds, -(-least // streams))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=stream, args=(times,)) for times in found]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return Measured([took for times in found for took in times], time.perf_counter() - began)


def _runs(plan: Plan, inputs: Mapping[str, Any], seconds: float, least: int) -> list[float]:
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < deadline:
        start = time.perf_counter()
        plan.run(inputs)
        times.append(time.perf_counter() - start)
    return times
