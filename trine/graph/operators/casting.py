"""Conversions between element types."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from trine.graph.dtypes import DType, from_onnx, to_numpy, to_torch
from trine.graph.operators.registry import operator

_EIGHT_BITS = {DType.FLOAT8E4M3FN, DType.FLOAT8E4M3FNUZ, DType.FLOAT8E5M2, DType.FLOAT8E5M2FNUZ}


@operator("Cast")
def cast(x: Any, *, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    """Floats are cut towards zero, integers wrap; `saturate` is about float8, `round_mode` about float8e8m0."""
    dtype = from_onnx(to)
    if dtype is None:
        raise TypeError(f"Cast to ONNX type {to} is not supported")
    if dtype is DType.STRING:
        return _to_strings(x)
    if isinstance(x, np.ndarray):
        return _from_strings(x, dtype)
    if dtype in _EIGHT_BITS:
        return to_float8(x, dtype, bool(saturate))
    if dtype is DType.FLOAT8E8M0:
        return _to_e8m0(x.float(), round_mode, bool(saturate))
    if dtype in (DType.INT4, DType.UINT4):
        return _to_four_bits(x, dtype)
    if (
        x.is_floating_point()
        and not dtype.is_float
        and dtype is not DType.BOOL
        and not dtype.value.startswith("complex")
    ):
        wide = x.to(torch.float64) if x.dtype.itemsize == 1 else x
        # numpy and C agree on numbers in range; out of it nothing is defined, but nothing may crash either.
        return wide.to(torch.int64).to(dtype.torch) if dtype is not DType.UINT64 else _to_uint64(wide)
    return x.to(dtype.torch)


def _to_uint64(x: Tensor) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(x.double().numpy().astype(np.uint64))


def _to_four_bits(x: Tensor, dtype: DType) -> Tensor:
    """Numbers are cut to integers, and integers keep their lowest four bits."""
    whole = x.to(torch.float32).to(torch.int64) if x.is_floating_point() else x.to(torch.int64)
    low = whole & 15
    return low.to(torch.uint8) if dtype is DType.UINT4 else torch.where(low > 7, low - 16, low).to(torch.int8)


def to_float8(x: Tensor, dtype: DType, saturate: bool) -> Tensor:
    """Nearest, ties to even; out of range the largest number of that sign, or, without `saturate`, infinity or NaN."""
    wide = x.to(torch.float32)
    if not saturate:
        with np.errstate(all="ignore"):
            return to_torch(wide.numpy().astype(dtype.numpy))
    limit = float(ml_dtypes.finfo(dtype.numpy).max)
    # Infinity saturates, too; NaN stays what it is.
    return to_torch(torch.clamp(wide, -limit, limit).numpy().astype(dtype.numpy))


def _to_e8m0(x: Tensor, round_mode: str, saturate: bool) -> Tensor:
    """A power of two of a number's magnitude, by its exponent: up, down, or to the nearest."""
    mantissa, exponent = torch.frexp(x.abs())  # x = mantissa 2^exponent, mantissa in [0.5, 1)
    exponent = exponent - 1
    fraction = mantissa * 2
    up = {"up": fraction > 1, "down": torch.zeros_like(x, dtype=torch.bool), "nearest": fraction >= 1.5}[round_mode]
    biased = exponent + up.to(exponent.dtype) + 127
    too_big = biased > 254
    biased = biased.clamp(0, 254)
    biased = torch.where(x == 0, torch.zeros_like(biased), biased)
    special = torch.isnan(x) | ((torch.isinf(x) | too_big) & (not saturate))
    biased = torch.where(torch.isinf(x) & saturate, torch.full_like(biased, 254), biased)
    return torch.where(special, torch.full_like(biased, 255), biased).to(torch.uint8).view(torch.float8_e8m0fnu)


def _to_strings(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x
    array = to_numpy(x)
    return np.array([str(item) for item in array.ravel().tolist()], dtype=object).reshape(array.shape)


def _from_strings(x: Any, dtype: DType) -> Tensor:
    texts = [text.decode() if isinstance(text, bytes) else text for text in x.ravel()]
    kind = np.float64 if dtype.is_float else np.int64
    return to_torch(np.array(texts, dtype=kind).reshape(x.shape)).to(dtype.torch)


@operator("BitCast")
def bit_cast(x: Tensor, *, to: int) -> Tensor:
    """The same bits under another type of the same width."""
    dtype = from_onnx(to)
    if dtype is None or dtype.torch.itemsize != x.dtype.itemsize or dtype in (DType.INT4, DType.UINT4):
        raise TypeError(f"BitCast of {x.dtype} to ONNX type {to} is not supported")
    return x.contiguous().view(dtype.torch)
