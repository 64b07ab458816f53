"""What a sequence model is told and remembers: control tensors and implicit state."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trine.core.errors import ModelLoadError
from trine.server.configuration.types import datatype_name
from trine.server.request import InferRequest
from trine.server.tensors import NUMPY_TYPES, Array, Tensor

ModelConfig = Any

_FLAGS = {0: "start", 1: "ready", 2: "end"}
_CORRELATION_ID = 3
_FALSE_TRUE = (("int32_false_true", "INT32"), ("fp32_false_true", "FP32"), ("bool_false_true", "BOOL"))


class Controls:
    """The control tensors of a model, made once for each value."""

    def __init__(self, config: ModelConfig) -> None:
        shape = (1, 1) if config.max_batch_size else (1,)
        self._shape = shape
        self._flags: list[tuple[str, str, Tensor, Tensor]] = []
        self.correlation: tuple[str, str] | None = None
        """Name and datatype of the input that gets the sequence's id."""
        for item in config.sequence_batching.control_input:
            for control in item.control:
                if control.kind == _CORRELATION_ID:
                    self.correlation = (item.name, datatype_name(control.data_type))
                else:
                    no, yes = _values(item.name, control, shape)
                    self._flags.append((_FLAGS[control.kind], item.name, no, yes))

    def apply(self, inputs: dict[str, Tensor], *, start: bool, ready: bool, end: bool, sequence: int | str) -> None:
        """Add the control tensors to a request's inputs."""
        given = {"start": start, "ready": ready, "end": end}
        for flag, name, no, yes in self._flags:
            inputs[name] = yes if given[flag] else no
        if self.correlation is not None:
            name, datatype = self.correlation
            inputs[name] = Tensor(name, datatype, self._shape, _id_array(datatype, sequence, self._shape))


def _values(name: str, control: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    for field, datatype in _FALSE_TRUE:
        values = list(getattr(control, field))
        if values:
            no, yes = (np.full(shape, value, NUMPY_TYPES[datatype]) for value in values)
            return Tensor(name, datatype, shape, no), Tensor(name, datatype, shape, yes)
    raise AssertionError("the configuration was checked")


def _id_array(datatype: str, sequence: int | str, shape: tuple[int, ...]) -> Array:
    if datatype == "BYTES":
        array = np.empty(shape, dtype=object)
        array[...] = str(sequence or "").encode()
        return array
    number = sequence if isinstance(sequence, int) else 0
    bits = NUMPY_TYPES[datatype].itemsize * 8
    return (
        np.array(number & ((1 << bits) - 1), dtype=f"<u{bits // 8}")
        .astype(NUMPY_TYPES[datatype])
        .reshape((1,) * len(shape))
    )


class States:
    """The implicit state of a model's sequences: outputs of one request that are inputs of the next."""

    def __init__(self, config: ModelConfig, directory: Path | None) -> None:
        self._lead = (1,) if config.max_batch_size else ()
        self.outputs: list[str] = [state.output_name for state in config.sequence_batching.state]
        """Outputs that the model must give besides its own."""
        self._pairs = [(state.output_name, state.input_name) for state in config.sequence_batching.state]
        self._initial = {
            state.input_name: self._first(config, state, directory) for state in config.sequence_batching.state
        }

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def initial(self) -> dict[str, Tensor]:
        """The state with which a sequence starts."""
        return dict(self._initial)

    def after(self, outputs: dict[str, Array], row: int) -> dict[str, Tensor]:
        """The state of the sequence in one row of an execution."""
        found = {}
        for output, name in self._pairs:
            array = outputs[output]
            if self._lead:
                array = array[row : row + 1]
            found[name] = Tensor(name, self._initial[name].datatype, array.shape, np.array(array))
        return found

    def _first(self, config: ModelConfig, state: Any, directory: Path | None) -> Tensor:
        where = f"model '{config.name}': initial state of '{state.input_name}'"
        datatype = datatype_name(state.data_type)
        initial = state.initial_state[0] if state.initial_state else None
        dims = initial.dims if initial is not None else state.dims
        shape = (*self._lead, *(1 if dim == -1 else dim for dim in dims))
        if initial is not None and initial.data_type != state.data_type:
            raise ModelLoadError(f"{where}: data_type differs from the state's")
        if initial is None or initial.WhichOneof("state_data") != "data_file":
            return Tensor(state.input_name, datatype, shape, _zeros(datatype, shape))
        path = (directory or Path()) / "initial_state" / initial.data_file
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ModelLoadError(f"{where}: {path} can't be read: {error}") from error
        expected = prod(shape) * NUMPY_TYPES[datatype].itemsize
        if datatype != "BYTES" and len(raw) != expected:
            raise ModelLoadError(f"{where}: {path} has {len(raw)} bytes, dims {list(dims)} need {expected}")
        return Tensor(state.input_name, datatype, shape, None, raw)


def _zeros(datatype: str, shape: tuple[int, ...]) -> Array:
    if datatype != "BYTES":
        return np.zeros(shape, NUMPY_TYPES[datatype])
    array = np.empty(shape, dtype=object)
    array[...] = b""
    return array


def filler(inputs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Zeros of one row, of the shapes that another sequence's inputs have: what an empty slot computes on."""
    return {
        name: Tensor(name, inputs[name].datatype, inputs[name].shape, _zeros(inputs[name].datatype, inputs[name].shape))
        for name in names
        if name in inputs
    }


def same_shapes(one: InferRequest, other: InferRequest, names: list[str]) -> bool:
    """Whether two requests' inputs of these names can lie in one batch."""
    for name in names:
        first, second = one.inputs.get(name), other.inputs.get(name)
        if (first is None) != (second is None):
            return False
        if first is not None and second is not None and first.shape != second.shape:
            return False
    return True
