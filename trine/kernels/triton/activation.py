"""Activations between matrix products. Bound by memory: one read of the input, one write of the result."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import cdiv, early_launch, wait_for_inputs
from trine.kernels.triton.launch import launch

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up_ptr, y_ptr, row_stride, size, block: tl.constexpr, early: tl.constexpr):
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < size
    gate = tl.load(gate_up_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + size + columns, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * size + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, count, tanh: tl.constexpr, block: tl.constexpr, early: tl.constexpr):
    wait_for_inputs(early)
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < count
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if tanh:
        # x/2 (1 + tanh z) = x sigmoid(2 z), with 2 sqrt(2 / pi) = 1.5957691216
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate_up [T, 2I], gate first: [T, I]."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        grid = (num_rows, cdiv(size, _BLOCK))
        launch(
            _silu_mul_kernel,
            grid,
            gate_up,
            y,
            gate_up.stride(0),
            size,
            block=_BLOCK,
            num_warps=4,
            **early_launch(y.device),
        )
    return y


def gelu(x: torch.Tensor, approximate: Literal["tanh", "none"]) -> torch.Tensor:
    """The Gaussian error linear unit of every element of x, exact ("none") or by its tanh approximation."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        grid = (cdiv(x.numel(), _BLOCK),)
        launch(
            _gelu_kernel,
            grid,
            x,
            y,
            x.numel(),
            tanh=approximate == "tanh",
            block=_BLOCK,
            num_warps=4,
            **early_launch(y.device),
        )
    return y
