"""Whether a request fits its model; what a request must have before a scheduler sees it.

The common case is decided by dictionary look-ups: a shape seen before is known to be right, with its rows and bytes.
Anything else is looked at step by step, in the order in which Triton reports what is wrong.
"""

from __future__ import annotations

from math import prod
from typing import Any

from trine.server.configuration.types import datatype_name, item_size
from trine.server.errors import Code, ServerError
from trine.server.request import InferRequest
from trine.server.tensors import Tensor

ModelConfig = Any
Shape = tuple[int, ...]

_KNOWN_SHAPES = 1024  # a model's shapes remembered, for each input
_ANY_SIZE = -1
_BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


class InputSpec:
    """An input as configured, and the shapes already found right: rows and bytes of each."""

    __slots__ = ("datatype", "dims", "item_size", "known", "name", "optional", "ragged", "reshape", "varies")

    def __init__(self, tensor: Any) -> None:
        self.name: str = tensor.name
        self.datatype = datatype_name(tensor.data_type)
        self.dims: Shape = tuple(tensor.dims)
        self.optional: bool = tensor.optional
        self.ragged: bool = tensor.allow_ragged_batch
        self.reshape: Shape | None = tuple(tensor.reshape.shape) if tensor.HasField("reshape") else None
        self.item_size = item_size(self.datatype)
        self.varies = -1 in self.dims and not self.ragged
        self.known: dict[Shape, tuple[int, int]] = {}


