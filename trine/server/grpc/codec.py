"""ModelInferRequest and ModelInferResponse between bytes and the server's own objects.

Protobuf's runtime would copy each tensor twice. The message's fields are therefore told apart here: tensors stay where
they lie, and only the rest, the head, is given to protobuf, once for each different one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from trine.server.classification import classify, labels_of
from trine.server.errors import ServerError
from trine.server.plan import (
    EMPTY_FINAL,
    RESERVED_PREFIX,
    InputPlan,
    OutputPlan,
    Plan,
    Remembered,
    answered,
    classification_of,
    region_of,
)
from trine.server.proto import pb
from trine.server.request import InferResponse, Parameter
from trine.server.shared_memory import SharedMemory
from trine.server.tensors import NUMPY_TYPES, Tensor

Buffer = bytes | memoryview
_RAW_INPUT = 7 << 3 | 2
_RAW_OUTPUT_TAG = bytes((6 << 3 | 2,))
_NO_CONTENTS = ("FP16", "BF16")
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class Decoder:
    """Requests out of messages; remembers the heads of those that came before."""

    def __init__(self) -> None:
        self._plans: Remembered[Plan] = Remembered()
        self._last = b""
        self._last_plan: Plan | None = None

    def decode(self, message: Buffer) -> tuple[Plan, list[Buffer]]:
        """The plan, and the raw contents in order. ServerError: the message is none, or contradicts itself."""
        last = self._last
        if last and message[: len(last)] == last:
            raws = _only_raws(message, len(last))
            if raws is not None:
                assert self._last_plan is not None
                return self._last_plan, raws
        head, raws = split(message)
        plan = self._plans.values.get(head)
        if plan is None:
            plan = plan_of(head, bool(raws))
            if plan.problem is not None or any(planned.tensor is not None for planned in plan.inputs):
                return plan, raws
            self._plans.add(head, plan)
        if message[: len(head)] == head:  # in the usual order: the next one can be told by its beginning
            self._last, self._last_plan = head, plan
        return plan, raws


def _only_raws(message: Buffer, position: int) -> list[Buffer] | None:
    """The raw contents, where nothing else follows `position`."""
    raws: list[Buffer] = []
    end = len(message)
    while position < end:
        if message[position] != _RAW_INPUT:
            return None
        size, start = _varint(message, position + 1)
        position = start + size
        if position > end:
            return None
        raws.append(message[start:position])
    return raws


def split(message: Buffer) -> tuple[bytes, list[Buffer]]:
    """The message without its raw contents, and these."""
    head: list[bytes] = []
    raws: list[Buffer] = []
    position, begun, end = 0, 0, len(message)
    while position < end:
        tag, start = _varint(message, position)
        kind = tag & 7
        if kind == 2:
            size, start = _varint(message, start)
            stop = start + size
        elif kind == 0:
            _, stop = _varint(message, start)
        elif kind == 1:
            stop = start + 8
        elif kind == 5:
            stop = start + 4
        else:
            raise _malformed()
        if stop > end:
            raise _malformed()
        if tag == _RAW_INPUT:
            if begun < position:
                head.append(bytes(message[begun:position]))
            raws.append(message[start:stop])
            begun = stop
        position = stop
    if begun < end:
        head.append(bytes(message[begun:end]))
    return head[0] if len(head) == 1 else b"".join(head), raws


def _varint(message: Buffer, position: int) -> tuple[int, int]:
    """A number and the position after it."""
    try:
        byte = message[position]
        if byte < 128:
            return byte, position + 1
        value, shift = byte & 127, 7
        while True:
            position += 1
            byte = message[position]
            value |= (byte & 127) << shift
            if byte < 128:
                return value, position + 1
            shift += 7
            if shift > 63:
                raise _malformed()
    except IndexError:
        raise _malformed() from None


def _malformed() -> ServerError:
    return ServerError("the request is no ModelInferRequest: its protobuf encoding is broken")


def plan_of(head: bytes, has_raws: bool) -> Plan:
    """What a head says. Raises ServerError."""
    try:
        message = pb.ModelInferRequest.FromString(head)
    except DecodeError as error:
        raise ServerError(f"the request is no ModelInferRequest: {error}") from None
    plan = Plan()
    plan.model_name, plan.model_version, plan.id = message.model_name, message.model_version, message.id
    try:
        _fill(plan, message, has_raws)
    except ServerError as error:
        plan.problem = error
    return plan


def _fill(plan: Plan, message: Any, has_raws: bool) -> None:
    for key, value in message.parameters.items():
        if key.startswith(RESERVED_PREFIX) and key != EMPTY_FINAL:
            raise ServerError(
                f"parameter keys starting with '{RESERVED_PREFIX}' are reserved for Triton usage. Only the following "
                f"keys starting with '{RESERVED_PREFIX}' are allowed: {EMPTY_FINAL}"
            )
        if key == "binary_data_output":  # means nothing here: it is the model's own, as any other
            plan.parameters[key] = parameter_value(key, value)
        else:
            plan.set_parameter(key, parameter_value(key, value))
    for tensor in message.inputs:
        plan.add_input(_input_plan(tensor, has_raws, plan.model_name))
    for output in message.outputs:
        parameters = _parameters(output.parameters)
        region = region_of(parameters, f"output '{output.name}'")
        plan.add_output(
            output.name, OutputPlan(classification=classification_of(parameters), binary=True, region=region)
        )


def parameter_value(key: str, parameter: Any) -> Parameter:
    """An InferParameter's value; ServerError where it has none."""
    chosen = parameter.WhichOneof("parameter_choice")
    if chosen is None:
        raise ServerError(f"parameter '{key}' has no value: set one of its fields")
    value: Parameter = getattr(parameter, chosen)
    return value


