"""`pb_utils.Tensor`: a named array that may lie in shared memory, in the interface of Triton's models."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from trine.server.backends.python.memory import Lease
from trine.server.backends.python.stub import dlpack
from trine.server.backends.python.stub.errors import TritonModelException
from trine.server.backends.python.wire import DATATYPE_TO_NUMPY, NUMPY_TO_DATATYPE, Packer, TensorEntry

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
    """The datatype of an array whose type is not in `NUMPY_TO_DATATYPE`: text, or none. TritonModelException."""
    if array.dtype.kind == "U":
        return "BYTES"
    raise TritonModelException(f"numpy's {array.dtype} is no datatype of a tensor: convert it, for example astype()")


class Tensor:
    """A named tensor of a numpy array. Arrays of objects or bytes are strings (BYTES)."""

    __slots__ = ("_array", "_datatype", "_name", "_raw", "_shape", "_size", "_start")

    def __init__(self, name: str, numpy_array: Array) -> None:
        if name == "":
            raise TritonModelException("Tensor name cannot be an empty string.")
        if type(numpy_array) is np.ndarray:
            array = numpy_array
        elif isinstance(numpy_array, np.ndarray | np.generic):
            array = np.asarray(numpy_array)
        else:
            raise TypeError(f"Tensor {name!r}: expected a numpy array, got {type(numpy_array).__name__}")
        dtype = array.dtype
        self._name = name
        self._datatype = NUMPY_TO_DATATYPE.get(dtype.char) or datatype_of(array)
        if not dtype.isnative:
            array = array.astype(dtype.newbyteorder("="))
        self._array: Array | None = array
        self._raw: Any = None  # what holds the tensor's bytes, `_size` of them from `_start` on, if not `_array`
        self._start = self._size = 0
        self._shape = array.shape

    @classmethod
    def _of_entry(cls, entry: TensorEntry, content: Lease | bytearray) -> Tensor:
        """A tensor that lies in `content`; its array is made when somebody asks."""
        tensor = cls.__new__(cls)
        tensor._name, tensor._datatype, tensor._shape, tensor._start, tensor._size = entry
        tensor._array = None
        tensor._raw = content
        return tensor

    @classmethod
    def _of_bytes(cls, name: str, datatype: str, shape: tuple[int, ...], content: Array) -> Tensor:
        tensor = cls.__new__(cls)
        tensor._name, tensor._datatype, tensor._shape = name, datatype, shape
        tensor._array, tensor._raw = None, content
        tensor._start, tensor._size = 0, content.nbytes
        return tensor

    def _bytes(self) -> Array:
        """The bytes of a tensor that has no array."""
        return np.ndarray((self._size,), np.uint8, self._raw if self._size else b"", self._start if self._size else 0)

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
            if self._datatype == "BF16":
                raise TritonModelException("numpy has no BF16: use to_dlpack() or from_dlpack of your framework")
            if self._datatype == "BYTES":
                self._array = split_strings(self._bytes()).reshape(self._shape)
            elif self._size:
                self._array = np.ndarray(self._shape, DATATYPE_TO_NUMPY[self._datatype], self._raw, self._start)
            else:
                self._array = np.empty(self._shape, DATATYPE_TO_NUMPY[self._datatype])
        return self._array

    def to_dlpack(self) -> Any:
        """A DLPack capsule of the tensor, without a copy."""
        if self._datatype == "BYTES":
            raise TritonModelException("DLPack does not have support for string tensors.")
        content = self._array if self._array is not None else self._bytes()
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

    def _pack(self, packer: Packer) -> TensorEntry:
        """Add the tensor to a message."""
        array = self._array
        if array is None or (self._datatype == "BYTES" and self._raw is not None):
            return packer.add(self._name, self._datatype, self._shape, self._bytes())
        if self._datatype == "BYTES":
            return packer.add(self._name, "BYTES", self._shape, join_strings(array))
        return packer.add(self._name, self._datatype, self._shape, array)


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
