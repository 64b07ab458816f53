"""A batch is put together once and its answer cut apart once.

Inputs that came as bytes are joined as bytes: no request's tensor is decoded by itself. Outputs are cut into views of
the batch's one buffer: nothing is copied until a protocol writes it to a socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trine.server.configuration.types import datatype_name
from trine.server.errors import Code, ServerError
from trine.server.request import InferRequest
from trine.server.tensors import DATATYPES, NUMPY_TYPES, Array, Tensor
from trine.server.validation import reshaped

ModelConfig = Any

_COPY_WITHOUT_LOCK = 1 << 16  # bytes from which numpy's copy, which lets other threads run, beats joining bytes


class OutputSpec:
    """An output as configured."""

    __slots__ = ("datatype", "dims", "dtype", "model_dims", "name", "reshape")

    def __init__(self, tensor: Any) -> None:
        self.name: str = tensor.name
        self.datatype = datatype_name(tensor.data_type)
        self.dtype = NUMPY_TYPES[self.datatype]
        self.dims = tuple(tensor.dims)
        self.reshape: tuple[int, ...] | None = tuple(tensor.reshape.shape) if tensor.HasField("reshape") else None


class Assembler:
    """Joins the inputs of the requests of a batch, and cuts the outputs apart, for one model."""

    def __init__(self, config: ModelConfig) -> None:
        self.model_name: str = config.name
        self.batches = config.max_batch_size > 0
        self.outputs = {tensor.name: OutputSpec(tensor) for tensor in config.output}
        self.output_names = list(self.outputs)
        self.also_wanted: list[str] = []
        """Outputs that are no client's: the state of sequences."""
        self._ragged = {tensor.name for tensor in config.input if tensor.allow_ragged_batch}
        self._batch_inputs = [
            (kind_name(item), list(item.target_name), datatype_name(item.data_type), item.source_input[0])
            for item in config.batch_input
        ]
        self._scattered = {target: item.source_input[0] for item in config.batch_output for target in item.target_name}

    def wanted(self, requests: Sequence[InferRequest]) -> list[str]:
        """The outputs that any of the requests asks for, in the model's order."""
        names: set[str] = set()
        for request in requests:
            if request.outputs is None:
                return self._with_state(self.output_names)
            names.update(output.name for output in request.outputs)
        return self._with_state([name for name in self.output_names if name in names])

    def _with_state(self, names: list[str]) -> list[str]:
        if not self.also_wanted:
            return names
        return [*names, *(name for name in self.also_wanted if name not in names)]

    def gather(self, requests: Sequence[InferRequest]) -> dict[str, Array]:
        """The batch's inputs by name, the first dimension being rows where the model batches."""
        first = requests[0].inputs
        if len(requests) == 1 and not self._ragged and not self._batch_inputs:
            return {name: tensor.array for name, tensor in first.items()}
        inputs = {
            name: _flat([request.inputs[name] for request in requests])
            if name in self._ragged
            else _join([request.inputs[name] for request in requests])
            for name in first
        }
        for kind, targets, datatype, source in self._batch_inputs:
            shapes = [request.inputs[source].shape for request in requests]
            rows = sum(request.batch_size for request in requests)
            value = _batch_input(kind, shapes, rows).astype(NUMPY_TYPES[datatype])
            inputs.update(dict.fromkeys(targets, value))
        return inputs

    def scatter(self, requests: Sequence[InferRequest], rows: int, outputs: dict[str, Array]) -> list[list[Tensor]]:
        """Each request's output tensors. ServerError (INTERNAL) where the model answered in another shape or type."""
        answers: list[list[Tensor]] = [[] for _ in requests]
        for name, array in outputs.items():
            spec = self.outputs.get(name)
            if spec is None:
                continue
            array = self._as_configured(spec, array)
            if not self.batches:
                answers[0].append(Tensor(name, spec.datatype, array.shape, array))
            elif name in self._scattered:
                _scatter_by_shape(answers, requests, spec, array, self._scattered[name])
            else:
                self._scatter_rows(answers, requests, rows, spec, array)
        for index, request in enumerate(requests):
            if request.outputs is not None:
                given = {tensor.name: tensor for tensor in answers[index]}
                answers[index] = [given[output.name] for output in request.outputs if output.name in given]
        return answers

    def _as_configured(self, spec: OutputSpec, array: Array) -> Array:
        if array.dtype != spec.dtype:
            if array.dtype.kind in "OSU" and spec.datatype == "BYTES":
                return array.astype(object)
            raise ServerError(
                f"model '{self.model_name}': output '{spec.name}' is {DATATYPES.get(array.dtype, array.dtype)}, the "
                f"configuration says {spec.datatype}: correct data_type in config.pbtxt",
                Code.INTERNAL,
            )
        if spec.reshape is not None:
            lead = array.shape[:1] if self.batches else ()
            array = array.reshape((*lead, *reshaped(array.shape[len(lead) :], spec.reshape, spec.dims)))
        return array

    def _scatter_rows(
        self, answers: list[list[Tensor]], requests: Sequence[InferRequest], rows: int, spec: OutputSpec, array: Array
    ) -> None:
        shape = array.shape
        if not shape or shape[0] != rows:
            raise ServerError(
                f"model '{self.model_name}': output '{spec.name}' has shape {list(shape)} for a batch of {rows}; its "
                "first dimension must be the batch (set max_batch_size: 0 for a model that does not batch)",
                Code.INTERNAL,
            )
        name, datatype = spec.name, spec.datatype
        if len(requests) == 1:
            answers[0].append(Tensor(name, datatype, shape, array))
            return
        tail = shape[1:]
        position = 0
        if datatype == "BYTES" or not array.size:
            for answer, request in zip(answers, requests, strict=True):
                end = position + request.batch_size
                answer.append(Tensor(name, datatype, (request.batch_size, *tail), array[position:end]))
                position = end
            return
        view = np.ascontiguousarray(array).data.cast("B")
        step = len(view) // rows
        one = (1, *tail)
        for answer, request in zip(answers, requests, strict=True):
            count = request.batch_size
            end = position + step * count
            answer.append(Tensor(name, datatype, one if count == 1 else (count, *tail), None, view[position:end]))
            position = end


