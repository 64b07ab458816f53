"""Runs a model over a user's data and keeps the ranges of its values, in a cache file if wanted."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from trine.core.errors import ConfigurationError
from trine.graph.dtypes import DType, to_torch
from trine.graph.errors import InputError
from trine.graph.ir import Graph, Value
from trine.graph.precision.ranges import Range, Seen, calibrator
from trine.graph.runtime import check_input

if TYPE_CHECKING:
    from trine.graph.precision.report import Tracer

Batch: TypeAlias = list[Any]
"""The graph's inputs, in order, as tensors."""
Data: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""An .npz file, arrays by input name (samples along the first axis), or one such mapping a run."""

_BATCH = 8
_VERSION = 1


def batches(graph: Graph, data: Data) -> list[Batch]:
    """The data cut into runs: of the model's batch size, or of up to 8 samples where it is open.

    What is left over after whole batches of a fixed size is not used. ConfigurationError for data that does not fit.
    """
    if isinstance(data, str | os.PathLike):
        return batches(graph, _read(Path(data)))
    if not isinstance(data, Mapping):
        runs = [_tensors(graph, given) for given in data]
    else:
        runs = _cut(graph, _tensors(graph, data))
    for run in runs:
        symbols: dict[str, int] = {}
        for value, tensor in zip(graph.inputs, run, strict=True):
            try:
                check_input(value, tensor, symbols)
            except InputError as error:
                raise ConfigurationError(f"calibration data: {error}") from None
    if not runs:
        raise ConfigurationError("calibration data: there is not one whole batch in it")
    return runs


def _read(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise ConfigurationError(f"calibration data {str(path)!r} is one array: save it as .npz, by input name")
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"calibration data {str(path)!r} is no readable .npz file: {reason}") from None


def _tensors(graph: Graph, given: Mapping[str, Any]) -> Batch:
    names = [value.name for value in graph.inputs]
    for name in (*given, *names):
        if name not in names or name not in given:
            problem = "is missing" if name in names else "is no input of the model"
            raise ConfigurationError(f"calibration data: {name!r} {problem}; the inputs are {', '.join(names)}")
    tensors = []
    for value in graph.inputs:
        item = given[value.name]
        tensor = item if isinstance(item, torch.Tensor) else to_torch(np.asarray(item))
        if value.dtype is not None and value.dtype.is_float and tensor.is_floating_point():
            tensor = tensor.to(value.dtype.torch)
        tensors.append(tensor)
    return tensors


def _cut(graph: Graph, whole: Batch) -> list[Batch]:
    sizes = [value.shape[0] if value.shape else None for value in graph.inputs]
    fixed = [size for size in sizes if isinstance(size, int)]
    extra = [tensor.dim() - (value.rank or 0) for value, tensor in zip(graph.inputs, whole, strict=True)]
    if any(size is None for size in sizes) or not whole:
        return [whole]
    if all(count == 1 for count in extra):  # [runs, batch, ...]
        return [list(parts) for parts in zip(*whole, strict=False)]
    samples = min(len(tensor) for tensor in whole)
    if any(len(tensor) != samples for tensor in whole):
        raise ConfigurationError(
            f"calibration data: inputs have {', '.join(str(len(tensor)) for tensor in whole)} samples; "
            "give every input the same number"
        )
    if fixed and len(set(fixed)) > 1:
        return [whole]
    size = fixed[0] if fixed else min(_BATCH, samples)
    starts = range(0, samples - size + 1 if fixed else samples, max(size, 1))
    return [[tensor[start : start + size] for tensor in whole] for start in starts]


def digest(graph: Graph) -> str:
    """Of what ranges depend on: the operators, how they are joined, and their weights' shapes."""
    text = hashlib.sha256()
    for node in graph.nodes:
        names = [None if value is None else (value.name, value.shape) for value in node.inputs]
        text.update(f"{node.op} {names} {[value.name for value in node.outputs]}\n".encode())
    for value in graph.constants():
        if isinstance(value.data, torch.Tensor) and value.data.is_floating_point() and value.data.numel():
            text.update(f"{float(value.data.double().sum()):.6e}".encode())
    return text.hexdigest()[:32]


class CalibrationCache:
    """Ranges by value name, in a JSON file: for one graph and one method."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self, graph: Graph, method: str) -> dict[str, Range] | None:
        """The ranges; None if the file is not there, or for another graph or method. ConfigurationError if damaged."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise ConfigurationError(f"calibration cache {str(self.path)!r} can't be read: delete it") from None
        try:
            if stored["version"] != _VERSION or stored["model"] != digest(graph) or stored["method"] != method:
                return None
            return {
                name: Range(float(low), float(high), tuple(map(float, lows)), tuple(map(float, highs)))
                for name, (low, high, lows, highs) in stored["ranges"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigurationError(f"calibration cache {str(self.path)!r} is damaged: delete it") from None

    def write(self, graph: Graph, method: str, ranges: Mapping[str, Range]) -> None:
        """Whole, or not at all."""
        stored = {name: [found.low, found.high, found.lows, found.highs] for name, found in ranges.items()}
        text = {"version": _VERSION, "model": digest(graph), "method": method, "ranges": stored}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
            json.dump(text, file, indent=1)
        os.replace(file.name, self.path)


def calibrate(graph: Graph, tracer: Tracer, data: Iterable[Batch], method: str) -> dict[str, Range]:
    """Ranges of the graph's float32 values by name, over all runs of `data`, which `tracer` runs.

    ConfigurationError for inputs that are not finite.
    """
    choose = calibrator(method)
    channels = {node.inputs[0].name for node in graph.nodes if node.op == "Linear" and node.inputs[0] is not None}
    seen: dict[str, Seen] = {}
    runs = list(data)
    for pass_ in ("extend",) if method == "minmax" else ("extend", "count"):

        def look(value: Value, x: Any, what: str = pass_) -> None:
            if value.name and isinstance(x, torch.Tensor) and value.dtype is DType.FLOAT32:
                keeps = value.name in channels and value.rank != 0
                getattr(seen.setdefault(value.name, Seen(keeps_channels=keeps)), what)(x)

        for run in runs:
            for value, x in zip(graph.inputs, run, strict=True):
                look(value, x)
            tracer.run([run], look)
    for value in graph.inputs:
        found = seen.get(value.name)
        if found is not None and not np.isfinite([found.low, found.high]).all():
            raise ConfigurationError(f"calibration data: {value.name!r} holds numbers that are not finite")
    # A value that is infinite by the model's own doing, as masks are, has no range and stays as it is.
    return {
        name: _with_channels(choose(found), found)
        for name, found in seen.items()
        if np.isfinite([found.low, found.high]).all()
    }


def _with_channels(found: Range, seen: Seen) -> Range:
    if seen.channels is None:
        return found
    lows, highs = (tuple(part.tolist()) for part in seen.channels)
    return replace(found, lows=lows, highs=highs)
