"""float8 products and the kernels that round activations for them, fused with what makes those.

Rounding is bound by memory: a row is read once and written once, at half the size, with its scale. Where it is fused
with a norm or an activation the plain result is never written at all. Products of many rows are the library's, save
those of some hundred that `parts` takes; those of 2 to 64 rows, where the library reaches a third of the
memory's speed, are `stream_linear`'s on Hopper and `fp8_linear`'s elsewhere. One row is `register_linear`'s on Hopper
and `small_linear`'s elsewhere, which take activations as they are: rounding them would gain nothing there.
"""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl

from trine.kernels import fp8
from trine.kernels.fp8 import Fp8Rows, Fp8Weight, Rows, RowToNorm, StoredRows
from trine.kernels.triton.activation import silu_mul
from trine.kernels.triton.decode_attention import decode_attention_rows
from trine.kernels.triton.device import early_launch, hopper_kernels, next_power_of_2, wait_for_inputs
from trine.kernels.triton.fp8_linear import MAX_ROWS, fp8_linear
from trine.kernels.triton.gated_linear import fused
from trine.kernels.triton.launch import launch
from trine.kernels.triton.norm import as_parts, sum_of_parts
from trine.kernels.triton.small_linear import (
    of_one_row,
    small_gated_linear,
    small_linear,
    small_qkv_linear,
)
from trine.kernels.types import PagedBatch

_ATTENTION_GROUP = 512  # that a group's columns must be a multiple of, for our own products to read them
_GROUP = 1024  # columns that share a scale, where a row has several


def rounds(num_rows: int) -> bool:
    """Whether products of so many rows take them rounded."""
    return num_rows > 1


