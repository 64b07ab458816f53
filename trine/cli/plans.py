"""What the commands on ONNX models and plans share: options, inputs, and how figures are printed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trine.cli.terminal import waiting
from trine.core.errors import ConfigurationError

if TYPE_CHECKING:
    from trine.graph import Plan

SHAPE = "NAME:1x3x224x224"


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """How a model is compiled."""
    group = parser.add_argument_group("compiling")
    for name, text in (
        ("min", "least shape of inputs"),
        ("opt", "shape to tune for; alone, it refuses nothing"),
        ("max", "largest shape; the n-th mention of an input is of the n-th profile"),
    ):
        group.add_argument(
            f"--{name}", action="append", default=[], metavar=SHAPE, help=f"{text}; several with commas, or repeated"
        )
    group.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where the plan runs (default: cpu)")
    group.add_argument(
        "--inductor", action="store_true", help="on a GPU, let TorchInductor compete for the whole graph (minutes)"
    )
    group.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "tf32", "bf16", "fp16", "int8", "fp8"),
        help="what layers compute in (default: fp32); tf32 on a GPU, int8 on a CPU",
    )
    group.add_argument("--calibration", metavar="FILE.npz", help="inputs by name, samples along the first axis")
    group.add_argument(
        "--calibration-method",
        default="minmax",
        choices=("entropy", "percentile", "minmax", "mse"),
        help="how ranges follow from the data (default: minmax)",
    )
    group.add_argument("--calibration-cache", metavar="FILE", help="keep the ranges there, and read those found before")
    group.add_argument(
        "--accuracy-drop",
        type=percent,
        metavar="P",
        help="percentage points that lower precision may cost on the calibration data (0.5 or 0.5%%)",
    )
    group.add_argument("--no-tune", action="store_true", help="take the first candidate for each layer, time nothing")
    group.add_argument("--budget", type=seconds, metavar="S", help="seconds that timing candidates may take")
    group.add_argument("--timing-cache", metavar="FILE", help="keep times there, and read those of earlier builds")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=@FILE.npy",
        help="an input's array, or @FILE.npz with several; may be repeated",
    )


def compile_model(args: argparse.Namespace, shapes: Mapping[str, Sequence[int]] | None = None) -> Plan:
    """The plan of an ONNX model, by the options of `add_build_options`; `shapes` are to tune for, too."""
    from trine import graph
    from trine.graph.profiles import read_profiles

    with waiting(f"building {args.model}"):
        return graph.build(
            args.model,
            profiles=read_profiles(args.min, args.opt, args.max),
            shapes=shapes,
            precision=args.precision,
            calibration=args.calibration,
            calibration_method=args.calibration_method,
            calibration_cache=args.calibration_cache,
            accuracy_drop=args.accuracy_drop,
            tune=not args.no_tune,
            budget=args.budget,
            timing_cache=args.timing_cache,
            device=args.device,
            inductor=args.inductor,
        )


def load(args: argparse.Namespace, shapes: Mapping[str, Sequence[int]] | None = None) -> Plan:
    """The plan in a .plan file, or of an .onnx model."""
    from trine import graph

    return compile_model(args, shapes) if args.model.endswith(".onnx") else graph.load_plan(args.model)


def read_arrays(texts: Sequence[str], option: str) -> dict[str, Any]:
    """NAME=@FILE.npy, or @FILE.npz with arrays by name."""
    arrays: dict[str, Any] = {}
    for text in texts:
        name, sign, path = text.partition("@")
        if not sign or not path or (name and not name.endswith("=")):
            raise ConfigurationError(f"{option} {text!r}: write NAME=@FILE.npy, or @FILE.npz")
        try:
            found = np.load(path, allow_pickle=False)
            several = isinstance(found, np.lib.npyio.NpzFile)
            if several == bool(name):
                kind = "an .npz file: leave the name out" if several else "one array: write NAME=@FILE.npy"
                raise ConfigurationError(f"{option} {text!r}: {path!r} is {kind}")
            arrays.update({key: found[key] for key in found.files} if several else {name[:-1]: found})
        except (OSError, ValueError, EOFError) as error:
            raise ConfigurationError(f"{option} {text!r}: {path!r} can't be read ({error})") from None
    return arrays


def some_inputs(plan: Plan, given: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The arrays given, and random ones for the other inputs: of these shapes, else as the plan was tuned for."""
    from trine.graph.api import example_inputs

    names = [value.name for value in plan.graph.inputs]
    for name in (*given, *shapes):
        if name not in names:
            raise ConfigurationError(f"no input is called {name!r}: {', '.join(names) or 'there is none'}")
    tuned = {name: bounds.opt for profile in plan.profiles[:1] for name, bounds in profile.items()}
    known = {**tuned, **shapes, **{name: array.shape for name, array in given.items()}}
    try:
        made = dict(zip(names, example_inputs(plan.graph, known), strict=True))
    except ValueError as error:
        raise ConfigurationError(f"{error}: give it as --input NAME=@FILE.npy") from None
    return {**made, **given}


def print_figures(summary: Mapping[str, Any]) -> None:
    """Throughput and latency, a line each."""
    print(f"throughput: {summary['throughput_qps']:.2f} runs/s")
    figures = []
    for name, value in summary["latency_ms"].items():
        label = f"percentile({name[1:]}%)" if name[0] == "p" else name
        figures.append(f"{label} = {value:.3f} ms")
    print(f"latency: {', '.join(figures)}")


def file_name(name: str) -> Path:
    """A tensor's name as that of its .npy file."""
    return Path(f"{''.join(letter if letter.isalnum() or letter in '._-' else '_' for letter in name)}.npy")


def percent(text: str) -> float:
    """0.5 or 0.5%, as argparse wants it."""
    return seconds(text.removesuffix("%"))


def seconds(text: str) -> float:
    """A number that is not negative, as argparse wants it."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value
