"""Layer norm with the sum before it and the rounding after it. Bound by memory: every row is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.graph.gpu.kernels.epilogue import rounded
from trine.kernels import fp8
from trine.kernels.triton.device import early_launch, wait_for_inputs


@triton.jit
def _add_norm_kernel(
    x_ptr, residual_ptr, scale_ptr, bias_ptr, y_ptr, sum_ptr, rounded_ptr, size, epsilon, inverse_scale,
    has_residual: tl.constexpr, has_bias: tl.constexpr, has_y: tl.constexpr, has_sum: tl.constexpr,
    has_rounded: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """A program a row. Norm and sum are rounded to the element type; the statistics see the rounded sum."""
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, block)
    inside = columns < size
    scale = tl.load(scale_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(early)
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    if has_residual:
        x += tl.load(residual_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    if has_sum:
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row + columns, total, mask=inside)
        x = total.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / size, 0.0)
    y = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / size + epsilon)) * scale
    if has_bias:
        y += bias
    if has_y:
        tl.store(y_ptr + row + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    if has_rounded:
        y = rounded(y, inverse_scale)
        tl.store(rounded_ptr + row + columns, y.to(rounded_ptr.dtype.element_ty), mask=inside)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    epsilon: float,
    wanted: tuple[bool, bool, bool],
    out_scale: float = 0.0,
    num_warps: int = 2,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Of contiguous x and residual [..., H]: the norm of their sum, the sum, the norm in float8; those `wanted`."""
    size = x.shape[-1]
    rows = x.numel() // size if size else 0
    has_y, has_sum, has_rounded = wanted
    y = torch.empty_like(x) if has_y else None
    total = torch.empty_like(x) if has_sum else None
    low = torch.empty(x.shape, dtype=fp8.DTYPE, device=x.device) if has_rounded else None
    block = triton.next_power_of_2(size)
    if rows:
        _add_norm_kernel[(rows,)](
            x, residual, scale, bias, y, total, low, size, epsilon, 1.0 / out_scale if out_scale else 0.0,
            has_residual=residual is not None, has_bias=bias is not None,
            has_y=has_y, has_sum=has_sum, has_rounded=has_rounded,
            block=block, num_warps=num_warps, **early_launch(x.device),
        )  # fmt: skip
    return y, total, low


@triton.jit
def _quantize_kernel(x_ptr, y_ptr, count, inverse_scale, block: tl.constexpr, early: tl.constexpr):
    wait_for_inputs(early)
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < count
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, rounded(x, inverse_scale).to(y_ptr.dtype.element_ty), mask=inside)


def quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Contiguous x over `scale` in float8."""
    y = torch.empty(x.shape, dtype=fp8.DTYPE, device=x.device)
    if x.numel():
        _quantize_kernel[(triton.cdiv(x.numel(), 2048),)](
            x, y, x.numel(), 1.0 / scale, block=2048, num_warps=4, **early_launch(x.device)
        )
    return y
