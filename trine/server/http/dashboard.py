"""The dashboard: one page, and what it asks for every second."""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from time import time_ns
from typing import TYPE_CHECKING, Any

import trine
from trine.server.http.exchange import Exchange

if TYPE_CHECKING:
    from trine.server.http.api import HttpApi
    from trine.server.statistics import Latencies

HTML = (
    (b"Content-Type", b"text/html; charset=utf-8"),
    (b"Cache-Control", b"no-cache"),
    (b"Content-Security-Policy", b"default-src 'self' 'unsafe-inline' data:"),
)
_SHARES = (0.5, 0.9, 0.99)


def page(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    """The page itself; it holds no data."""
    exchange.respond(200, HTML, (_html(),))


def data(api: HttpApi, exchange: Exchange, name: str, version: str) -> None:
    """State, counts, percentiles (µs) and batch sizes of every model."""
    repository = api.repository
    served = {(model.name, model.version): model for model in repository.models()}
    models = [
        {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
        | (_figures(served[entry.name, entry.version]) if (entry.name, entry.version) in served else {})
        for entry in repository.index()
    ]
    server = {"name": api.server_name, "version": trine.__version__, "ready": repository.ready}
    exchange.respond_json({"server": server, "time_ms": time_ns() // 1_000_000, "models": models})


def _figures(model: Any) -> dict[str, Any]:
    statistics = model.statistics
    config = model.config
    return {
        "platform": config.platform or config.backend,
        "instances": [
            {"name": worker.name, "device": worker.device.kind, "busy": worker.outstanding > 0}
            for worker in model.pool.workers
        ],
        "max_batch_size": config.max_batch_size,
        "success": statistics.success.count,
        "failures": {reason: count for reason, count in statistics.failures.items() if count},
        "pending": statistics.pending,
        "inferences": statistics.inference_count,
        "executions": statistics.execution_count,
        "cache_hits": statistics.cache_hit.count,
        "latency_us": _quantiles(statistics.latency),
        "queue_us": _quantiles(statistics.queue_latency),
        "compute_us": _quantiles(statistics.compute_infer_latency),
        "batches": {str(rows): batch.compute_infer.count for rows, batch in sorted(statistics.batches.items())},
        "last_inference_ms": statistics.last_inference_ms,
    }


def _quantiles(latencies: Latencies) -> list[float | None]:
    """p50, p90 and p99; None where there is nothing yet."""
    return [None if math.isnan(value) else round(value, 1) for value in latencies.quantiles(_SHARES)]


@cache
def _html() -> bytes:
    return files("trine.server.web").joinpath("dashboard.html").read_bytes()