class RequestChecker:
    """Checks requests to one model; sets `batch_size`, `priority` and, where shapes vary, `signature`."""

    def __init__(self, config: ModelConfig) -> None:
        self.model_name: str = config.name
        self.max_batch_size: int = config.max_batch_size
        self.specs = {tensor.name: InputSpec(tensor) for tensor in config.input}
        self.outputs = {tensor.name for tensor in config.output}
        self._count = len(self.specs)
        self._required = sum(not spec.optional for spec in self.specs.values())
        self._reshapes = any(spec.reshape is not None for spec in self.specs.values())
        self.signed = self._required != self._count or any(spec.varies for spec in self.specs.values())
        """Whether requests of this model may differ in shape or inputs, so that a batch must compare signatures."""
        self._sequences: bool = config.HasField("sequence_batching")
        batching = config.dynamic_batching
        self._levels: int = batching.priority_levels
        self._default_level: int = batching.default_priority_level

    def check(self, request: InferRequest) -> None:
        """Raises ServerError (INVALID_ARGUMENT) with the text that Triton's clients know."""
        inputs = request.inputs
        specs = self.specs
        rows = -1
        fits = len(inputs) == self._count
        if fits:
            for name, tensor in inputs.items():
                spec = specs.get(name)
                if spec is None or spec.datatype != tensor.datatype:
                    fits = False
                    break
                known = spec.known.get(tensor.shape)
                if known is None or (known[0] != rows and rows >= 0):
                    fits = False
                    break
                rows = known[0]
                if known[1] != tensor.byte_size and known[1] != _ANY_SIZE:
                    fits = False
                    break
                if known[1] == _ANY_SIZE:
                    self._check_strings(request, tensor)
        if not fits:
            rows = self._check_slowly(request)
        request.batch_size = rows if rows > 0 else 1
        if request.outputs is not None:
            self._check_outputs(request)
        if self._levels and not 0 < request.priority <= self._levels:
            request.priority = self._default_level
        if self.signed:
            request.signature = tuple(
                (name, tensor.shape[1:]) if specs[name].varies else name for name, tensor in inputs.items()
            )
        if self._reshapes:
            self._reshape(request)

    def _error(self, request: InferRequest, text: str) -> ServerError:
        return ServerError(f"[request id: {request.id or '<id_unknown>'}] {text}", Code.INVALID_ARGUMENT)

    def _check_outputs(self, request: InferRequest) -> None:
        for output in request.outputs or ():
            if output.name not in self.outputs:
                raise ServerError(f"unexpected inference output '{output.name}' for model '{self.model_name}'")

    def _check_slowly(self, request: InferRequest) -> int:
        """Rows of the request (0: the model does not batch), having remembered its shapes."""
        self._check_count(request)
        for name in request.inputs:
            if name not in self.specs:
                raise ServerError(f"unexpected inference input '{name}' for model '{self.model_name}'")
        rows = self._check_rows(request) if self.max_batch_size else 0
        for name, tensor in request.inputs.items():
            self._check_tensor(request, self.specs[name], tensor, rows)
        return rows

    def _check_count(self, request: InferRequest) -> None:
        if self._required <= len(request.inputs) <= self._count and all(
            spec.optional or name in request.inputs for name, spec in self.specs.items()
        ):
            return
        unknown = [name for name in request.inputs if name not in self.specs]
        if unknown and len(request.inputs) == self._count:
            raise ServerError(f"unexpected inference input '{unknown[0]}' for model '{self.model_name}'")
        missing = ",".join(
            f"'{name}'" for name, spec in self.specs.items() if not spec.optional and name not in request.inputs
        )
        given = ",".join(f"'{name}'" for name in sorted(request.inputs))
        expected = (
            f"expected {self._count} inputs"
            if self._required == self._count
            else f"expected number of inputs between {self._required} and {self._count}"
        )
        raise self._error(
            request,
            f"{expected} but got {len(request.inputs)} inputs for model '{self.model_name}'. Got input(s) [{given}], "
            f"but missing required input(s) [{missing}]. Please provide all required input(s).",
        )

    def _check_rows(self, request: InferRequest) -> int:
        rows = 0
        for name, tensor in request.inputs.items():
            if not tensor.shape:
                raise self._error(
                    request,
                    f"input '{name}' has no shape but model requires batch dimension for '{self.model_name}'",
                )
            if rows == 0:
                rows = tensor.shape[0]
            elif tensor.shape[0] != rows:
                raise self._error(
                    request, f"input '{name}' batch size does not match other inputs for '{self.model_name}'"
                )
        if rows > self.max_batch_size:
            raise self._error(
                request, f"inference request batch-size must be <= {self.max_batch_size} for '{self.model_name}'"
            )
        return rows

    def _check_tensor(self, request: InferRequest, spec: InputSpec, tensor: Tensor, rows: int) -> None:
        if tensor.datatype != spec.datatype:
            raise self._error(
                request,
                f"inference input '{spec.name}' data-type is '{tensor.datatype}', but model '{self.model_name}' "
                f"expects '{spec.datatype}'",
            )
        shape = tensor.shape[1:] if self.max_batch_size else tensor.shape
        if len(shape) != len(spec.dims) or any(
            want not in (-1, have) for want, have in zip(spec.dims, shape, strict=True)
        ):
            full = (-1, *spec.dims) if self.max_batch_size else spec.dims
            raise self._error(
                request,
                f"unexpected shape for input '{spec.name}' for model '{self.model_name}'. Expected {dims_text(full)}, "
                f"got {dims_text(tensor.shape)}. {_BATCH_NOTE if self.max_batch_size else ''}",
            )
        if any(dim < 0 for dim in tensor.shape):
            raise self._error(
                request,
                f"All input dimensions should be specified for input '{spec.name}' for model '{self.model_name}', got "
                f"{dims_text(tensor.shape)}",
            )
        if self.max_batch_size and not rows and prod(shape):  # no row at all counts as one whose values are missing
            where, count = f"input '{spec.name}' for model '{self.model_name}'", prod(shape)
            if spec.datatype == "BYTES":
                raise self._error(request, f"expected {count} string elements for inference {where}, got 0")
            size = count * spec.item_size
            raise self._error(request, f"input byte size mismatch for {where}. Expected {size}, got 0")
        expected = _ANY_SIZE
        if spec.datatype == "BYTES":
            self._check_strings(request, tensor)
        else:
            expected = prod(tensor.shape) * spec.item_size
            if tensor.byte_size != expected:
                raise self._error(
                    request,
                    f"input byte size mismatch for input '{spec.name}' for model '{self.model_name}'. Expected "
                    f"{expected}, got {tensor.byte_size}",
                )
        if len(spec.known) >= _KNOWN_SHAPES:
            spec.known.clear()
        spec.known[tensor.shape] = (rows, expected)

    def _check_strings(self, request: InferRequest, tensor: Tensor) -> None:
        """Each element's length indicator and bytes are there, and as many elements as the shape says."""
        if not tensor.is_raw:
            return
        raw, expected, found, position = tensor.raw, tensor.size, 0, 0
        end = len(raw)
        while position < end:
            if end - position < 4:
                raise self._error(
                    request,
                    f"incomplete string length indicator for inference input '{tensor.name}' for model "
                    f"'{self.model_name}', expecting 4 bytes but only {end - position} bytes available. Please make "
                    "sure the string length indicator is in one buffer.",
                )
            found += 1
            if found > expected:
                raise self._error(
                    request,
                    f"unexpected number of string elements {found} for inference input '{tensor.name}' for model "
                    f"'{self.model_name}', expecting {expected}",
                )
            position += 4 + int.from_bytes(raw[position : position + 4], "little")
        if position > end:
            raise self._error(
                request,
                f"incomplete string data for inference input '{tensor.name}' for model '{self.model_name}', the last "
                f"element's length goes {position - end} bytes past the end",
            )
        if found != expected:
            raise self._error(
                request,
                f"expected {expected} string elements for inference input '{tensor.name}' for model "
                f"'{self.model_name}', got {found}",
            )

    def _reshape(self, request: InferRequest) -> None:
        """Inputs take the shape that the model itself has."""
        for name, spec in self.specs.items():
            tensor = request.inputs.get(name)
            if spec.reshape is None or tensor is None:
                continue
            lead = tensor.shape[:1] if self.max_batch_size else ()
            request.inputs[name] = tensor.reshaped(
                (*lead, *reshaped(tensor.shape[len(lead) :], spec.dims, spec.reshape))
            )


def reshaped(shape: Shape, dims: Shape, target: Shape) -> Shape:
    """`shape`, which fits `dims`, as `target` has it: its variable dimensions take the values of those of `dims`."""
    variable = iter([have for have, want in zip(shape, dims, strict=True) if want == -1])
    return tuple(next(variable) if dim == -1 else dim for dim in target)


def dims_text(dims: Shape) -> str:
    """As messages show them: "[-1,16]"."""
    return "[" + ",".join(map(str, dims)) + "]"
