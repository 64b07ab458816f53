"""Tensors as the KServe v2 protocol has them: a name, a datatype, a shape, and little-endian bytes or an array.

Either form is made from the other when somebody first asks for it: a tensor that only passes through is never decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from trine.server.errors import ServerError

Array = np.ndarray[Any, Any]

NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
    "BYTES": np.dtype(np.object_),
}
"""Datatype to the array's dtype. BF16 is its 16 bits as unsigned integers; an element of BYTES is `bytes`."""

DATATYPES = {dtype: name for name, dtype in reversed(NUMPY_TYPES.items()) if name != "BF16"}
"""The dtype of an array to its datatype."""


class Tensor:
    """One named tensor. Give `array` or `raw` (bytes-like; the bytes must hold exactly `shape` of `datatype`)."""

    __slots__ = ("_array", "_raw", "datatype", "name", "shape")

    def __init__(
        self,
        name: str,
        datatype: str,
        shape: Sequence[int],
        array: Array | None = None,
        raw: bytes | memoryview | None = None,
    ) -> None:
        self.name = name
        self.datatype = datatype
        self.shape = tuple(shape)
        self._array = array
        self._raw = raw

    @classmethod
    def of(cls, name: str, array: Array) -> Tensor:
        """A tensor of `array`'s own datatype and shape. Text becomes BYTES in UTF-8."""
        if array.dtype.kind in "US":
            array = np.array([_to_bytes(item) for item in array.reshape(-1)], dtype=object).reshape(array.shape)
        datatype = DATATYPES.get(array.dtype.newbyteorder("<"))
        if datatype is None:
            raise ServerError(f"tensor '{name}': no datatype of the protocol for {array.dtype}")
        return cls(name, datatype, array.shape, array)

    @property
    def array(self) -> Array:
        """The values, in `shape`; read-only where they still lie in the request's bytes."""
        if self._array is None:
            assert self._raw is not None
            if self.datatype == "BYTES":
                items = list(split_bytes(self._raw, self.name))
                self._array = np.empty(len(items), dtype=object)
                self._array[:] = items
            else:
                self._array = np.frombuffer(self._raw, dtype=NUMPY_TYPES[self.datatype])
            self._array = self._array.reshape(self.shape)
        return self._array

    @property
    def raw(self) -> bytes | memoryview:
        """The values as the protocol's binary form: little-endian, row-major, no padding."""
        if self._raw is None:
            assert self._array is not None
            if self.datatype == "BYTES":
                self._raw = join_bytes(self._array)
            else:
                array = np.ascontiguousarray(self._array, dtype=NUMPY_TYPES[self.datatype])
                self._raw = array.data.cast("B") if array.size else b""
        return self._raw

    @property
    def is_raw(self) -> bool:
        """Whether the bytes are there already."""
        return self._raw is not None

    @property
    def byte_size(self) -> int:
        """Bytes of the binary form; of BYTES that is not encoded yet, 0."""
        if self._raw is not None:
            return len(self._raw)
        assert self._array is not None
        return 0 if self.datatype == "BYTES" else self._array.nbytes

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def renamed(self, name: str) -> Tensor:
        """The same values under another name; nothing is copied."""
        return Tensor(name, self.datatype, self.shape, self._array, self._raw)

    def reshaped(self, shape: Sequence[int]) -> Tensor:
        """The same values in another shape of as many elements; nothing is copied."""
        array = None if self._array is None else self._array.reshape(shape)
        return Tensor(self.name, self.datatype, shape, array, self._raw)


def split_bytes(raw: bytes | memoryview, name: str) -> Iterator[bytes]:
    """The elements of a BYTES tensor: each a 4-byte little-endian length and that many bytes.

    Raises ServerError, naming the tensor, where a length runs past the end.
    """
    view = memoryview(raw)
    end, position = len(view), 0
    while position < end:
        start = position + 4
        stop = start + int.from_bytes(view[position:start], "little")
        if start > end or stop > end:
            raise ServerError(f"incomplete string data for inference input '{name}': {end - position} bytes are left")
        yield bytes(view[start:stop])
        position = stop


def join_bytes(array: Array) -> bytes:
    """The binary form of an array of `bytes` or `str`."""
    parts: list[bytes] = []
    for item in array.reshape(-1):
        data = _to_bytes(item)
        parts.append(len(data).to_bytes(4, "little"))
        parts.append(data)
    return b"".join(parts)


def _to_bytes(item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    return str(item).encode()