def kind_name(item: Any) -> str:
    """The name of a batch input's or output's kind."""
    name: str = item.DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number[item.kind].name
    return name


def _join(tensors: list[Tensor]) -> Array:
    """One tensor of all rows. The shapes are equal but for the first dimension: whoever made the batch saw to it."""
    first = tensors[0]
    if first.datatype != "BYTES" and first.byte_size * len(tensors) < _COPY_WITHOUT_LOCK:
        rows = sum([tensor.shape[0] for tensor in tensors])
        joined = np.frombuffer(b"".join([tensor.raw for tensor in tensors]), dtype=NUMPY_TYPES[first.datatype])
        return joined.reshape((rows, *first.shape[1:]))
    return np.concatenate([tensor.array for tensor in tensors])


def _flat(tensors: list[Tensor]) -> Array:
    """Ragged: the elements of all requests one after the other, without padding."""
    return np.concatenate([tensor.array.reshape(-1) for tensor in tensors])


def _batch_input(kind: str, shapes: list[tuple[int, ...]], rows: int) -> Array:
    """A tensor that tells the model how a ragged batch is made up."""
    counts = [int(np.prod(shape)) for shape in shapes]
    if kind == "BATCH_ELEMENT_COUNT":
        return np.array(counts)
    if kind == "BATCH_ACCUMULATED_ELEMENT_COUNT":
        return np.cumsum(counts)
    if kind == "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO":
        return np.cumsum([0, *counts])
    if kind == "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE":
        return np.zeros(max(counts))
    items = [list(shape[1:]) for shape in shapes for _ in range(shape[0])]
    if kind == "BATCH_ITEM_SHAPE":
        return np.array(items).reshape(rows, -1)
    return np.array(items).reshape(-1)  # BATCH_ITEM_SHAPE_FLATTEN


def _scatter_by_shape(
    answers: list[list[Tensor]], requests: Sequence[InferRequest], spec: OutputSpec, array: Array, source: str
) -> None:
    """Cut a flat output so that each request gets as many elements as its input `source` has, in that shape."""
    flat = array.reshape(-1)
    position = 0
    for answer, request in zip(answers, requests, strict=True):
        shape = request.inputs[source].shape
        end = position + int(np.prod(shape))
        if end > flat.size:
            raise ServerError(
                f"output '{spec.name}' has {flat.size} elements, its batch_output needs at least {end}", Code.INTERNAL
            )
        answer.append(Tensor(spec.name, spec.datatype, shape, flat[position:end].reshape(shape)))
        position = end
