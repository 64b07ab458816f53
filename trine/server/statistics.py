"""What a served model counts: Triton's statistics, from which its `nv_*` metrics are rendered too.

All of it is written in the event loop's thread: plain additions, no lock. Times are nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import time_ns

REJECTED, CANCELED, BACKEND, OTHER = "REJECTED", "CANCELED", "BACKEND", "OTHER"
FAILURE_REASONS = (REJECTED, CANCELED, BACKEND, OTHER)

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
_SUB_BITS = 4  # buckets a power of two: 16, so a percentile is at most 3 % off


class Duration:
    """How often something happened, and how long it took in all."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


class Latencies:
    """Durations in logarithmic buckets, for percentiles: 1 µs to minutes, within 3 %.

    Two windows take turns, so that percentiles speak of the last one to two `window` observations.
    """

    __slots__ = ("_current", "_previous", "count", "sum_us", "window")

    def __init__(self, window: int = 10_000) -> None:
        self.window = window
        self.count = 0
        self.sum_us = 0
        self._current: dict[int, int] = {}
        self._previous: dict[int, int] = {}

    def add(self, ns: int) -> None:
        us = ns // 1000
        self.count += 1
        self.sum_us += us
        shift = us.bit_length() - _SUB_BITS - 1
        bucket = (shift << _SUB_BITS) + (us >> shift) if shift > 0 else us
        current = self._current
        current[bucket] = current.get(bucket, 0) + 1
        if self.count % self.window == 0:
            self._previous, self._current = current, {}

    def quantiles(self, wanted: Sequence[float] = QUANTILES) -> list[float]:
        """The microseconds below which each share of the recent observations lies; NaN where there are none."""
        merged = dict(self._previous)
        for bucket, count in self._current.items():
            merged[bucket] = merged.get(bucket, 0) + count
        total = sum(merged.values())
        if not total:
            return [float("nan")] * len(wanted)
        ordered = sorted(merged.items())
        return [_at_rank(ordered, share * total) for share in wanted]


def _at_rank(ordered: list[tuple[int, int]], rank: float) -> float:
    seen = 0
    for bucket, count in ordered:
        seen += count
        if seen >= rank:
            return _bucket_middle(bucket)
    return _bucket_middle(ordered[-1][0])


def _bucket_middle(bucket: int) -> float:
    """Microseconds in the middle of a bucket."""
    if bucket < 2 << _SUB_BITS:
        return float(bucket)
    shift = (bucket >> _SUB_BITS) - 1
    base = (bucket - (shift << _SUB_BITS)) << shift
    return base + (1 << shift) / 2


class BatchStatistics:
    """Executions of one batch size."""

    __slots__ = ("compute_infer", "compute_input", "compute_output")

    def __init__(self) -> None:
        self.compute_input = Duration()
        self.compute_infer = Duration()
        self.compute_output = Duration()


class ResponseStatistics:
    """The n-th responses of the requests to a decoupled model."""

    __slots__ = ("cancel", "compute_infer", "compute_output", "empty_response", "fail", "success")

    def __init__(self) -> None:
        self.compute_infer = Duration()
        self.compute_output = Duration()
        self.success = Duration()
        self.fail = Duration()
        self.empty_response = Duration()
        self.cancel = Duration()


class Histogram:
    """Counts of durations up to each bound, in milliseconds."""

    __slots__ = ("bounds", "counts", "sum_ms")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum_ms = 0.0

    def add(self, ns: int) -> None:
        ms = ns / 1e6
        self.sum_ms += ms
        for index, bound in enumerate(self.bounds):
            if ms <= bound:
                self.counts[index] += 1
                return
        self.counts[-1] += 1

    def cumulative(self) -> Iterator[tuple[str, int]]:
        total = 0
        for bound, count in zip([*map(_bound_text, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            yield bound, total


def _bound_text(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else repr(bound)


DEFAULT_FIRST_RESPONSE_BOUNDS_MS = (100.0, 500.0, 2000.0, 5000.0)


class ModelStatistics:
    """The counters of one version of one model.

    success, fail: requests, from received to answered; queue, compute_*: of successful requests, cache hits aside
    inference_count: rows computed; execution_count: executions; pending: requests accepted and not yet computing
    batches: by rows of an execution; responses: by index of the response, of decoupled models
    """

    def __init__(self, *, first_response_bounds_ms: Sequence[float] = DEFAULT_FIRST_RESPONSE_BOUNDS_MS) -> None:
        self.last_inference_ms = 0
        self.inference_count = 0
        self.execution_count = 0
        self.pending = 0
        self.success = Duration()
        self.fail = Duration()
        self.queue = Duration()
        self.compute_input = Duration()
        self.compute_infer = Duration()
        self.compute_output = Duration()
        self.cache_hit = Duration()
        self.cache_miss = Duration()
        self.batches: dict[int, BatchStatistics] = {}
        self.responses: dict[int, ResponseStatistics] = {}
        self.failures: dict[str, int] = dict.fromkeys(FAILURE_REASONS, 0)
        self.latency = Latencies()
        self.queue_latency = Latencies()
        self.compute_input_latency = Latencies()
        self.compute_infer_latency = Latencies()
        self.compute_output_latency = Latencies()
        self.first_response = Histogram(first_response_bounds_ms)
        self.load_seconds = 0.0

    def executed(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """One execution of `rows` rows ended well."""
        self.inference_count += rows
        self.execution_count += 1
        batch = self.batches.get(rows)
        if batch is None:
            batch = self.batches[rows] = BatchStatistics()
        batch.compute_input.add(input_ns)
        batch.compute_infer.add(infer_ns)
        batch.compute_output.add(output_ns)
        self.compute_input_latency.add(input_ns)
        self.compute_infer_latency.add(infer_ns)
        self.compute_output_latency.add(output_ns)

    def succeeded(self, requests: int, total_ns: int, queue_ns: int, input_ns: int, infer_ns: int, out_ns: int) -> None:
        """`requests` requests of one execution were answered; total_ns and queue_ns are sums, the rest is of each."""
        self.success.count += requests
        self.success.ns += total_ns
        self.queue.count += requests
        self.queue.ns += queue_ns
        for duration, ns in ((self.compute_input, input_ns), (self.compute_infer, infer_ns)):
            duration.count += requests
            duration.ns += ns * requests
        self.compute_output.count += requests
        self.compute_output.ns += out_ns * requests
        self.last_inference_ms = time_ns() // 1_000_000

    def failed(self, ns: int, reason: str) -> None:
        """A request was answered with an error."""
        self.fail.add(ns)
        self.failures[reason] += 1
        self.last_inference_ms = time_ns() // 1_000_000

    def response(self, index: int) -> ResponseStatistics:
        found = self.responses.get(index)
        if found is None:
            found = self.responses[index] = ResponseStatistics()
        return found