def _parameters(parameters: Any) -> dict[str, Any]:
    return {key: parameter_value(key, value) for key, value in parameters.items()} if parameters else {}


def _input_plan(tensor: Any, has_raws: bool, model: str) -> InputPlan:
    name, datatype, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
    if any(dim < 0 for dim in shape):
        raise ServerError(f"input '{name}' of model '{model}' has a negative dimension: {list(shape)}")
    parameters = _parameters(tensor.parameters)
    if "shared_memory_region" in parameters and "shared_memory_byte_size" not in parameters:
        raise ServerError(
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor "
            f"'{name}'"
        )
    region = region_of(parameters, f"input '{name}'")
    has_contents = tensor.HasField("contents")
    if has_contents and (has_raws or region is not None):
        other = "shared memory" if region is not None else "raw_input_contents"
        raise ServerError(
            f"contents field must not be specified when using {other} for input tensor '{name}' for model '{model}'"
        )
    if region is not None:
        return InputPlan(name, datatype, shape, region=region)
    if has_raws:
        return InputPlan(name, datatype, shape, size=0)
    if not has_contents:
        raise ServerError(f"unable to find data for input tensor '{name}' for model '{model}' in request.")
    return InputPlan(name, datatype, shape, tensor=_typed(tensor, name, datatype, shape))


