"""Matrix products of one to four rows, at the speed that weights stream from memory.

Roofline: N * K weights are read once, N * K * rows multiplications are far below what the card can do; everything else
is small. So a program's whole job is to have many bytes in flight: it asks for a tile of `row_block` weight rows by
`k_block` columns at once, and with programmatic dependent launch it asks before the kernel in front of it has finished
(weights don't depend on it), which hides the launch and the tail of one product behind the next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 4
_TILE = 16384  # weights that a program has in flight


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
    dependent: tl.constexpr, row_block: tl.constexpr, k_block: tl.constexpr,
):  # fmt: skip
    """Program i: outputs i * row_block to (i + 1) * row_block of every row of x."""
    weight_rows = tl.program_id(0) * row_block + tl.arange(0, row_block)
    present = weight_rows < outputs
    weight_row_ptr = weight_ptr + weight_rows.to(tl.int64)[:, None] * weight_stride
    columns = tl.arange(0, k_block)
    weight = tl.load(weight_row_ptr + columns[None, :], mask=present[:, None] & (columns < inputs)[None, :], other=0.0)
    if dependent:
        gdc_launch_dependents()
        gdc_wait()
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
    *,
    dependent: bool = False,
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, for T of 1 to MAX_ROWS.

    weight is of x's dtype, or float8 with `scales` [N] float32, one a row. `dependent` launches the kernel while the
    one in front of it is still running (Hopper and later); its own reads of x and its writes wait for that one's end.
    """
    num_rows, inputs = x.shape
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"{num_rows} rows: small_linear takes 1 to {MAX_ROWS}")
    outputs = weight.shape[0]
    y = torch.empty((num_rows, outputs), dtype=x.dtype, device=x.device)
    k_block = min(triton.next_power_of_2(inputs), 4096)
    row_block = min(_TILE // k_block, 8)
    options = {"launch_pdl": True} if dependent else {}
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
        dependent=dependent,
        row_block=row_block,
        k_block=k_block,
        num_warps=4,
        **options,
    )
    return y
