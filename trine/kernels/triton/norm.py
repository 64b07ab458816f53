"""Normalisation of rows. Bound by memory: each row is read once and written once, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import early_launch, next_power_of_2, wait_for_inputs
from trine.kernels.triton.launch import launch


@triton.jit
def sum_of_parts(row_ptr, part_stride, columns, inside, parts: tl.constexpr):
    """Columns of a row that is the sum of `parts` rows, as float32."""
    x = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, parts):
        x += tl.load(row_ptr + part * part_stride + columns, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, x_stride, part_stride, residual_stride, size, eps,
    add: tl.constexpr, parts: tl.constexpr, settled: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """y = norm(x), or with `add`: residual += x, then y = norm(residual). The sum is rounded before it is normed.

    A `settled` residual is complete before the kernel in front is, and read while that runs.
    """
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
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(y_ptr + row * size + columns, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, x_stride, size, eps, block: tl.constexpr, early: tl.constexpr
):
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < size
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / size, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = centred * scale * weight + bias
    tl.store(y_ptr + row * size + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """X as [rows, size] whose elements lie side by side in each row."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def as_parts(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """The first of the parts of x [P, T, H] that are to be added to `residual` [T, H], and their number; without
    parts x as rows, and 1. Parts come from `stream_parts` and `in_parts`, which let the kernel behind start when all
    before them are done: then the residual is settled.
    """
    if residual is None or x.dim() < 3:
        return _rows(x), 1
    return x[0], x.shape[0]


def _warps(block: int) -> int:
    """Warps for one row: about 16 elements a thread, so that a thread has several 16-byte loads in flight."""
    return min(max(block // (32 * 16), 1), 16)


def _launch_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows, parts = as_parts(x, residual)
    num_rows, size = rows.shape
    target = rows if residual is None else residual
    y = torch.empty((num_rows, size), dtype=target.dtype, device=x.device)
    block = next_power_of_2(size)
    if num_rows:
        launch(
            _rms_norm_kernel,
            (num_rows,),
            rows,
            target,
            weight,
            y,
            rows.stride(0),
            x.stride(0),
            target.stride(0),
            size,
            eps,
            add=residual is not None,
            parts=parts,
            settled=x.dim() == 3 and residual is not None,
            block=block,
            num_warps=_warps(block),
            **early_launch(x.device),
        )
    return y.view(x.shape if residual is None else residual.shape)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension of x [..., H] with weight [H]."""
    return _launch_rms_norm(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x [T, H], or parts [P, T, H] that add up to it, to `residual` [T, H] in place; returns the sum's RMS norm."""
    if residual.shape != x.shape[-2:] or residual.stride(-1) != 1:
        raise ValueError(f"residual {tuple(residual.shape)} must be like x {tuple(x.shape)}, rows contiguous")
    return _launch_rms_norm(x, residual, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last dimension of x [..., H] with weight and bias [H]."""
    rows = _rows(x)
    num_rows, size = rows.shape
    y = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    block = next_power_of_2(size)
    if num_rows:
        launch(
            _layer_norm_kernel,
            (num_rows,),
            rows,
            weight,
            bias,
            y,
            rows.stride(0),
            size,
            eps,
            block=block,
            num_warps=_warps(block),
            **early_launch(x.device),
        )
    return y.view(x.shape)
