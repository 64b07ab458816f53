"""`trine refit`: other weights in a plan, without a new build."""

from __future__ import annotations

import argparse
import sys

from trine.cli.plans import read_arrays
from trine.core.errors import ConfigurationError

USAGE = "MODEL.plan (--from MODEL.onnx | --weight NAME=@FILE.npy …) -o NEW.plan"

DESCRIPTION = """\
Put other weights into a plan: those of an ONNX model of the same architecture, or some by name.
"""

EXAMPLES = """\
examples:
  trine refit resnet50.plan --from resnet50-tuned.onnx -o resnet50-tuned.plan
  trine refit resnet50.plan --weight fc.weight=@fc.npy -o other.plan
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.plan", help="a plan of `trine build`")
    parser.add_argument("--from", dest="source", metavar="MODEL.onnx", help="take every weight from there")
    parser.add_argument(
        "--weight", action="append", default=[], metavar="NAME=@FILE.npy", help="or this one; may be repeated"
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the plan to write")


def run(args: argparse.Namespace) -> int:
    from trine import graph

    if bool(args.source) == bool(args.weight):
        raise ConfigurationError("give --from MODEL.onnx, or --weight NAME=@FILE.npy, and not both")
    plan = graph.load_plan(args.model)
    plan.refit(args.source or read_arrays(args.weight, "--weight"))
    plan.save(args.output)
    print(f"{args.output}: {args.model} with other weights", file=sys.stderr)
    return 0