def _typed(tensor: Any, name: str, datatype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of values in `contents`."""
    field = _CONTENTS.get(datatype)
    if field is None:
        if datatype in _NO_CONTENTS:
            raise ServerError(f"{datatype} has no typed contents: send input '{name}' in raw_input_contents")
        raise ServerError(f"invalid datatype for input {name}")
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            raise ServerError(f"input '{name}' of type {datatype} must be given in {field}, not in {other.name}")
    values = getattr(tensor.contents, field)
    expected = 1
    for dim in shape:
        expected *= dim
    if len(values) != expected:
        raise ServerError(
            f"unexpected number of values for input '{name}': its shape {list(shape)} has {expected}, {field} has "
            f"{len(values)}"
        )
    dtype = NUMPY_TYPES[datatype]
    if dtype.kind == "O":
        array = np.empty(expected, dtype=object)
        array[:] = list(values)
    else:
        try:
            array = np.array(list(values), dtype=dtype)
        except OverflowError as error:
            raise ServerError(f"a value of input '{name}' is no {datatype}: {error}") from None
    return Tensor(name, datatype, shape, array.reshape(shape))


def tensors_of(plan: Plan, raws: Sequence[Buffer], memory: SharedMemory) -> dict[str, Tensor]:
    """The inputs of a request. Raises ServerError where there are too many or too few contents."""
    if not plan.plain:
        memory.check(plan)
    inputs: dict[str, Tensor] = {}
    index = 0
    for planned in plan.inputs:
        name = planned.name
        if planned.size is not None:
            if index == len(raws):
                raise ServerError(
                    f"unable to find data for input tensor '{name}' for model '{plan.model_name}' in request."
                )
            inputs[name] = Tensor(name, planned.datatype, planned.shape, None, raws[index])
            index += 1
        elif planned.tensor is not None:
            inputs[name] = planned.tensor
        else:
            assert planned.region is not None
            inputs[name] = Tensor(name, planned.datatype, planned.shape, None, memory.read(planned.region))
    if index != len(raws):
        raise ServerError(
            f"unexpected number of raw_input_contents for model '{plan.model_name}': {len(raws)} for {index} inputs"
        )
    return inputs


class Encoder:
    """Messages out of responses; remembers the heads of those that came before."""

    def __init__(self, memory: SharedMemory, repository: Any) -> None:
        self._memory = memory
        self._repository = repository
        self._heads: dict[tuple[Any, ...], bytes] = {}

    def encode(
        self, plan: Plan, model: Any, response: InferResponse, *, final: bool | None = None
    ) -> tuple[list[Buffer], int]:
        """A ModelInferResponse in parts, and its bytes. final: what `triton_final_response` says, None: nothing."""
        outputs = answered(plan, response.outputs)
        name, version = response.model_name or model.name, response.model_version or model.version
        if response.is_empty:
            version = ""  # the end of a stream, as Triton sends it
        if not plan.plain:
            outputs = [self._shaped(plan, model, output) for output in outputs]
        if plan.plain and not response.parameters and final is None:
            key = (name, version, plan.id, *[(output.name, output.datatype, output.shape) for output in outputs])
            head = self._heads.get(key)
            if head is None:
                head = _head(plan, name, version, response, outputs, final)
                if len(self._heads) >= 1024:
                    self._heads.clear()
                self._heads[key] = head
        else:
            head = _head(plan, name, version, response, outputs, final)
        parts: list[Buffer] = [head]
        length = len(head)
        for output in outputs:
            wanted = plan.answers.get(output.name)
            raw: Buffer = output.raw
            if wanted is not None and wanted.region is not None:
                self._memory.write(wanted.region, raw, output.name)
                raw = b""
            prefix = _RAW_OUTPUT_TAG + _encoded_varint(len(raw))
            parts.append(prefix)
            parts.append(raw)
            length += len(prefix) + len(raw)
        return parts, length

    def _shaped(self, plan: Plan, model: Any, output: Tensor) -> Tensor:
        wanted = plan.answers.get(output.name)
        if wanted is None or not wanted.classification:
            return output
        labels = labels_of(self._repository, model, output.name)
        return classify(output, wanted.classification, labels, batched=model.config.max_batch_size > 0)


def _head(
    plan: Plan, name: str, version: str, response: InferResponse, outputs: Sequence[Tensor], final: bool | None
) -> bytes:
    message = pb.ModelInferResponse(model_name=name, model_version=version, id=plan.id)
    for key, value in (response.parameters or {}).items():
        set_parameter(message.parameters[key], value)
    if final is not None:
        message.parameters["triton_final_response"].bool_param = final
    for output in outputs:
        described = message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        wanted = plan.answers.get(output.name)
        if wanted is not None and wanted.region is not None:
            described.parameters["shared_memory_region"].string_param = wanted.region.name
            described.parameters["shared_memory_byte_size"].int64_param = len(output.raw)
            if wanted.region.offset:
                described.parameters["shared_memory_offset"].int64_param = wanted.region.offset
    data: bytes = message.SerializeToString()
    return data


def set_parameter(target: Any, value: Parameter) -> None:
    """Set an InferParameter."""
    if isinstance(value, bool):
        target.bool_param = value
    elif isinstance(value, int):
        if value >= 2**63:
            target.uint64_param = value
        else:
            target.int64_param = value
    elif isinstance(value, float):
        target.double_param = value
    else:
        target.string_param = value


def stream_response(parts: list[Buffer], length: int) -> tuple[list[Buffer], int]:
    """A ModelStreamInferResponse around a ModelInferResponse."""
    prefix = b"\x12" + _encoded_varint(length)
    return [prefix, *parts], length + len(prefix)


def stream_error(message: str, plan: Plan | None) -> bytes:
    """A ModelStreamInferResponse that says what went wrong, and with which request."""
    response = pb.ModelStreamInferResponse(error_message=message)
    if plan is not None:
        response.infer_response.model_name = plan.model_name
        response.infer_response.model_version = plan.model_version
        response.infer_response.id = plan.id
    data: bytes = response.SerializeToString()
    return data


def _encoded_varint(value: int) -> bytes:
    if value < 128:
        return bytes((value,))
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


__all__ = ["EMPTY_FINAL", "Decoder", "Encoder", "split", "stream_error", "stream_response", "tensors_of"]
