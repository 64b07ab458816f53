"""`trine run model.plan`: one run of a plan, or of an ONNX model compiled for it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trine.cli.plans import add_build_options, add_inputs, file_name, load, read_arrays, seconds
from trine.core.errors import ConfigurationError

USAGE = "MODEL.plan --input NAME=@FILE.npy [options]"

DESCRIPTION = """\
Run a plan (or an ONNX model, compiled first) once, and print, save or compare its outputs.
"""

EXAMPLES = """\
examples:
  trine run resnet50.plan --input x=@image.npy
  trine run bert.plan --input @inputs.npz --output-dir out
  trine run resnet50.plan --input x=@image.npy --reference y=@expected.npy --atol 1e-4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a .plan of `trine build`, or an .onnx model")
    add_inputs(parser)
    parser.add_argument("--output-dir", metavar="DIR", help="save each output there, as NAME.npy")
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="NAME=@FILE.npy",
        help="what an output must be, or @FILE.npz with several; may be repeated",
    )
    parser.add_argument(
        "--atol", type=seconds, default=1e-5, metavar="A", help="difference that is allowed (default: 1e-5)"
    )
    parser.add_argument(
        "--rtol", type=seconds, default=1e-3, metavar="R", help="and as a part of the reference (default: 1e-3)"
    )
    add_build_options(parser)
    parser.set_defaults(no_tune=True)


def run(args: argparse.Namespace) -> int:
    inputs, references = read_arrays(args.input, "--input"), read_arrays(args.reference, "--reference")
    plan = load(args)
    began = time.perf_counter()
    outputs = plan.run(inputs)
    took = time.perf_counter() - began
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for name, array in outputs.items():
        if args.output_dir:
            np.save(Path(args.output_dir) / file_name(name), array)
        print(f"{name}: {np.asarray(array).dtype}{list(np.shape(array))}")
        if not args.output_dir and not references:
            print(np.array2string(np.asarray(array), threshold=64, edgeitems=3))
    print(f"latency: {took * 1e3:.3f} ms")
    return 0 if compare(outputs, references, args.atol, args.rtol) else 1


def compare(outputs: Mapping[str, Any], references: Mapping[str, Any], atol: float, rtol: float) -> bool:
    """Print each reference's largest difference; whether all are |output - reference| ≤ atol + rtol |reference|."""
    passed = True
    for name, expected in references.items():
        if name not in outputs:
            raise ConfigurationError(f"--reference {name}: no output is called that: {', '.join(outputs)}")
        array = np.asarray(outputs[name])
        if array.shape != expected.shape or array.dtype != expected.dtype:
            wanted, got = (f"{item.dtype}{list(item.shape)}" for item in (expected, array))
            raise ConfigurationError(f"--reference {name}: the file has {wanted}, the output is {got}")
        same, detail = _difference(array, expected, atol, rtol)
        print(f"{name}: {'PASSED' if same else 'FAILED'}, {detail}")
        passed = passed and same
    return passed


def _difference(array: Any, expected: Any, atol: float, rtol: float) -> tuple[bool, str]:
    if array.dtype == object:
        wrong = int((array != expected).sum())
        return not wrong, f"{wrong} of {array.size} strings differ"
    array, expected = array.astype(np.float64), expected.astype(np.float64)
    fits = np.isclose(array, expected, rtol=rtol, atol=atol, equal_nan=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        absolute = np.abs(array - expected)
        relative = np.where(absolute > 0, absolute / np.abs(expected), 0.0)
    largest = [float(np.nanmax(part, initial=0.0)) for part in (absolute, relative)]
    return bool(fits.all()), (
        f"largest difference {largest[0]:.3g} absolute, {largest[1]:.3g} relative, "
        f"{int((~fits).sum())} of {fits.size} elements differ by more than {atol:g} + {rtol:g} · |reference|"
    )
