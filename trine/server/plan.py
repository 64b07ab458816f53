"""What a protocol needs to know about a request besides its tensors: the part that is often the same again.

The edge decodes the head of a message (everything but the tensors' bytes) into a `Plan`, remembers it under the
head's bytes, and makes each request of it: a client that sends the same question with other numbers is decoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from trine.server.errors import ServerError
from trine.server.request import InferRequest, InferResponse, Parameter, RequestedOutput
from trine.server.tensors import NUMPY_TYPES, Tensor

RESERVED_PREFIX = "triton_"
EMPTY_FINAL = "triton_enable_empty_final_response"
MAX_UINT64 = (1 << 64) - 1


class Region:
    """Where in shared memory a tensor lies."""

    __slots__ = ("byte_size", "name", "offset")

    def __init__(self, name: str, byte_size: int, offset: int) -> None:
        self.name = name
        self.byte_size = byte_size
        self.offset = offset


class InputPlan:
    """An input. `size`: its bytes in the message, None: it has none there; `tensor`: its values came with the head."""

    __slots__ = ("datatype", "name", "region", "shape", "size", "tensor")

    def __init__(
        self,
        name: str,
        datatype: str,
        shape: tuple[int, ...],
        *,
        size: int | None = None,
        region: Region | None = None,
        tensor: Tensor | None = None,
    ) -> None:
        self.name = name
        self.datatype = datatype
        self.shape = shape
        self.size = size
        self.region = region
        self.tensor = tensor


class OutputPlan:
    """How an output is to be answered."""

    __slots__ = ("binary", "classification", "region")

    def __init__(self, *, classification: int = 0, binary: bool = False, region: Region | None = None) -> None:
        self.classification = classification
        self.binary = binary
        self.region = region


class Plan:
    """A request without its tensors. Nothing in it changes once it is made."""

    __slots__ = (
        "answers",
        "binary",
        "empty_final",
        "id",
        "inputs",
        "model_name",
        "model_version",
        "outputs",
        "parameters",
        "plain",
        "priority",
        "problem",
        "sequence_end",
        "sequence_id",
        "sequence_start",
        "timeout_us",
    )

    def __init__(self) -> None:
        self.model_name = ""
        self.model_version = ""
        self.id = ""
        self.inputs: list[InputPlan] = []
        self.outputs: tuple[RequestedOutput, ...] | None = None  # None: all
        self.answers: dict[str, OutputPlan] = {}
        self.parameters: dict[str, Parameter] = {}
        self.binary = False
        self.empty_final = False
        self.priority = 0
        self.timeout_us = 0
        self.sequence_id: int | str = 0
        self.sequence_start = False
        self.sequence_end = False
        self.problem: ServerError | None = None  # why it can't be; whether its model is there is said first
        self.plain = True  # no output is classified or goes to shared memory

    def add_input(self, planned: InputPlan) -> None:
        """Raises ServerError where the datatype is not one or the name came before."""
        if planned.datatype not in NUMPY_TYPES:
            raise ServerError(f"invalid datatype for input {planned.name}")
        if any(other.name == planned.name for other in self.inputs):
            known = self.id or "<id_unknown>"
            raise ServerError(f"[request id: {known}] input '{planned.name}' already exists in request")
        self.inputs.append(planned)

    def add_output(self, name: str, planned: OutputPlan) -> None:
        """Of an output asked for twice the first counts."""
        if name in self.answers:
            return
        self.outputs = (*(self.outputs or ()), RequestedOutput(name, planned.classification))
        self.answers[name] = planned
        if planned.classification or planned.region is not None:
            self.plain = False

    def set_parameter(self, key: str, value: object) -> None:
        """A parameter of the request: one that the protocol knows, or the model's own. ServerError: a wrong type."""
        setter = _KNOWN.get(key)
        if setter is not None:
            setter(self, key, value)
        elif key.startswith(RESERVED_PREFIX):
            raise ServerError(
                "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."
            )
        elif not isinstance(value, (bool, int, float, str)):
            raise ServerError(f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string'.")
        else:
            self.parameters[key] = value

    def request(self, inputs: dict[str, Tensor], respond: Callable[[InferResponse], None]) -> InferRequest:
        """A request as planned, of these tensors."""
        return InferRequest(
            self.model_name,
            inputs,
            respond,
            model_version=self.model_version,
            id=self.id,
            outputs=self.outputs,
            parameters=dict(self.parameters) if self.parameters else {},
            priority=self.priority,
            timeout_us=self.timeout_us,
            sequence_id=self.sequence_id,
            sequence_start=self.sequence_start,
            sequence_end=self.sequence_end,
        )


def _boolean(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ServerError(f"parameter '{key}' must be a boolean, got {value!r}")
    return value


def _unsigned(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_UINT64:
        raise ServerError(f"Unable to parse '{key}': it must be an unsigned integer, got {value!r}")
    return value


def _set_sequence_id(plan: Plan, key: str, value: object) -> None:
    is_number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_UINT64
    if not is_number and not isinstance(value, str):
        raise ServerError(f"Unable to parse 'sequence_id': it must be an unsigned integer or a string, got {value!r}")
    plan.sequence_id = value  # type: ignore[assignment]


def _set_boolean(attribute: str) -> Callable[[Plan, str, object], None]:
    return lambda plan, key, value: setattr(plan, attribute, _boolean(key, value))


def _set_unsigned(attribute: str) -> Callable[[Plan, str, object], None]:
    return lambda plan, key, value: setattr(plan, attribute, _unsigned(key, value))


_KNOWN: dict[str, Callable[[Plan, str, object], None]] = {
    "sequence_id": _set_sequence_id,
    "sequence_start": _set_boolean("sequence_start"),
    "sequence_end": _set_boolean("sequence_end"),
    "priority": _set_unsigned("priority"),
    "timeout": _set_unsigned("timeout_us"),
    "binary_data_output": _set_boolean("binary"),
    EMPTY_FINAL: _set_boolean("empty_final"),
}


def region_of(parameters: dict[str, Any], owner: str) -> Region | None:
    """The shared memory that a tensor's parameters name."""
    if "shared_memory_region" not in parameters:
        return None
    name = parameters["shared_memory_region"]
    if not isinstance(name, str):
        raise ServerError(f"'shared_memory_region' of {owner} must be a string, got {name!r}")
    size = _unsigned("shared_memory_byte_size", parameters.get("shared_memory_byte_size", 0))
    return Region(name, size, _unsigned("shared_memory_offset", parameters.get("shared_memory_offset", 0)))


def classification_of(parameters: dict[str, Any]) -> int:
    """How many classes an output's parameters ask for; 0: its values."""
    if "classification" not in parameters:
        return 0
    return _unsigned("classification", parameters["classification"])


ValueT = TypeVar("ValueT")


class Remembered(Generic[ValueT]):
    """Plans by the bytes that they were decoded from. Full, it starts anew: what is frequent comes back at once."""

    __slots__ = ("limit", "longest", "values")

    def __init__(self, limit: int = 1024, longest: int = 4096) -> None:
        self.values: dict[bytes, ValueT] = {}
        self.limit = limit
        self.longest = longest

    def add(self, key: bytes, value: ValueT) -> None:
        if len(key) > self.longest:
            return
        if len(self.values) >= self.limit:
            self.values.clear()
        self.values[key] = value


def answered(plan: Plan, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The outputs that the request asked for."""
    if plan.outputs is None or len(outputs) == len(plan.outputs):
        return outputs
    return [output for output in outputs if output.name in plan.answers]
