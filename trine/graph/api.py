"""Building, saving, loading and running plans."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trine.graph.dtypes import DType, from_numpy, to_numpy, to_torch
from trine.graph.errors import InputError
from trine.graph.importer import import_model
from trine.graph.ir import Graph, Value
from trine.graph.runtime import Program, check_input

Array = np.ndarray[Any, Any]


class Plan:
    """A compiled model. `run` may be called from several threads."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.program = Program(graph)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Named arrays (tensors and lists are taken, too) to named arrays. InputError for what does not fit."""
        wanted = {value.name: value for value in self.graph.inputs}
        for name in inputs:
            if name not in wanted:
                raise InputError(f"no input is called {name!r}: {', '.join(wanted) or 'there is none'}", param=name)
        symbols: dict[str, int] = {}
        arguments = [self._argument(value, inputs, symbols) for value in self.graph.inputs]
        with torch.inference_mode():
            results = self.program.run(*arguments)
        return {
            name: _to_caller(result, value.dtype)
            for name, value, result in zip(self.graph.output_names, self.graph.outputs, results, strict=True)
        }

    def _argument(self, value: Value, inputs: Mapping[str, Any], symbols: dict[str, int]) -> Any:
        if value.name not in inputs:
            raise InputError(f"input {value.name!r} is missing", param=value.name)
        tensor = _from_caller(inputs[value.name], value)
        if tensor is not None and not isinstance(tensor, list):
            check_input(value, tensor, symbols)
        return tensor


def _from_caller(given: Any, value: Value) -> Any:
    if given is None or isinstance(given, torch.Tensor):
        return given
    if isinstance(given, list) and value.dtype is None:
        return [_from_caller(item, value) for item in given]
    array = np.asarray(given)
    try:
        kind = from_numpy(array.dtype)
    except TypeError as error:
        raise InputError(f"input {value.name!r}: {error}", param=value.name) from None
    if kind is DType.STRING:
        return array.astype(object)
    if value.dtype is not None and kind is not value.dtype:
        raise InputError(f"input {value.name!r} is {kind}; it must be {value.dtype}", param=value.name)
    return to_torch(array)


def _to_caller(result: Any, dtype: DType | None) -> Any:
    if isinstance(result, torch.Tensor):
        return np.array(to_numpy(result, dtype))
    return [_to_caller(item, None) for item in result] if isinstance(result, list) else result


def build(source: str | os.PathLike[str] | bytes | Any, *, folder: Path | None = None, optimise: bool = True) -> Plan:
    """Compile an ONNX file, its bytes or a ModelProto."""
    graph = import_model(source, folder)
    return Plan(graph)
