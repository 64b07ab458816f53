"""`trine build`: an ONNX model into a plan."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from trine.cli.terminal import table, waiting

if TYPE_CHECKING:
    from trine.graph import Plan

USAGE = "MODEL.onnx -o MODEL.plan [options]"

DESCRIPTION = """\
Compile an ONNX model: fold, fuse, time the candidates for each layer on this machine, and write a plan.

A plan is one file with its weights; it runs on other machines, too, where `trine build` again would choose for them.
"""

EXAMPLES = """\
examples:
  trine build resnet50.onnx -o resnet50.plan
  trine build bert.onnx -o bert.plan --opt input_ids:8x128 --opt attention_mask:8x128
  trine build model.onnx -o model.plan --timing-cache ~/.cache/trine/times.json --explain
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.onnx", help="the model; its external data lies beside it")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the plan to write")
    parser.add_argument(
        "--opt",
        action="append",
        default=[],
        type=named_shape,
        metavar="NAME:1x3x224x224",
        help="shape of an input to tune for, where the model leaves it open; may be repeated",
    )
    parser.add_argument("--no-tune", action="store_true", help="take the first candidate for each layer, time nothing")
    parser.add_argument("--timing-cache", metavar="FILE", help="keep times there, and read those of earlier builds")
    parser.add_argument("--explain", action="store_true", help="print what each pass did, and each layer's candidates")


def run(args: argparse.Namespace) -> int:
    from trine import graph

    started = time.monotonic()
    with waiting(f"building {args.model}"):
        plan = graph.build(args.model, tune=not args.no_tune, timing_cache=args.timing_cache, shapes=dict(args.opt))
        plan.save(args.output)
    if args.explain:
        print(explain(plan))
    facts = plan.inspect()
    print(f"{args.output}: {len(facts['layers'])} layers, built in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return 0


def explain(plan: Plan) -> str:
    """Each pass's effect, each layer's tactic with the times of its candidates, and the memory."""
    from trine.core.sizes import format_bytes

    facts = plan.inspect()
    lines = [f"pass {effect}" for effect in plan.effects if effect.added or effect.removed]
    rows: list[list[Any]] = []
    for layer in facts["layers"]:
        times = sorted(layer["times_ms"].items(), key=lambda item: item[1])
        rows.append([layer["op"], layer["name"], layer["tactic"], ", ".join(f"{k} {v:.3f}" for k, v in times)])
    lines += ["", table(["op", "layer", "tactic", "candidates, ms"], rows), ""]
    if facts["memory"]:
        peak, total = facts["memory"]["peak"], facts["memory"]["total"]
        lines.append(f"intermediates: {format_bytes(peak)} at once, of {format_bytes(total)} in all")
    lines.append(f"weights: {format_bytes(facts['weights'])}")
    return "\n".join(lines)


def named_shape(text: str) -> tuple[str, list[int]]:
    """NAME:1x3x224x224, as argparse wants it."""
    name, colon, shape = text.rpartition(":")
    try:
        dims = [int(dim) for dim in shape.split("x")]
    except ValueError:
        dims = []
    if not colon or not name or not dims or min(dims) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape: write NAME:1x3x224x224")
    return name, dims
