"""Normalisation of rows. Bound by memory: each row is read once and written once, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import early_launch, wait_for_inputs


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, x_stride, residual_stride, size, eps,
    add: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """y = norm(x), or with `add`: residual += x, then y = norm(residual). The sum is rounded before it is normed."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(early)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if add:
        residual_row = residual_ptr + row * residual_stride + columns
        x += tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
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


def _warps(block: int) -> int:
    """Warps for one row: about 16 elements a thread, so that a thread has several 16-byte loads in flight."""
    return min(max(block // (32 * 16), 1), 16)


def _launch_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows = _rows(x)
    num_rows, size = rows.shape
    y = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    target = rows if residual is None else residual
    block = triton.next_power_of_2(size)
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            rows,
            target,
            weight,
            y,
            rows.stride(0),
            target.stride(0),
            size,
            eps,
            add=residual is not None,
            block=block,
            num_warps=_warps(block),
            **early_launch(x.device),
        )
    return y.view(x.shape)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension of x [..., H] with weight [H]."""
    return _launch_rms_norm(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x [T, H] to `residual` [T, H] in place; returns the sum's RMS norm, one pass over both."""
    if residual.shape != x.shape or residual.stride(-1) != 1:
        raise ValueError(f"residual {tuple(residual.shape)} must be like x {tuple(x.shape)}, rows contiguous")
    return _launch_rms_norm(x, residual, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last dimension of x [..., H] with weight and bias [H]."""
    rows = _rows(x)
    num_rows, size = rows.shape
    y = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    if num_rows:
        _layer_norm_kernel[(num_rows,)](
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
