"""Tensor values in JSON, and the JSON of requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from typing import Annotated, Any

import msgspec
import numpy as np

from trine.server.errors import ServerError
from trine.server.http.exchange import Buffer
from trine.server.tensors import NUMPY_TYPES, Tensor

_NO_JSON = ("FP16", "BF16")
Dimension = Annotated[int, msgspec.Meta(ge=0)]


class WireTensor(msgspec.Struct):
    """An input as it comes; its values are decoded when its datatype is known."""

    name: str
    shape: list[Dimension]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class LooseTensor(msgspec.Struct):
    """The same with decoded values."""

    name: str
    shape: list[Dimension]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: Any = msgspec.UNSET


class WireOutput(msgspec.Struct):
    """An output asked for."""

    name: str
    parameters: dict[str, Any] | None = None


class WireInfer(msgspec.Struct):
    """The JSON of an inference request."""

    inputs: list[WireTensor]
    outputs: list[WireOutput] | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


class LooseInfer(msgspec.Struct):
    """The same with decoded values."""

    inputs: list[LooseTensor]
    outputs: list[WireOutput] | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


_document = msgspec.json.Decoder(WireInfer)
_any = msgspec.json.Decoder()
_lists: dict[str, msgspec.json.Decoder[Any]] = {
    "b": msgspec.json.Decoder(list[bool]),
    "i": msgspec.json.Decoder(list[int]),
    "u": msgspec.json.Decoder(list[int]),
    "f": msgspec.json.Decoder(list[float]),
    "O": msgspec.json.Decoder(list[str]),
}
_TYPES: dict[str, tuple[type, ...]] = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float), "O": (str,)}


def parse_json(body: Buffer) -> Any:
    """Any JSON, NaN and Infinity included. ServerError (400) says where it is wrong."""
    try:
        return _any.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        return _parse_slowly(body, error)


def _parse_slowly(body: Buffer, error: Exception) -> Any:
    """Not-a-number and infinities are no JSON, but Triton's clients write them."""
    data = bytes(body)
    if b"NaN" in data or b"Inf" in data:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as again:
            error = again
    raise malformed(error) from None


def malformed(error: Exception) -> ServerError:
    """What to say about JSON that is none, or is not what it should be."""
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return ServerError(f"failed to parse the request JSON buffer: {reason}")


def decode_document(body: Buffer) -> WireInfer | LooseInfer:
    """The JSON of an inference request. Raises ServerError."""
    try:
        return _document.decode(body)
    except msgspec.ValidationError as error:
        raise malformed(error) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        loose = _parse_slowly(body, error)
        try:
            return msgspec.convert(loose, LooseInfer)
        except msgspec.ValidationError as invalid:
            raise malformed(invalid) from None


def decode_values(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> Tensor:
    """A tensor of JSON values, flat or nested as its shape. `data` is `msgspec.Raw` or decoded already."""
    dtype = NUMPY_TYPES.get(datatype)
    if dtype is None:
        raise ServerError(f"invalid datatype for input {name}")
    if datatype in _NO_JSON:
        raise ServerError(
            f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input {name}"
        )
    values = _flat(name, datatype, dtype.kind, data)
    if len(values) != prod(shape):
        raise ServerError("Unable to parse 'data': Shape does not match true shape of 'data' field")
    if dtype.kind == "O":
        array = np.empty(len(values), dtype=object)
        array[:] = [value.encode("utf-8", "surrogatepass") for value in values]
    else:
        try:
            with np.errstate(over="ignore"):  # 1e39 as FP32 is infinite, as Triton has it
                array = np.array(values, dtype=dtype)
        except OverflowError as error:
            raise ServerError(f"Unable to parse 'data': a value of input '{name}' is no {datatype}: {error}") from None
    return Tensor(name, datatype, shape, array.reshape(shape))


def _flat(name: str, datatype: str, kind: str, data: Any) -> list[Any]:
    if isinstance(data, msgspec.Raw):
        try:
            flat: list[Any] = _lists[kind].decode(data)
            return flat
        except (msgspec.DecodeError, RecursionError):
            data = parse_json(data)
    expected = _TYPES[kind]
    values = list(_leaves(data)) if isinstance(data, list) else None
    if values is None or any(type(value) not in expected for value in values):
        raise ServerError(f"Unable to parse 'data': the values of input '{name}' must be an array of {datatype}")
    return values


def _leaves(data: list[Any]) -> Iterator[Any]:
    """The values of nested arrays, in order; without recursion, as clients decide how deep they are."""
    stack = [iter(data)]
    while stack:
        for item in stack[-1]:
            if isinstance(item, list):
                stack.append(iter(item))
                break
            yield item
        else:
            stack.pop()


def encode_values(output: Tensor) -> str:
    """The values as a flat JSON array; not-a-number and infinities as Triton's clients read them."""
    if output.datatype in _NO_JSON:
        raise ServerError(
            f"sending {output.datatype} data via JSON is not supported. Please use the binary data format for output"
        )
    array = output.array.reshape(-1)
    return encode_list(array_values(output), floating=array.dtype.kind == "f" and not bool(np.isfinite(array).all()))


def array_values(output: Tensor) -> list[Any]:
    """The values as Python objects, flat; of BYTES as text."""
    array = output.array.reshape(-1)
    if array.dtype.kind != "O":
        values: list[Any] = array.tolist()
        return values
    try:
        return [item.decode() if isinstance(item, bytes) else str(item) for item in array]
    except UnicodeDecodeError:
        raise ServerError(
            f"output '{output.name}' holds bytes that are no UTF-8 text: ask for it with 'binary_data': true"
        ) from None


def encode_list(values: list[Any], *, floating: bool) -> str:
    """JSON. floating: there may be numbers that JSON does not have."""
    return json.dumps(values, separators=(",", ":")) if floating else msgspec.json.encode(values).decode()
