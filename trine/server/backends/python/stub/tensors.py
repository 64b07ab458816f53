"""`pb_utils.Tensor`: a named array that may lie in shared memory, in the interface of Triton's models."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from trine.server.backends.python.memory import Lease
from trine.server.backends.python.stub import dlpack
from trine.server.backends.python.stub.errors import TritonModelException
from trine.server.backends.python.wire import DATATYPE_TO_NUMPY, NUMPY_TO_DATATYPE, TensorEntry

Array = np.ndarray[Any, Any]

TYPE_NUMBERS = {
    "BOOL": 1,
    "UINT8": 2,
    "UINT16": 3,
    "UINT32": 4,
    "UINT64": 5,
    "INT8": 6,
    "INT16": 7,
    "INT32": 8,
    "INT64": 9,
    "FP16": 10,
    "FP32": 11,
    "FP64": 12,
    "BYTES": 13,
    "BF16": 14,
}


def datatype_of(array: Array) -> str:
    datatype = NUMPY_TO_DATATYPE.get(array.dtype.char)
    if datatype is None:
        if array.dtype.kind == "U":
            return "BYTES"
        raise TritonModelException(
            f"numpy's {array.dtype} is no datatype of a tensor: convert it, for example astype()"
        )
    return datatype


class Tensor:
    """A named tensor of a numpy array. Arrays of objects or bytes are strings (BYTES)."""

    __slots__ = ("_array", "_bytes", "_datatype", "_name", "_shape")

    def __init__(self, name: str, numpy_array: Array) -> None:
        if name == "":
            raise TritonModelException("Tensor name cannot be an empty string.")
        if not isinstance(numpy_array, np.ndarray | np.generic):
            raise TypeError(f"Tensor {name!r}: expected a numpy array, got {type(numpy_array).__name__}")
        array = np.asarray(numpy_array)
        self._name = name
        self._datatype = datatype_of(array)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        self._array: Array | None = array
        self._bytes: Array | None = None
        self._shape = array.shape

    @classmethod
    def _of_entry(cls, entry: TensorEntry, content: Lease | None) -> Tensor:
        """A tensor that lies in `content`; its array is made when somebody asks."""
        tensor = cls.__new__(cls)
        tensor._name, tensor._datatype, tensor._shape, start, size = entry
        tensor._array = None
        tensor._bytes = content[start : start + size] if content is not None and size else np.empty(0, np.uint8)
        return tensor

    @classmethod
    def _of_bytes(cls, name: str, datatype: str, shape: tuple[int, ...], content: Array) -> Tensor:
        tensor = cls.__new__(cls)
        tensor._name, tensor._datatype, tensor._shape = name, datatype, shape
        tensor._array, tensor._bytes = None, content
        return tensor

    def name(self) -> str:
        return self._name

    def shape(self) -> list[int]:
        return list(self._shape)

    def triton_dtype(self) -> int:
        """Triton's number of the datatype."""
        return TYPE_NUMBERS[self._datatype]

    def is_cpu(self) -> bool:
        return True

    def as_numpy(self) -> Array:
        """The tensor as an array, without a copy of numbers; strings are `bytes` objects."""
        if self._array is None:
            assert self._bytes is not None
            if self._datatype == "BF16":
                raise TritonModelException("numpy has no BF16: use to_dlpack() or from_dlpack of your framework")
            if self._datatype == "BYTES":
                self._array = split_strings(self._bytes).reshape(self._shape)
            else:
                self._array = np.ndarray(self._shape, DATATYPE_TO_NUMPY[self._datatype], self._bytes)
        return self._array

    def to_dlpack(self) -> Any:
        """A DLPack capsule of the tensor, without a copy."""
        if self._datatype == "BYTES":
            raise TritonModelException("DLPack does not have support for string tensors.")
        content = self._array if self._array is not None else self._bytes
        assert content is not None
        return dlpack.export(np.ascontiguousarray(content), self._datatype, self._shape)

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        return self.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CPU, 0

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        """A tensor of a DLPack capsule, or of an object with `__dlpack__`; on the CPU without a copy."""
        if name == "":
            raise TritonModelException("Tensor name cannot be an empty string.")
        datatype, shape, content = dlpack.load(tensor)
        return Tensor._of_bytes(name, datatype, shape, content)

    def _content(self) -> tuple[str, str, tuple[int, ...], Any]:
        """What `wire.write_tensors` takes."""
        if self._datatype == "BYTES":
            if self._bytes is None:
                assert self._array is not None
                self._bytes = np.frombuffer(join_strings(self._array), np.uint8)
            return self._name, "BYTES", self._shape, self._bytes
        content = self._bytes if self._array is None else self._array
        return self._name, self._datatype, self._shape, content


def split_strings(content: Array) -> Array:
    """The strings in their binary form (4-byte length, bytes, …) as a one-dimensional array of `bytes`."""
    data, position, items = content.tobytes(), 0, []
    end = len(data)
    while position < end:
        if position + 4 > end:
            raise TritonModelException("Invalid bytes tensor data: incomplete length field")
        (length,) = struct.unpack_from("<I", data, position)
        position += 4 + length
        if position > end:
            raise TritonModelException("Invalid bytes tensor data: string extends beyond buffer")
        items.append(data[position - length : position])
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def join_strings(array: Array) -> bytes:
    """The binary form of an array of `bytes`; other elements become text in UTF-8."""
    parts: list[bytes] = []
    for item in array.reshape(-1).tolist():
        data = item if isinstance(item, bytes) else str(item).encode()
        parts.append(struct.pack("<I", len(data)))
        parts.append(data)
    return b"".join(parts)
