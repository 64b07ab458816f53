"""`trine build`: an ONNX model into a plan."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from trine.cli.plans import add_build_options, compile_model, print_figures, some_inputs

USAGE = "MODEL.onnx -o MODEL.plan [options]"

DESCRIPTION = """\
Compile an ONNX model: fold, fuse, time the candidates for each layer on this machine, write a plan, and measure it.

A plan is one file with its weights; it runs on other machines, too, where `trine build` again would choose for them.
"""

EXAMPLES = """\
examples:
  trine build resnet50.onnx -o resnet50.plan
  trine build bert.onnx -o bert.plan --min ids:1x1,mask:1x1 --opt ids:8x128,mask:8x128 --max ids:32x512,mask:32x512
  trine build model.onnx -o model.plan --precision int8 --calibration data.npz --accuracy-drop 0.5%
  trine build model.onnx -o model.plan --timing-cache ~/.cache/trine/times.json --explain --report model.html
"""

_MEASURE_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.onnx", help="the model; its external data lies beside it")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the plan to write")
    add_build_options(parser)
    parser.add_argument(
        "--explain", action="store_true", help="print what each pass did, what each layer computes, and its candidates"
    )
    parser.add_argument("--report", metavar="FILE.html", help="the same as a page with a picture of the graph")


def run(args: argparse.Namespace) -> int:
    from trine.graph import ExecutionError, report
    from trine.graph.measure import measure

    began = time.monotonic()
    plan = compile_model(args)
    plan.save(args.output)
    took = time.monotonic() - began
    facts = plan.inspect()
    if args.explain:
        print(report.text(facts))
    if args.report:
        Path(args.report).write_text(report.page(facts, Path(args.output).name), encoding="utf-8")
    print(f"{args.output}: {len(facts['layers'])} layers, built in {took:.1f} s", file=sys.stderr)
    if not args.no_tune:
        try:
            measured = measure(plan, some_inputs(plan, {}, {}), seconds=_MEASURE_SECONDS, least=3)
        except ExecutionError as error:
            print(f"not measured, since random inputs don't fit the model: {error.message}", file=sys.stderr)
        else:
            print_figures(measured.summary())
    return 0
