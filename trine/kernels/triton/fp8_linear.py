"""Matrix products of 2 to 64 rows with float8 weights, at the speed that weights stream from memory.

Roofline: N * K bytes of weights are read once; at 64 rows the tensor cores need a tenth of that time. So what counts is
bytes in flight: a tile of 64 outputs goes through one program with its whole K, several blocks ahead, as many as fit
where there are fewer tiles than multiprocessors. The weights are the left operand, as the tensor cores take 64 rows on
that side and as few as 8 on the other. The first blocks are asked into the card's cache before
the kernel in front has finished, since weights don't depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from trine.kernels.fp8 import Fp8Rows, Fp8Weight
from trine.kernels.triton.device import cdiv, early_launch, next_power_of_2, num_multiprocessors, wait_for_inputs
from trine.kernels.triton.launch import launch

MAX_ROWS = 64


@dataclass(frozen=True, slots=True)
class Fp8Tuning:
    """The free choices of the kernel."""

    outputs_block: int = 64
    k_block: int = 256
    num_warps: int = 4
    num_stages: int = 4


def _tuning(outputs: int, num_rows: int, device: torch.device) -> Fp8Tuning:
    """Deeper rings for fewer programs than multiprocessors, as far as the memory of one goes."""
    if outputs > 64 * num_multiprocessors(device):
        return Fp8Tuning(num_stages=4) if num_rows <= 32 else Fp8Tuning(k_block=128, num_stages=6)
    return Fp8Tuning(num_stages=6 if num_rows <= 32 else 5)


@triton.jit
def _ask_ahead(pointers):
    """Bring the lines at `pointers` into the card's cache, waiting for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, False, 1
    )


@triton.jit
def _fp8_linear_kernel(
    x_ptr, x_scales_ptr, weight_ptr, weight_scales_ptr, bias_ptr, y_ptr,
    num_rows, inputs, outputs, weight_stride, groups,
    has_bias: tl.constexpr, rows_block: tl.constexpr, outputs_block: tl.constexpr, k_block: tl.constexpr,
    num_stages: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program (i, j): outputs i * outputs_block on, of rows j * rows_block on."""
    numbers = tl.program_id(0) * outputs_block + tl.arange(0, outputs_block)
    present = numbers < outputs
    weight_row_ptr = weight_ptr + tl.where(present, numbers, 0).to(tl.int64)[:, None] * weight_stride
    if early:
        ahead = tl.arange(0, 8) * 128
        _ask_ahead(weight_row_ptr + tl.minimum(ahead, inputs - 1)[None, :])
    wait_for_inputs(early)
    rows = tl.program_id(1) * rows_block + tl.arange(0, rows_block)
    x_row_ptr = x_ptr + tl.minimum(rows, num_rows - 1)[:, None] * inputs
    columns = tl.arange(0, k_block)
    there = rows < num_rows
    acc = tl.zeros([outputs_block, rows_block], tl.float32)
    for start in tl.range(0, inputs, k_block, num_stages=num_stages):
        inside = (start + columns < inputs)[None, :]
        weight = tl.load(weight_row_ptr + start + columns[None, :], mask=inside, other=0.0)
        x = tl.load(x_row_ptr + start + columns[None, :], mask=inside, other=0.0)
        scales = tl.load(x_scales_ptr + rows * groups + start * groups // inputs, mask=there, other=0.0)
        acc += tl.dot(weight, tl.trans(x)) * scales[None, :]
    acc *= tl.load(weight_scales_ptr + numbers, mask=present, other=0.0)[:, None]
    if has_bias:
        acc += tl.load(bias_ptr + numbers, mask=present, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(acc).to(y_ptr.dtype.element_ty)
    place = y_ptr + rows.to(tl.int64)[:, None] * outputs + numbers[None, :]
    tl.store(place, y, mask=there[:, None] & present[None, :])


def fp8_linear(
    x: Fp8Rows,
    weight: Fp8Weight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tuning: Fp8Tuning | None = None,
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of the dtype x had, or `out_dtype`.

    Nothing may write to the weight in the kernels just before: with early launch it is read while they run. Where x has
    groups of columns they are whole blocks of the kernel's.
    """
    num_rows, inputs = x.shape
    outputs = weight.shape[0]
    y = torch.empty((num_rows, outputs), dtype=out_dtype or x.dtype, device=x.values.device)
    tuning = tuning or _tuning(outputs, num_rows, y.device)
    rows_block = min(max(next_power_of_2(num_rows), 16), 128)
    grid = (cdiv(outputs, tuning.outputs_block), cdiv(num_rows, rows_block))
    launch(
        _fp8_linear_kernel,
        grid,
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        bias,
        y,
        num_rows,
        inputs,
        outputs,
        weight.values.stride(0),
        x.scales.shape[1],
        has_bias=bias is not None,
        rows_block=rows_block,
        outputs_block=tuning.outputs_block,
        k_block=tuning.k_block,
        num_stages=tuning.num_stages,
        num_warps=tuning.num_warps,
        **early_launch(y.device),
    )
    return y
