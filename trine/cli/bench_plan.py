"""`trine bench model.plan`: throughput and latency of a plan on random inputs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from trine.cli.options import positive
from trine.cli.plans import SHAPE, add_build_options, add_inputs, load, print_figures, read_arrays, seconds, some_inputs
from trine.cli.terminal import table

if TYPE_CHECKING:
    from trine.graph import Plan

USAGE = "MODEL.plan [options]"

DESCRIPTION = """\
Run a plan (or an ONNX model, compiled first) for --duration seconds on random inputs, or on those given.
"""

EXAMPLES = """\
examples:
  trine bench resnet50.plan
  trine bench bert.onnx --shapes input_ids:8x128,attention_mask:8x128 --profile
  trine bench resnet50.plan --streams 4 --threads 1 --duration 10 --percentile 50,99.9 --export figures.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a .plan of `trine build`, or an .onnx model")
    parser.add_argument(
        "--shapes", "--shape", action="append", default=[], metavar=SHAPE, help="of inputs; several with commas"
    )
    add_inputs(parser)
    parser.add_argument("--duration", type=seconds, default=3.0, metavar="S", help="seconds to measure (default: 3)")
    parser.add_argument("--iterations", type=positive, default=10, metavar="N", help="runs at least (default: 10)")
    parser.add_argument("--warm-up", type=seconds, default=0.2, metavar="S", help="seconds before (default: 0.2)")
    parser.add_argument("--streams", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads a run computes on (default: one a core)"
    )
    parser.add_argument(
        "--percentile", type=percentiles, default=[90, 95, 99], metavar="P,P,…", help="of latency (default: 90,95,99)"
    )
    parser.add_argument("--profile", action="store_true", help="print the time of each layer, too")
    parser.add_argument("--export", "--json", metavar="FILE", help="write all figures there; - for standard output")
    add_build_options(parser)


def run(args: argparse.Namespace) -> int:
    from trine.graph.measure import measure
    from trine.graph.profiles import read_shapes

    if args.threads:
        set_threads(args.threads)
    shapes = {name: sizes for text in args.shapes for name, sizes in read_shapes(text)}
    given = read_arrays(args.input, "--input")
    plan = load(args, {**shapes, **{name: array.shape for name, array in given.items()}})
    inputs = {name: np.asarray(array) for name, array in some_inputs(plan, given, shapes).items()}
    measured = measure(
        plan,
        inputs,
        seconds=args.duration,
        least=args.iterations,
        warm_up=args.warm_up,
        streams=args.streams,
    )
    report: dict[str, Any] = {"model": args.model, **measured.summary(args.percentile)}
    if args.profile:
        report["layers"] = profile(plan, inputs)
    if args.export != "-":
        print_figures(report)
        if args.profile:
            rows = sorted(report["layers"], key=lambda layer: -float(layer["ms"]))
            columns = ("name", "op", "tactic", "ms", "percent")
            print(table(columns, [[layer[column] for column in columns] for layer in rows]))
    if args.export:
        report["inputs"] = {name: f"{array.dtype}{list(array.shape)}" for name, array in inputs.items()}
        report["streams"] = args.streams
        report["times_ms"] = [round(took * 1e3, 4) for took in measured.seconds]
        write(report, args.export)
    return 0


def write(report: dict[str, Any], path: str) -> None:
    if path == "-":
        print(json.dumps(report))
        return
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)


def profile(plan: Plan, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Each layer's time, in milliseconds and as a part of all."""
    tactics = {(layer["name"], layer["op"]): layer["tactic"] for layer in plan.inspect()["layers"]}
    found = plan.profile(inputs)
    total = sum(ms for _, _, ms in found) or 1.0
    return [
        {
            "name": name,
            "op": op,
            "tactic": tactics.get((name, op)),
            "ms": round(ms, 4),
            "percent": round(100 * ms / total, 2),
        }
        for name, op, ms in found
    ]


def set_threads(count: int) -> None:
    """How many threads torch's and Trine's own kernels compute on."""
    import torch

    from trine.kernels import cpu

    torch.set_num_threads(count)
    if cpu.available():
        cpu.set_num_threads(count)


def percentiles(text: str) -> list[float]:
    """50,99.9, as argparse wants it."""
    found = [seconds(part) for part in text.split(",")]
    if not all(0 < part <= 100 for part in found):
        raise argparse.ArgumentTypeError(f"{text!r} are not percentages above 0, up to 100")
    return found
