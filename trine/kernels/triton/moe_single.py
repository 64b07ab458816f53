"""The experts of one row, at the speed that weights stream from memory.

Roofline: only the chosen experts' weights are read, each once: 3 * K * H * I elements (75 MB in Qwen3-30B-A3B, 18 µs).
Two products, each one launch over all K experts; the second one sums over experts too, so that nothing is left to
combine.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.triton.device import cdiv, early_launch, next_power_of_2, wait_for_inputs
from trine.kernels.triton.launch import launch

_TILE_BYTES = 32768  # of weights that a program asks for at once


@triton.jit
def _single_gate_up_kernel(
    x_ptr, gate_up_ptr, scales_ptr, chosen_ptr, h_ptr, hidden, inner,
    has_scales: tl.constexpr, row_block: tl.constexpr, hidden_block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program (i, k): silu(gate) * up of `row_block` inner elements of the k-th expert.

    It lets the next kernel start only when the choice of experts is known to be written: that one reads it at once.
    """
    if early:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(chosen_ptr + tl.program_id(1)).to(tl.int64)
    rows = tl.program_id(0) * row_block + tl.arange(0, row_block)
    present = rows < inner
    weight_rows = expert * 2 * inner + rows
    gate_ptr = gate_up_ptr + weight_rows[:, None] * hidden
    up_ptr = gate_ptr + inner * hidden
    gate = tl.zeros([row_block], tl.float32)
    up = tl.zeros([row_block], tl.float32)
    for start in range(0, hidden, hidden_block):
        columns = start + tl.arange(0, hidden_block)
        inside = columns < hidden
        mask = present[:, None] & inside[None, :]
        gate_tile = tl.load(gate_ptr + columns[None, :], mask=mask, other=0.0)
        up_tile = tl.load(up_ptr + columns[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        gate += tl.sum(gate_tile.to(tl.float32) * x[None, :], 1)
        up += tl.sum(up_tile.to(tl.float32) * x[None, :], 1)
    if has_scales:
        gate *= tl.load(scales_ptr + weight_rows, mask=present, other=0.0)
        up *= tl.load(scales_ptr + inner + weight_rows, mask=present, other=0.0)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + tl.program_id(1) * inner + rows, h.to(h_ptr.dtype.element_ty), mask=present)


@triton.jit
def _single_down_kernel(
    h_ptr, down_ptr, scales_ptr, chosen_ptr, weights_ptr, y_ptr, hidden, inner,
    has_scales: tl.constexpr, top_k: tl.constexpr, experts_block: tl.constexpr, row_block: tl.constexpr,
    inner_block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program i: `row_block` elements of the result, summed over the chosen experts.

    The first weights are asked for before the kernel in front, which computes h, has finished.
    """
    places = tl.arange(0, experts_block)
    experts = tl.load(chosen_ptr + places, mask=places < top_k, other=0, cache_modifier=".cg").to(tl.int64)
    rows = tl.program_id(0) * row_block + tl.arange(0, row_block)
    present = (rows < hidden)[:, None, None] & (places < top_k)[None, :, None]
    weight_rows = experts[None, :] * hidden + rows[:, None]
    row_ptr = down_ptr + weight_rows[:, :, None] * inner
    columns = tl.arange(0, inner_block)
    tile = tl.load(row_ptr + columns[None, None, :], mask=present & (columns < inner)[None, None, :], other=0.0)
    wait_for_inputs(early)
    weights = tl.load(weights_ptr + places, mask=places < top_k, other=0.0)[None, :]
    if has_scales:
        weights = weights * tl.load(scales_ptr + weight_rows, mask=(rows < hidden)[:, None], other=0.0)
    total = tl.zeros([row_block, experts_block], tl.float32)
    for start in range(0, inner, inner_block):
        inside = start + columns < inner
        mask = (places < top_k)[:, None] & inside[None, :]
        h = tl.load(h_ptr + places[:, None] * inner + (start + columns)[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tile.to(tl.float32) * h[None, :, :], 2)
        following = start + inner_block + columns
        tile = tl.load(row_ptr + following[None, None, :], mask=present & (following < inner)[None, None, :], other=0.0)
    tl.store(y_ptr + rows, tl.sum(total * weights, 1).to(y_ptr.dtype.element_ty), mask=rows < hidden)


def _inner_block(inner: int, elements: int) -> int:
    """Columns that a program takes at once: at most `elements`, without a remainder if there is such a power of two."""
    whole = inner & -inner
    return min(elements, whole if whole >= 128 else next_power_of_2(inner))


def single_row(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up_scales: torch.Tensor | None = None,
    down_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """The experts `chosen` [1, K] of x [1, H], summed with `weights` [1, K]: [1, H].

    gate_up [E, 2I, H] and down [E, H, I] are of x's dtype, or float8 with scales [E, 2I] and [E, H] float32.
    """
    _, hidden, inner = down.shape
    top_k = chosen.shape[1]
    h = torch.empty((top_k, inner), dtype=x.dtype, device=x.device)
    y = torch.empty_like(x)
    hidden_block = min(next_power_of_2(hidden), 4096)
    row_block = max(_TILE_BYTES // 2 // gate_up.itemsize // hidden_block, 1)
    launch(
        _single_gate_up_kernel, (cdiv(inner, row_block), top_k),
        x, gate_up, gate_up_scales, chosen, h, hidden, inner, has_scales=gate_up_scales is not None,
        row_block=row_block, hidden_block=hidden_block, num_warps=4, **early_launch(x.device),
    )  # fmt: skip
    experts_block = next_power_of_2(top_k)
    inner_block = _inner_block(inner, 1024)
    row_block = max(min(_TILE_BYTES // 2 // down.itemsize // experts_block // inner_block, 8), 1)
    launch(
        _single_down_kernel, (cdiv(hidden, row_block),),
        h, down, down_scales, chosen, weights, y, hidden, inner, has_scales=down_scales is not None,
        top_k=top_k, experts_block=experts_block, row_block=row_block, inner_block=inner_block,
        num_warps=4, **early_launch(x.device),
    )  # fmt: skip
    return y
