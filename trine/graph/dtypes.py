"""Element types: ONNX's names for them, and how torch and NumPy store each.

torch has no 4-bit arithmetic: int4 is stored a number a byte in int8, uint4 in uint8. Strings are NumPy object arrays,
which torch never sees.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import ml_dtypes
import numpy as np
import torch


class DType(StrEnum):
    """An element type; the value is its NumPy name."""

    FLOAT32 = "float32"
    UINT8 = "uint8"
    INT8 = "int8"
    UINT16 = "uint16"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    STRING = "string"
    BOOL = "bool"
    FLOAT16 = "float16"
    FLOAT64 = "float64"
    UINT32 = "uint32"
    UINT64 = "uint64"
    COMPLEX64 = "complex64"
    COMPLEX128 = "complex128"
    BFLOAT16 = "bfloat16"
    FLOAT8E4M3FN = "float8_e4m3fn"
    FLOAT8E4M3FNUZ = "float8_e4m3fnuz"
    FLOAT8E5M2 = "float8_e5m2"
    FLOAT8E5M2FNUZ = "float8_e5m2fnuz"
    UINT4 = "uint4"
    INT4 = "int4"
    FLOAT8E8M0 = "float8_e8m0fnu"

    @property
    def torch(self) -> torch.dtype:
        """What stores it; KeyError for strings."""
        return _TORCH[self]

    @property
    def numpy(self) -> np.dtype[Any]:
        return _NUMPY[self]

    @property
    def is_float(self) -> bool:
        return "float" in self.value

    @property
    def bits(self) -> int:
        """Of one element in a file."""
        return 4 if self in _PACKED else self.numpy.itemsize * 8


_TORCH: dict[DType, torch.dtype] = {
    dtype: getattr(torch, dtype.value) for dtype in DType if dtype not in (DType.STRING, DType.UINT4, DType.INT4)
} | {DType.UINT4: torch.uint8, DType.INT4: torch.int8}

_NUMPY: dict[DType, np.dtype[Any]] = {
    dtype: np.dtype(
        object
        if dtype is DType.STRING
        else getattr(ml_dtypes, dtype.value, None) or getattr(np, dtype.value, dtype.value)
    )
    for dtype in DType
}

_PACKED = {DType.UINT4, DType.INT4}

_ONNX = [None, *list(DType)]
"""By ONNX's number, from 1 on; 23 is float4e2m1, which has no place here, and 24 float8e8m0."""

FROM_TORCH = {stored: dtype for dtype, stored in _TORCH.items() if dtype not in _PACKED}


def from_onnx(number: int) -> DType | None:
    """The type that ONNX's TensorProto.DataType `number` means; None for one that Trine can't hold."""
    if number == 24:
        return DType.FLOAT8E8M0
    return _ONNX[number] if 0 < number < 23 else None


def to_onnx(dtype: DType) -> int:
    return 24 if dtype is DType.FLOAT8E8M0 else _ONNX.index(dtype)


def to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor over the array's memory where the dtypes allow it, else over a copy; never for strings."""
    array = np.asarray(array)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")
    dtype = from_numpy(array.dtype)
    if dtype in _PACKED:
        return torch.from_numpy(array.astype(np.int8 if dtype is DType.INT4 else np.uint8))
    if array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8")):
        bits = torch.from_numpy(array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8))
        return bits.view(dtype.torch)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor, dtype: DType | None = None) -> np.ndarray[Any, Any]:
    """The tensor as an array; `dtype` where it is not what torch says (int4, uint4)."""
    tensor = tensor.detach().cpu()
    actual = FROM_TORCH[tensor.dtype]
    if actual is DType.BFLOAT16:
        return tensor.contiguous().view(torch.uint16).numpy().view(actual.numpy)
    if actual.value.startswith("float8"):
        return tensor.contiguous().view(torch.uint8).numpy().view(actual.numpy)
    array = tensor.numpy()
    return array.astype(dtype.numpy) if dtype in _PACKED else array


def from_numpy(dtype: np.dtype[Any]) -> DType:
    """The type of an array; TypeError for one that ONNX does not know."""
    for candidate, known in _NUMPY.items():
        if known == dtype:
            return candidate
    if dtype.kind in "US":
        return DType.STRING
    raise TypeError(f"arrays of {dtype} have no counterpart in ONNX")
