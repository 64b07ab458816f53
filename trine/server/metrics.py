"""The metrics page: Triton's names, rendered from the models' statistics at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trine.server.host_metrics import HostMetrics, Sample
from trine.server.statistics import FAILURE_REASONS, QUANTILES, Duration, Latencies, ModelStatistics

if TYPE_CHECKING:
    from trine.server.model import ServedModel
    from trine.server.repository import Repository

CONTENT_TYPE = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """What `--metrics-config` chooses. `quantiles`: those of the summaries."""

    counter_latencies: bool = True
    histogram_latencies: bool = True
    summary_latencies: bool = True
    quantiles: tuple[float, ...] = QUANTILES


@dataclass(frozen=True, slots=True)
class _Counter:
    name: str
    help: str
    value: Callable[[ModelStatistics], float]
    kind: str = "counter"


def _us(pick: Callable[[ModelStatistics], Duration]) -> Callable[[ModelStatistics], float]:
    return lambda statistics: pick(statistics).ns // 1000


_COUNTS = (
    _Counter(
        "nv_inference_request_success",
        "Number of successful inference requests, all batch sizes",
        lambda statistics: statistics.success.count,
    ),
    _Counter(
        "nv_inference_count",
        "Number of inferences performed (does not include cached requests)",
        lambda statistics: statistics.inference_count,
    ),
    _Counter(
        "nv_inference_exec_count",
        "Number of model executions performed (does not include cached requests)",
        lambda statistics: statistics.execution_count,
    ),
    _Counter(
        "nv_inference_pending_request_count",
        "Instantaneous number of pending requests awaiting execution per-model.",
        lambda statistics: statistics.pending,
        "gauge",
    ),
    _Counter(
        "nv_cache_num_hits_per_model",
        "Number of cache hits per model",
        lambda statistics: statistics.cache_hit.count,
    ),
    _Counter(
        "nv_cache_num_misses_per_model",
        "Number of cache misses per model",
        lambda statistics: statistics.cache_miss.count,
    ),
    _Counter(
        "nv_model_load_duration_secs",
        "Model load time in seconds",
        lambda statistics: round(statistics.load_seconds, 6),
        "gauge",
    ),
)
_LATENCIES = (
    _Counter(
        "nv_inference_request_duration_us",
        "Cumulative inference request duration in microseconds (includes cached requests)",
        _us(lambda statistics: statistics.success),
    ),
    _Counter(
        "nv_inference_queue_duration_us",
        "Cumulative inference queuing duration in microseconds (includes cached requests)",
        _us(lambda statistics: statistics.queue),
    ),
    _Counter(
        "nv_inference_compute_input_duration_us",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
        _us(lambda statistics: statistics.compute_input),
    ),
    _Counter(
        "nv_inference_compute_infer_duration_us",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
        _us(lambda statistics: statistics.compute_infer),
    ),
    _Counter(
        "nv_inference_compute_output_duration_us",
        "Cumulative inference compute output duration in microseconds (does not include cached requests)",
        _us(lambda statistics: statistics.compute_output),
    ),
    _Counter(
        "nv_cache_hit_duration_per_model",
        "Total cache hit duration per model, in microseconds",
        _us(lambda statistics: statistics.cache_hit),
    ),
    _Counter(
        "nv_cache_miss_duration_per_model",
        "Total cache miss (insert+lookup) duration per model, in microseconds",
        _us(lambda statistics: statistics.cache_miss),
    ),
)
_SUMMARIES: tuple[tuple[str, str, Callable[[ModelStatistics], Latencies]], ...] = (
    (
        "nv_inference_request_summary_us",
        "Summary of inference request duration in microseconds (includes cached requests)",
        lambda statistics: statistics.latency,
    ),
    (
        "nv_inference_queue_summary_us",
        "Summary of inference queuing duration in microseconds (includes cached requests)",
        lambda statistics: statistics.queue_latency,
    ),
    (
        "nv_inference_compute_input_summary_us",
        "Summary of compute input duration of executions in microseconds (does not include cached requests)",
        lambda statistics: statistics.compute_input_latency,
    ),
    (
        "nv_inference_compute_infer_summary_us",
        "Summary of compute inference duration of executions in microseconds (does not include cached requests)",
        lambda statistics: statistics.compute_infer_latency,
    ),
    (
        "nv_inference_compute_output_summary_us",
        "Summary of compute output duration of executions in microseconds (does not include cached requests)",
        lambda statistics: statistics.compute_output_latency,
    ),
)


class MetricsPage:
    """Renders everything that one server exposes on its metrics port."""

    def __init__(self, repository: Repository, settings: MetricsSettings | None = None) -> None:
        self._repository = repository
        self._settings = settings or MetricsSettings()
        self._host = HostMetrics()

    def render(self) -> bytes:
        """Prometheus' text format; each metric once, with its HELP and TYPE."""
        models = [(_labels(model), model.statistics) for model in self._repository.models()]
        lines: list[str] = []
        for counter in (*_COUNTS, *(_LATENCIES if self._settings.counter_latencies else ())):
            lines += _header(counter.name, counter.help, counter.kind)
            lines += [f"{counter.name}{{{labels}}} {counter.value(statistics)}" for labels, statistics in models]
        lines += _failures(models)
        if self._settings.histogram_latencies:
            lines += _histograms(self._repository.models())
        if self._settings.summary_latencies:
            for name, help_text, pick in _SUMMARIES:
                lines += _summary(name, help_text, [(labels, pick(stats)) for labels, stats in models], self._settings)
        lines += self._traffic()
        lines += _host_lines(self._host.samples())
        return ("\n".join(lines) + "\n").encode() + self._repository.metrics.render()

    def _traffic(self) -> Iterator[str]:
        """Weights and requests of the versions over which a model's traffic is split."""
        splits = {model.name: self._repository.traffic(model.name) for model in self._repository.models()}
        arms = [
            (_arm(name, version), weight, split.counts[version])
            for name, split in splits.items()
            if split is not None
            for version, weight in split.weights.items()
        ]
        yield from _header("trine_traffic_weight", "Weight of a version in its model's traffic split", "gauge")
        yield from (f"trine_traffic_weight{{{arm}}} {weight}" for arm, weight, _ in arms)
        yield from _header(
            "trine_traffic_requests", "Requests that the traffic split in force has sent to a version", "counter"
        )
        yield from (f"trine_traffic_requests{{{arm}}} {count}" for arm, _, count in arms)


