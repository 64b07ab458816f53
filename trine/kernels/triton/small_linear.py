"""Matrix products of one to four rows, at the speed that weights stream from memory.

Roofline: N * K weights are read once, N * K * rows multiplications are far below what the card can do; everything else
is small. So a program's whole job is to have many bytes in flight: it asks for a tile of `row_block` weight rows by
`k_block` columns at once, and with programmatic dependent launch it asks before the kernel in front of it has finished
(weights don't depend on it), which hides the launch and the tail of one product behind the next.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl

from trine.kernels.triton.device import early_launch, wait_for_inputs

MAX_ROWS = 4
STREAMED_ROWS = 32
STREAMED_BYTES = 16 << 20  # smaller weights are latency, not bandwidth
_TILE_BYTES = 32768  # of weights that a program has in flight


@triton.jit
def _accumulate(
    acc, weight, x_ptr, x_stride, columns, inputs, num_rows: tl.constexpr, rows_block: tl.constexpr
):  # fmt: skip
    """acc [rows_block, n] plus the dot products of weight's rows [n, k] with columns `columns` of x's rows."""
    numbers = tl.arange(0, rows_block)
    weight = weight.to(tl.float32)
    for row in tl.static_range(num_rows):
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < inputs, other=0.0).to(tl.float32)
        products = tl.sum(weight * x[None, :], 1)
        acc += tl.where((numbers == row)[:, None], products[None, :], 0.0)
    return acc


@triton.jit
def _small_linear_kernel(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, y_ptr, inputs, outputs, x_stride, weight_stride, y_stride,
    num_rows: tl.constexpr, rows_block: tl.constexpr, has_scales: tl.constexpr, has_bias: tl.constexpr,
    early: tl.constexpr, row_block: tl.constexpr, k_block: tl.constexpr,
):  # fmt: skip
    """Program i: outputs i * row_block to (i + 1) * row_block of every row of x."""
    weight_rows = tl.program_id(0) * row_block + tl.arange(0, row_block)
    present = weight_rows < outputs
    weight_row_ptr = weight_ptr + weight_rows.to(tl.int64)[:, None] * weight_stride
    columns = tl.arange(0, k_block)
    weight = tl.load(weight_row_ptr + columns[None, :], mask=present[:, None] & (columns < inputs)[None, :], other=0.0)
    wait_for_inputs(early)
    acc = tl.zeros([rows_block, row_block], tl.float32)
    acc = _accumulate(acc, weight, x_ptr, x_stride, columns, inputs, num_rows, rows_block)
    for start in range(k_block, inputs, k_block):
        columns = start + tl.arange(0, k_block)
        weight = tl.load(
            weight_row_ptr + columns[None, :], mask=present[:, None] & (columns < inputs)[None, :], other=0.0
        )
        acc = _accumulate(acc, weight, x_ptr, x_stride, columns, inputs, num_rows, rows_block)
    if has_scales:
        acc *= tl.load(scales_ptr + weight_rows, mask=present, other=0.0).to(tl.float32)[None, :]
    if has_bias:
        acc += tl.load(bias_ptr + weight_rows, mask=present, other=0.0).to(tl.float32)[None, :]
    numbers = tl.arange(0, rows_block)
    y_mask = (numbers < num_rows)[:, None] & present[None, :]
    tl.store(y_ptr + numbers[:, None] * y_stride + weight_rows[None, :], acc.to(y_ptr.dtype.element_ty), mask=y_mask)


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, or `out_dtype`.

    T is 1 to MAX_ROWS. weight is of x's dtype, or float8 with `scales` [N] float32, one a row. Nothing may write to it
    in the kernels just before: with early launch it is read while they run.
    """
    num_rows, inputs = x.shape
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"{num_rows} rows: small_linear takes 1 to {MAX_ROWS}")
    outputs = weight.shape[0]
    y = torch.empty((num_rows, outputs), dtype=out_dtype or x.dtype, device=x.device)
    k_block = min(triton.next_power_of_2(inputs), 4096)
    row_block = min(_TILE_BYTES // weight.itemsize // k_block, 8)
    _small_linear_kernel[(triton.cdiv(outputs, row_block),)](
        x,
        weight,
        scales,
        bias,
        y,
        inputs,
        outputs,
        x.stride(0),
        weight.stride(0),
        y.stride(0),
        num_rows=num_rows,
        rows_block=triton.next_power_of_2(num_rows),
        has_scales=scales is not None,
        has_bias=bias is not None,
        row_block=row_block,
        k_block=k_block,
        num_warps=4,
        **early_launch(x.device),
    )
    return y


@cache
def _stream(device: torch.device) -> ModuleType | None:
    """The kernel for 2 to 32 rows, on a Hopper GPU with a Triton that has Gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        return import_module("trine.kernels.triton.stream_linear")
    except ImportError:
        return None


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, or `out_dtype`.

    Few rows of a 16-bit type are ours: the library reaches less of the memory's speed there. All else is the library's.
    """
    rows = x.shape[0]
    if x.itemsize == 2 and weight.dtype == x.dtype and weight.stride(1) == 1:
        if rows == 1:
            return small_linear(x, weight, bias, out_dtype=out_dtype)
        if rows <= STREAMED_ROWS and weight.nbytes >= STREAMED_BYTES:
            stream = _stream(x.device)
            if stream is not None and stream.can_stream(x, weight):
                y: torch.Tensor = stream.stream_linear(x, weight, bias, out_dtype)
                return y
    if x.is_cuda and x.itemsize == 2 and out_dtype == torch.float32 and bias is None:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    y = F.linear(x, weight, bias)
    return y if out_dtype is None else y.to(out_dtype)
