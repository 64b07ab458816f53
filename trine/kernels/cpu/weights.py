"""Weights in the native library's layout."""

from __future__ import annotations

import ctypes
import weakref

import torch

from trine.core.errors import InsufficientMemoryError
from trine.kernels.cpu.native import load

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
GROUP = 128  # neighbours in k that share a scale of an int8 weight


class PackedWeight:
    """A linear layer's weight [N, K] cut into panels of 16 rows (csrc/runtime.h), in memory of the library.

    `dtype` is torch.int8 for weights rounded to integers. `handle` is the library's own record of it.
    """

    __slots__ = ("__weakref__", "columns", "dtype", "handle", "nbytes", "rows")

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, group: int = 0) -> None:
        library = _library()
        handle = library.trine_weight_new(rows, columns, DTYPES[dtype], group)
        if not handle:
            raise InsufficientMemoryError(
                f"no memory for a weight of {rows} x {columns} {str(dtype).removeprefix('torch.')}: "
                "use a smaller model, or quantization=int8"
            )
        self.handle: int = handle
        self.rows, self.columns, self.dtype = rows, columns, dtype
        self.nbytes: int = library.trine_weight_bytes(handle)
        weakref.finalize(self, library.trine_weight_delete, handle)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.columns))

    def __repr__(self) -> str:
        return f"PackedWeight({self.rows} x {self.columns}, {self.dtype})"

    def unpack(self) -> torch.Tensor:
        """The weight as it counts in products: [N, K], integers times their scales in float32."""
        dtype = torch.float32 if self.dtype == torch.int8 else self.dtype
        out = torch.empty(self.rows, self.columns, dtype=dtype)
        ids = torch.arange(self.rows)
        _library().trine_embedding(self.handle, ids.data_ptr(), out.data_ptr(), self.rows, DTYPES[dtype])
        return out


def _library() -> ctypes.CDLL:
    library, status = load()
    if library is None:
        raise RuntimeError(f"the native CPU kernels are not there: {status}")
    return library


def pack_weight(weight: torch.Tensor) -> PackedWeight:
    """Copy `weight` [N, K] (float32, bfloat16, float16) into the library's layout; it is exact."""
    return _pack(weight, weight.dtype, 0)


def pack_int8(weight: torch.Tensor, group_size: int = GROUP) -> PackedWeight:
    """Round `weight` [N, K] to 8-bit integers, symmetrically, with a bfloat16 scale for each `group_size` neighbours.

    group_size is a multiple of 64, at most 512.
    """
    if group_size % 64 or not 64 <= group_size <= 512:
        raise ValueError(f"group_size={group_size}: it must be a multiple of 64 from 64 to 512")
    return _pack(weight, torch.int8, group_size)


def _pack(weight: torch.Tensor, dtype: torch.dtype, group: int) -> PackedWeight:
    rows, columns = weight.shape
    source = weight.detach().contiguous()
    packed = PackedWeight(rows, columns, dtype, group)
    _library().trine_weight_pack(packed.handle, source.data_ptr(), DTYPES[source.dtype])
    return packed