def _arm(model: str, version: str) -> str:
    return f'model="{_escaped(model)}",version="{version}"'


def _labels(model: ServedModel) -> str:
    pairs = [("model", model.name), ("version", model.version), *sorted(model.config.metric_tags.items())]
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _header(name: str, help_text: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"


def _failures(models: Sequence[tuple[str, ModelStatistics]]) -> Iterator[str]:
    name = "nv_inference_request_failure"
    yield from _header(name, "Number of failed inference requests, all batch sizes", "counter")
    for labels, statistics in models:
        for reason in FAILURE_REASONS:
            yield f'{name}{{{labels},reason="{reason}"}} {statistics.failures[reason]}'


def _histograms(models: Iterable[ServedModel]) -> Iterator[str]:
    name = "nv_inference_first_response_histogram_ms"
    yield from _header(name, "Duration from request to first response in milliseconds", "histogram")
    for model in models:
        labels, histogram = _labels(model), model.statistics.first_response
        total = 0
        for bound, total in histogram.cumulative():
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {round(histogram.sum_ms, 6)}"
        yield f"{name}_count{{{labels}}} {total}"


def _summary(
    name: str, help_text: str, models: Sequence[tuple[str, Latencies]], settings: MetricsSettings
) -> Iterator[str]:
    yield from _header(name, help_text, "summary")
    for labels, latencies in models:
        for quantile, value in zip(settings.quantiles, latencies.quantiles(settings.quantiles), strict=True):
            yield f'{name}{{{labels},quantile="{quantile}"}} {"NaN" if value != value else value}'
        yield f"{name}_sum{{{labels}}} {latencies.sum_us}"
        yield f"{name}_count{{{labels}}} {latencies.count}"


def _host_lines(samples: Iterable[Sample]) -> Iterator[str]:
    for sample in samples:
        yield from _header(sample.name, sample.help, sample.kind)
        for labels, value in sample.values:
            yield f"{sample.name}{labels} {value}"
