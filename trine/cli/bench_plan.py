"""`trine bench model.plan`: throughput and latency of a plan on random inputs."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from trine.cli.build import named_shape
from trine.cli.options import positive
from trine.cli.run_plan import load
from trine.cli.terminal import table

USAGE = "MODEL.plan [options]"

DESCRIPTION = """\
Run a plan (or an ONNX model, compiled first) on random inputs, one run after the other, for --duration seconds.
"""

EXAMPLES = """\
examples:
  trine bench resnet50.plan
  trine bench bert.onnx --shape input_ids:8x128 --shape attention_mask:8x128 --profile
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a .plan of `trine build`, or an .onnx model")
    parser.add_argument(
        "--shape", action="append", default=[], type=named_shape, metavar="NAME:1x3x224x224", help="an input's shape"
    )
    parser.add_argument("--duration", type=float, default=3.0, metavar="S", help="seconds to measure (default: 3)")
    parser.add_argument("--iterations", type=positive, default=10, metavar="N", help="runs at least (default: 10)")
    parser.add_argument("--warm-up", type=float, default=0.2, metavar="S", help="seconds before (default: 0.2)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads that compute (default: one a core)")
    parser.add_argument("--profile", action="store_true", help="print the time of each layer, too")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for standard output")


def run(args: argparse.Namespace) -> int:
    import torch

    from trine.graph.api import example_inputs

    if args.threads:
        torch.set_num_threads(args.threads)
    plan = load(args.model)
    values = plan.graph.inputs
    inputs = dict(zip((value.name for value in values), example_inputs(plan.graph, dict(args.shape)), strict=True))
    measure(plan, inputs, args.warm_up, 1)
    times = measure(plan, inputs, args.duration, args.iterations)
    report: dict[str, Any] = {"model": args.model, **summary(times)}
    if args.profile:
        layers = plan.profile(inputs)
        report["layers"] = [{"name": name, "op": op, "ms": round(ms, 4)} for name, op, ms in layers]
    if args.json == "-":
        print(json.dumps(report))
        return 0
    print(f"throughput: {report['throughput_qps']:.2f} runs/s")
    figures = ", ".join(f"{key} = {report['latency_ms'][key]:.3f} ms" for key in report["latency_ms"])
    print(f"latency: {figures}")
    if args.profile:
        rows = sorted(report["layers"], key=lambda layer: -layer["ms"])
        print(table(["layer", "op", "ms"], [[layer["name"], layer["op"], layer["ms"]] for layer in rows]))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 0


def measure(plan: Any, inputs: dict[str, Any], seconds: float, least: int) -> list[float]:
    """Seconds of each run, for so many seconds and at least so many runs."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < deadline:
        start = time.perf_counter()
        plan.run(inputs)
        times.append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict[str, Any]:
    """Runs a second, and percentiles in milliseconds."""
    ordered = sorted(times)

    def percentile(part: float) -> float:
        return ordered[min(int(part * len(ordered)), len(ordered) - 1)] * 1e3

    latency = {
        "min": ordered[0] * 1e3,
        "max": ordered[-1] * 1e3,
        "mean": sum(ordered) / len(ordered) * 1e3,
        "median": percentile(0.5),
        "p90": percentile(0.9),
        "p95": percentile(0.95),
        "p99": percentile(0.99),
    }
    return {"throughput_qps": len(times) / sum(times), "runs": len(times), "latency_ms": latency}
