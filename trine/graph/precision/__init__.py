"""Lower precision: calibration, which layers take it, and what that costs in accuracy. docs/graph-precision.md."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from trine.core.errors import ConfigurationError
from trine.graph.ir import Graph
from trine.graph.precision.assignment import assign
from trine.graph.precision.calibration import CalibrationCache, Data, batches, calibrate
from trine.graph.precision.quantize import PRECISIONS, quantizable
from trine.graph.precision.ranges import CALIBRATORS, Range, calibrator
from trine.graph.precision.report import Accuracy, OutputError, Report, Tracer

__all__ = ["CALIBRATORS", "PRECISIONS", "Accuracy", "Data", "OutputError", "Report", "batches", "lower_precision"]


def lower_precision(
    graph: Graph,
    precision: str,
    *,
    calibration: Data | None = None,
    method: str = "minmax",
    cache: str | os.PathLike[str] | None = None,
    accuracy_drop: float | None = None,
    accuracy: Accuracy | None = None,
) -> tuple[Graph, Report, Mapping[str, torch.Tensor]]:
    """An optimised graph in another precision of `PRECISIONS`, as `trine.graph.build` describes the parameters; how it
    compares; and those of its weights that are packed already, for an `Executor`.

    ConfigurationError for what does not fit together: the message says what to give.
    """
    if precision not in PRECISIONS:
        raise ConfigurationError(f"precision {precision!r}: {', '.join(PRECISIONS)}")
    calibrator(method)
    if precision == "fp32":
        return graph, Report("fp32", 0), {}
    data = [] if calibration is None else batches(graph, calibration)
    ranges: dict[str, Range] = {}
    tracer = Tracer(graph) if data else None
    if precision in ("int8", "fp8") and quantizable(graph):
        kept = None if cache is None else CalibrationCache(cache)
        known = None if kept is None else kept.read(graph, method)
        if known is None and not data:
            raise ConfigurationError(
                f"precision {precision} needs calibration data: give calibration= (--calibration data.npz), inputs "
                "such as the model will see"
            )
        ranges = known or {}
        if known is None and tracer is not None:
            ranges = calibrate(graph, tracer, data, method)
        if kept is not None and known is None:
            kept.write(graph, method, ranges)
    return assign(graph, precision, ranges, data, accuracy_drop=accuracy_drop, accuracy=accuracy, tracer=tracer)
