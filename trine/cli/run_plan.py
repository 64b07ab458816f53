"""`trine run model.plan`: one run of a plan, or of an ONNX model compiled for it."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from trine.core.errors import ConfigurationError

USAGE = "MODEL.plan --input NAME=@FILE.npy [options]"

DESCRIPTION = """\
Run a plan (or an ONNX model, compiled first) once, and print or save its outputs.
"""

EXAMPLES = """\
examples:
  trine run resnet50.plan --input x=@image.npy
  trine run bert.plan --input input_ids=@ids.npy --input attention_mask=@mask.npy --output-dir out
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a .plan of `trine build`, or an .onnx model")
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=@FILE.npy", help="an input's array; may be repeated"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="save each output there, as NAME.npy")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    plan = load(args.model)
    outputs = plan.run(dict(read_input(text) for text in args.input))
    for name, array in outputs.items():
        if args.output_dir:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{''.join(c if c.isalnum() or c in '._-' else '_' for c in name)}.npy", array)
        print(f"{name}: {array.dtype}{list(array.shape)}")
        if not args.output_dir:
            print(np.array2string(np.asarray(array), threshold=64, edgeitems=3))
    return 0


def load(path: str) -> Any:
    """The plan in a .plan file, or of an .onnx model with the first candidate for each layer."""
    from trine import graph

    return graph.build(path, tune=False) if path.endswith(".onnx") else graph.load_plan(path)


def read_input(text: str) -> tuple[str, Any]:
    name, sign, path = text.partition("=@")
    if not sign or not name:
        raise ConfigurationError(f"--input {text!r}: write NAME=@FILE.npy")
    try:
        return name, np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--input {text!r}: {path!r} is not a NumPy file ({error})") from None
