"""The product in front of a SwiGLU activation and the activation: one kernel for few and for many rows, else two."""

from __future__ import annotations

import torch

from trine.kernels.fp8 import Fp8Weight, RowToNorm, StoredRows
from trine.kernels.triton.activation import silu_mul
from trine.kernels.triton.device import hopper_kernels
from trine.kernels.triton.small_linear import is_ours, linear, of_one_row, small_gated_linear, streams

FUSED_ROWS = 1024
"""Rows from which on there are several tiles for each multiprocessor; with fewer the library's choice of tiles pays,
but where ours keep the multiprocessors busy, or weights are what takes time."""

FULL_ROWS = range(104, 129)
FULL = ((512, 0.84), (FUSED_ROWS - 1, 0.9))
"""The least share of the multiprocessors' time that is to be used, up to so many rows."""


def fused(x: StoredRows, weight: torch.Tensor | Fp8Weight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """silu(gate) * up of the product, [T, I], by one kernel; None where there is none for it."""
    if bias is not None or x.shape[0] < FULL_ROWS.start:
        return None
    hopper = hopper_kernels(x.device, "hopper_gated")
    if hopper is None or not hopper.supports(x, weight):
        return None
    num_rows, outputs = x.shape[0], weight.shape[0] // 2
    full = next((share for rows, share in FULL if num_rows <= rows), 0.0)
    if num_rows not in FULL_ROWS and hopper.utilization(num_rows, outputs, x.device) < full:
        return None
    y: torch.Tensor = hopper.gated_linear(x, weight)
    return y


def linear_silu_mul(
    x: torch.Tensor | RowToNorm, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`silu_mul(linear(x, weight, bias))`: x [T, K], weight [2I, K] (gate, then up) give [T, I]."""
    one = of_one_row(x, weight)
    if one is not None and bias is None:
        product: torch.Tensor = one.register_gated_linear(x, weight)
        return product
    if isinstance(x, RowToNorm):
        return silu_mul(linear(x, weight, bias))
    stream = streams(x, weight) if bias is None else None
    if stream is not None and stream.can_stream_pairs(weight, weight.shape[0] // 2):
        streamed: torch.Tensor = stream.stream_gated_linear(x, weight)
        return streamed
    if bias is None and x.shape[0] == 1 and is_ours(x, weight):
        return small_gated_linear(x, weight)
    y = fused(x, weight, bias)
    return silu_mul(linear(x, weight, bias)) if y is None else y
