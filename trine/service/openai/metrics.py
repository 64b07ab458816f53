"""What the service counts, and /metrics.

Names are NIM's. `/metrics` puts `trine_` in front of them, as Prometheus asks of an exporter; `/v1/metrics` gives them
bare, for dashboards that know NIM's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trine.core.metrics import CONTENT_TYPE, Registry
from trine.service.asgi import Request, Response

if TYPE_CHECKING:
    from trine.service.openai.context import Service

PREFIX = "trine_"
_LATENCY = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_END_TO_END = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_MODEL = ("model_name",)


class ServiceMetrics:
    """The service's metrics in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = Registry(PREFIX)
        self.running = registry.gauge("num_requests_running", "Sequences that the engine computes now", _MODEL)
        self.waiting = registry.gauge("num_requests_waiting", "Sequences queued in the engine", _MODEL)
        self.maximum = registry.gauge("num_request_max", "Sequences that can run at once", _MODEL)
        self.cache_use = registry.gauge(
            "gpu_cache_usage_perc", "Share of key-value cache blocks in use, 0 to 1", _MODEL
        )
        self.prefix_queries = registry.counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache", _MODEL
        )
        self.prefix_hits = registry.counter("prefix_cache_hits", "Prompt tokens found in the prefix cache", _MODEL)
        self.preemptions = registry.counter("num_preemptions", "Sequences put back to make room", _MODEL)
        self.restarts = registry.counter("engine_restarts", "Times that the engine was started again", _MODEL)
        self.prompt_tokens = registry.counter(
            "prompt_tokens", "Prompt tokens of requests that began to be answered", _MODEL
        )
        self.generation_tokens = registry.counter("generation_tokens", "Tokens generated", _MODEL)
        self.first_token = registry.histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token", _MODEL, buckets=_LATENCY
        )
        self.per_token = registry.histogram(
            "time_per_output_token_seconds", "Between a sequence's output tokens", _MODEL, buckets=_PER_TOKEN
        )
        self.end_to_end = registry.histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its last token", _MODEL, buckets=_END_TO_END
        )
        self.request_prompt = registry.histogram(
            "request_prompt_tokens", "Prompt tokens a request", _MODEL, buckets=_TOKENS
        )
        self.request_generation = registry.histogram(
            "request_generation_tokens", "Generated tokens a sequence", _MODEL, buckets=_TOKENS
        )
        self.finished = registry.counter("request_finish", "Sequences ended, by reason", (*_MODEL, "finished_reason"))
        self.http = registry.counter("http_requests", "HTTP requests answered", (*_MODEL, "endpoint", "status"))

    def watch(self, service: Service) -> None:
        """Read the engine's own counts at each scrape."""
        self.registry.before_scrape.append(lambda: self._read_engine(service))

    def _read_engine(self, service: Service) -> None:
        engine, info, name = service.engine, service.info, service.model_name
        if engine is None or info is None or name is None:
            return
        stats = engine.stats
        idle = engine.num_requests == 0
        self.running.labels(name).set(0 if idle else stats.running)
        self.waiting.labels(name).set(0 if idle else stats.waiting)
        self.maximum.labels(name).set(info.max_num_seqs)
        self.cache_use.labels(name).set(stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0)
        self.prefix_queries.labels(name).set(stats.prefix_query_tokens)
        self.prefix_hits.labels(name).set(stats.prefix_hit_tokens)
        self.preemptions.labels(name).set(stats.preemptions)
        self.restarts.labels(name).set(engine.restarts)


class RequestMeter:
    """Times one request's tokens. `wake_up` is called once for each list of deltas, whatever its length."""

    __slots__ = ("_first", "_last", "_metrics", "_model", "_per_token", "_tokens", "arrival", "generated")

    def __init__(self, metrics: ServiceMetrics, model: str, arrival: float) -> None:
        self._metrics = metrics
        self._model = model
        self._per_token = metrics.per_token.labels(model)
        self._tokens = metrics.generation_tokens.labels(model)
        self._first = True
        self._last = self.arrival = arrival
        self.generated = 0

    def wake_up(self, num_tokens: int, num_sequences: int) -> None:
        """`num_tokens` came for `num_sequences` sequences since the last call.

        Tokens of different sequences come side by side: each waited for as long as the step took.
        """
        if not num_tokens:
            return
        now = time.monotonic()
        self.generated += num_tokens
        self._tokens.value += num_tokens
        if self._first:
            self._first = False
            self._metrics.first_token.labels(self._model).observe(now - self.arrival)
            if num_tokens > num_sequences:
                self._per_token.observe(0.0, num_tokens - num_sequences)  # they came with the first: no wait between
        else:
            self._per_token.observe((now - self._last) * num_sequences / num_tokens, num_tokens)
        self._last = now

    def prompt(self, num_tokens: int) -> None:
        self._metrics.prompt_tokens.labels(self._model).inc(num_tokens)
        self._metrics.request_prompt.labels(self._model).observe(num_tokens)

    def finish(self, reason: str, num_tokens: int) -> None:
        """One sequence ended."""
        self._metrics.finished.labels(self._model, reason).inc()
        self._metrics.request_generation.labels(self._model).observe(num_tokens)

    def done(self) -> None:
        """The request was answered to its end."""
        self._metrics.end_to_end.labels(self._model).observe(time.monotonic() - self.arrival)


async def metrics(service: Service, request: Request) -> Response:
    """Prometheus' text format, names with `trine_` in front."""
    return Response(service.metrics.registry.exposition(), content_type=CONTENT_TYPE.encode())


async def bare_metrics(service: Service, request: Request) -> Response:
    """The same under NIM's names."""
    return Response(service.metrics.registry.exposition(prefix=""), content_type=CONTENT_TYPE.encode())