@triton.jit
def _store_rounded(y, largest, columns, inside, values_row_ptr, scale_ptr):
    """Write a row y [n] float32, whose largest magnitude is known, divided by its scale, and the scale. What is no
    number stays so.
    """
    scale = tl.where(largest == 0.0, 1.0, tl.where(largest < 448e-37, 1e-37, largest / 448.0))
    y = tl.clamp(y * (1.0 / scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values_row_ptr + columns, y.to(values_row_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr, scale)


@triton.jit
def _sum_and_largest(sum_a, largest_a, sum_b, largest_b):
    return sum_a + sum_b, tl.maximum(largest_a, largest_b)


@triton.jit
def _quantize_kernel(
    x_ptr, values_ptr, scales_ptr, x_stride, size, group, block: tl.constexpr, early: tl.constexpr
):  # fmt: skip
    """Program (t, g): group g of row t's columns, `group` of them."""
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < group
    columns += tl.program_id(1) * group
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale_ptr = scales_ptr + row * tl.num_programs(1) + tl.program_id(1)
    _store_rounded(x, tl.max(tl.abs(x), 0), columns, inside, values_ptr + row * size, scale_ptr)


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, values_ptr, scales_ptr, x_stride, part_stride, residual_stride, size, eps,
    add: tl.constexpr, parts: tl.constexpr, settled: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """The norm of x, or with `add` of residual + x, which becomes the residual; rounded as x is, then to float8."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    residual_row = residual_ptr + row * residual_stride + columns
    if settled:
        residual = tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(early)
    x = sum_of_parts(x_ptr + row * x_stride, part_stride, columns, inside, parts)
    if add:
        if not settled:
            residual = tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
        x += residual
        total = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_row, total, mask=inside)
        x = total.to(tl.float32)
    weighed = x * weight
    # both at once: threads wait for each other once
    squares, largest = tl.reduce((x * x, tl.abs(weighed)), 0, _sum_and_largest)
    scale = 1.0 / tl.sqrt(squares / size + eps)
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    y = (weighed * scale).to(dtype).to(tl.float32)
    largest = (largest * scale).to(dtype).to(tl.float32)
    _store_rounded(y, largest, columns, inside, values_ptr + row * size, scales_ptr + row)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr, values_ptr, scales_ptr, row_stride, size, group, block: tl.constexpr, early: tl.constexpr
):  # fmt: skip
    """Program (t, g): group g of row t's columns, `group` of them."""
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < group
    columns += tl.program_id(1) * group
    gate = tl.load(gate_up_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + size + columns, mask=inside, other=0.0).to(tl.float32)
    y = (gate * tl.sigmoid(gate) * up).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    scale_ptr = scales_ptr + row * tl.num_programs(1) + tl.program_id(1)
    _store_rounded(y, tl.max(tl.abs(y), 0), columns, inside, values_ptr + row * size, scale_ptr)


def _empty_rows(x: torch.Tensor, size: int, groups: int = 1) -> Fp8Rows:
    values = torch.empty((x.shape[0], size), dtype=fp8.DTYPE, device=x.device)
    return Fp8Rows(values, torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device), x.dtype)


def _groups(num_rows: int, size: int) -> int:
    """Groups that a row is cut into: where our own product reads them, so many that a program rounds each alone."""
    return size // _GROUP if num_rows <= MAX_ROWS and size % _GROUP == 0 else 1


def _warps(block: int) -> int:
    """Warps for one row: about 16 elements a thread."""
    return min(max(block // (32 * 16), 1), 16)


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def quantize_rows(x: torch.Tensor, groups: int = 1) -> Fp8Rows:
    """Round x [T, K], each of `groups` equal groups of a row's columns by a scale of its own."""
    x = _contiguous_rows(x)
    num_rows, size = x.shape
    rows = _empty_rows(x, size, groups)
    block = next_power_of_2(size // groups)
    if num_rows:
        launch(
            _quantize_kernel, (num_rows, groups),
            x, rows.values, rows.scales, x.stride(0), size, size // groups,
            block=block, num_warps=_warps(block), **early_launch(x.device),
        )  # fmt: skip
    return rows


def _launch_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Fp8Rows:
    first, parts = as_parts(x, residual)
    target = first if residual is None else residual
    rows = _empty_rows(target, target.shape[1])
    block = next_power_of_2(target.shape[1])
    if target.shape[0]:
        launch(
            _rms_norm_kernel, (target.shape[0],),
            first, target, weight, rows.values, rows.scales, first.stride(0), x.stride(0), target.stride(0),
            target.shape[1], eps,
            add=residual is not None, parts=parts, settled=x.dim() == 3 and residual is not None,
            block=block, num_warps=_warps(block), **early_launch(x.device),
        )  # fmt: skip
    return rows


def rms_norm_rows(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Fp8Rows:
    """The RMS norm of x [T, H], rounded."""
    return _launch_rms_norm(x, None, weight, eps)


def add_rms_norm_rows(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Fp8Rows:
    """Add x [T, H], or parts [P, T, H] that add up to it, to `residual` [T, H] in place; the sum's norm, rounded."""
    if residual.shape != x.shape[-2:] or residual.stride(-1) != 1:
        raise ValueError(f"residual {tuple(residual.shape)} must be like x {tuple(x.shape)}, rows contiguous")
    return _launch_rms_norm(x, residual, weight, eps)


def silu_mul_rows(gate_up: torch.Tensor) -> Fp8Rows:
    """silu(gate) * up of gate_up [T, 2I], gate first, rounded: [T, I]."""
    gate_up = _contiguous_rows(gate_up)
    size = gate_up.shape[1] // 2
    groups = _groups(gate_up.shape[0], size)
    rows = _empty_rows(gate_up, size, groups)
    block = next_power_of_2(size // groups)
    if gate_up.shape[0]:
        launch(
            _silu_mul_kernel, (gate_up.shape[0], groups),
            gate_up, rows.values, rows.scales, gate_up.stride(0), size, size // groups,
            block=block, num_warps=_warps(block), **early_launch(gate_up.device),
        )  # fmt: skip
    return rows


def attention_rows(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
) -> Fp8Rows | None:
    """`paged_attention` of q [T, Hq, D], rounded by a scale for the heads of each key-value head, for few rows that a
    product of our own reads; None where it takes two kernels.
    """
    size = q.shape[1] * q.shape[2] // k_cache.shape[1]
    if q.shape[0] > MAX_ROWS or size % _ATTENTION_GROUP:
        return None
    return decode_attention_rows(q, k_cache, v_cache, batch, scale, sliding_window)


def linear(
    x: Rows, weight: Fp8Weight, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, or `out_dtype`."""
    outputs, inputs = weight.shape
    one = of_one_row(x, weight)
    if one is not None:
        return cast(torch.Tensor, one.register_linear(x, weight, bias, out_dtype))
    assert not isinstance(x, RowToNorm), "made for a product that norms it"
    if isinstance(x, torch.Tensor) and x.shape[0] == 1:
        return small_linear(x, weight.values, bias, weight.scales, out_dtype)
    rows = x if isinstance(x, Fp8Rows) else quantize_rows(x)
    stream = _streams(rows, weight)
    if stream is not None:
        return cast(torch.Tensor, stream.stream_linear(rows, weight, bias, out_dtype))
    if 0 < rows.shape[0] <= MAX_ROWS and inputs % 16 == 0:
        return fp8_linear(rows, weight, bias, out_dtype)
    if inputs % 16 or outputs % 16 or not rows.is_cuda:  # what the library does not take
        y = F.linear(rows.dequantize(), weight.dequantize().to(x.dtype), bias)
        return y if out_dtype is None else y.to(out_dtype)
    y = torch._scaled_mm(
        rows.values,
        weight.values.t(),
        scale_a=rows.scales,
        scale_b=weight.scales[None, :],
        bias=bias if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # the only one with scales by row
        use_fast_accum=True,
    )
    return y.to(out_dtype or x.dtype)


def linear_parts(x: Rows, weight: Fp8Weight) -> torch.Tensor | None:
    """`linear` as parts [P, T, N] float32 that add up to it, where that is faster."""
    if not (rounds(x.shape[0]) and x.shape[0] <= MAX_ROWS):
        return None
    assert not isinstance(x, RowToNorm), "one row is never in parts"
    rows = x if isinstance(x, Fp8Rows) else quantize_rows(x)
    stream = _streams(rows, weight)
    if stream is None or not stream.parts_of(x.shape[0], weight):
        return None
    return cast(torch.Tensor, stream.stream_parts(rows, weight))


def linear_silu_mul(x: Rows, weight: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`silu_mul(linear(x, weight, bias))`: x [T, K], weight [2I, K] (gate, then up) give [T, I]."""
    if bias is None:
        one = of_one_row(x, weight)
        if one is not None:
            return cast(torch.Tensor, one.register_gated_linear(x, weight))
        if isinstance(x, torch.Tensor) and x.shape[0] == 1:
            return small_gated_linear(x, weight.values, weight.scales)
    return silu_mul(linear(x, weight, bias))


def linear_silu_mul_rows(x: Rows, weight: Fp8Weight, bias: torch.Tensor | None = None) -> Fp8Rows:
    """`linear_silu_mul`, rounded."""
    assert not isinstance(x, RowToNorm), "one row is not rounded"
    outputs = weight.shape[0] // 2
    stream = _streams(x, weight)
    if bias is None and stream is not None and stream.can_stream_pairs(weight, outputs):
        return quantize_rows(stream.stream_gated_linear(x, weight), _groups(x.shape[0], outputs))
    y = fused(x, weight, bias) if isinstance(x, Fp8Rows) else None
    return silu_mul_rows(linear(x, weight, bias)) if y is None else quantize_rows(y)


def _streams(x: StoredRows, weight: Fp8Weight) -> ModuleType | None:
    """The module whose product is the fastest for few rows, None where it is not or can't be."""
    stream = hopper_kernels(x.device, "stream_linear") if isinstance(x, Fp8Rows) else None
    return stream if stream is not None and stream.can_stream(x, weight) else None


def linear_prepare_qkv(
    x: Rows,
    weight: Fp8Weight,
    bias: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor | None:
    """`prepare_qkv(linear(x, weight, bias), ...)` without head norms, for few rows; None where it takes two kernels."""
    if cos_sin.shape[1] != head_dim:
        return None
    own = (num_heads, num_kv_heads, head_dim, positions, cos_sin, k_cache, v_cache, slots)
    one = of_one_row(x, weight)
    if one is not None:
        return cast(torch.Tensor, one.register_qkv_linear(x, weight, bias, *own))
    if isinstance(x, RowToNorm):
        return None
    if isinstance(x, torch.Tensor):
        return small_qkv_linear(x, weight.values, bias, *own, weight.scales) if x.shape[0] == 1 else None
    stream = _streams(x, weight)
    if stream is None or not stream.can_stream_pairs(weight, head_dim // 2):
        return None
    return cast(torch.Tensor, stream.stream_qkv_linear(x, weight, bias, *own))
