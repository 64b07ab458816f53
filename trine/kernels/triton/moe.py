"""Mixture of experts on a GPU: which kernels, in which blocks, for how many rows. No step waits for the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from trine.kernels.fp8 import Fp8Weight
from trine.kernels.triton.device import cdiv, early_launch, wait_for_inputs
from trine.kernels.triton.moe_grouped import Tuning, matrix_product, stream_product
from trine.kernels.triton.moe_route import Groups, group
from trine.kernels.triton.moe_single import single_row
from trine.kernels.types import Weight

_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """How the experts of a batch are computed: rows a tile, both products' choices, `resident`: by `matrix_product`."""

    row_block: int
    gate_up: Tuning
    down: Tuning
    resident: bool = False


PLANS = (
    (4, Plan(16, Tuning(64, 128, 4, 3), Tuning(64, 128, 4, 3))),
    (20, Plan(32, Tuning(128, 128, 8, 3), Tuning(64, 128, 4, 3))),
    (64, Plan(64, Tuning(64, 64, 4, 4), Tuning(128, 64, 8, 4))),
)
"""For 16-bit types, by the largest mean number of rows an expert; measured on an H200 (bench/moe.py)."""

MANY = Plan(128, Tuning(128, 64, 8, 4), Tuning(256, 64, 8, 3), resident=True)
MANY_STREAMED = Plan(128, Tuning(128, 64, 8, 4), Tuning(128, 64, 8, 4))
"""For float8 weights, which a product widens as it reads them, and for rows that the copy engine can't read."""

_FLOAT32 = Plan(16, Tuning(64, 32, 4, 2), Tuning(64, 32, 4, 2))


def plan_for(num_choices: int, gate_up: torch.Tensor, dtype: torch.dtype) -> Plan:
    """The plan for a number of (token, expert) pairs, weights [E, 2I, H] and activations of `dtype`."""
    num_experts, twice_inner, hidden = gate_up.shape
    if dtype.itemsize > 2:
        return _FLOAT32
    for largest, plan in PLANS:
        if num_choices <= largest * num_experts:
            return plan
    copied = gate_up.dtype == dtype and hidden % 8 == 0 and twice_inner % 16 == 0
    return MANY if copied else MANY_STREAMED


@triton.jit(do_not_specialize=["count"])
def _gather_kernel(
    x_ptr, order_ptr, y_ptr, count, hidden, x_stride, choices,
    row_block: tl.constexpr, column_block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program (i, j): columns block j of the tokens whose choices are i * row_block to (i + 1) * row_block-th."""
    wait_for_inputs(early)
    places = tl.program_id(0) * row_block + tl.arange(0, row_block)
    columns = tl.program_id(1) * column_block + tl.arange(0, column_block)
    rows = (tl.load(order_ptr + places, mask=places < count, other=0) // choices).to(tl.int64)
    mask = (places < count)[:, None] & (columns < hidden)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask)
    tl.store(y_ptr + places.to(tl.int64)[:, None] * hidden + columns[None, :], x, mask=mask)


@triton.jit
def _combine_kernel(
    x_ptr, places_ptr, weights_ptr, y_ptr, hidden, top_k: tl.constexpr, block: tl.constexpr, early: tl.constexpr
):
    """Program (t, i): columns block i of token t's choices, summed with their weights."""
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < hidden
    y = tl.zeros([block], tl.float32)
    for choice in tl.static_range(top_k):
        place = tl.load(places_ptr + row * top_k + choice).to(tl.int64)
        x = tl.load(x_ptr + place * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        y += x * tl.load(weights_ptr + row * top_k + choice)
    tl.store(y_ptr + row * hidden + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


def gather_rows(x: torch.Tensor, groups: Groups, choices: int) -> torch.Tensor:
    """Rows of x [T, H] in sorted order, one for each of its `choices`: [P, H]."""
    count, hidden = groups.order.shape[0], x.shape[1]
    y = torch.empty((count, hidden), dtype=x.dtype, device=x.device)
    row_block, column_block = 8, min(triton.next_power_of_2(hidden), 1024)
    _gather_kernel[(cdiv(count, row_block), cdiv(hidden, column_block))](
        x, groups.order, y, count, hidden, x.stride(0), choices,
        row_block=row_block, column_block=column_block, num_warps=4, **early_launch(x.device),
    )  # fmt: skip
    return y


def combine(x: torch.Tensor, groups: Groups, weights: torch.Tensor) -> torch.Tensor:
    """Each token's results in x [P, H], summed with `weights` [T, K] in the order of its choices: [T, H]."""
    (num_rows, top_k), hidden = weights.shape, x.shape[1]
    y = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(hidden), _BLOCK)
    _combine_kernel[(num_rows, cdiv(hidden, block))](
        x, groups.places, weights, y, hidden, top_k=top_k, block=block, num_warps=4, **early_launch(x.device)
    )
    return y


def _stacked(weight: Weight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values [E, N, K] and, of float8, scales [E, N]."""
    if isinstance(weight, Fp8Weight):
        return weight.values, weight.scales
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"experts can't read a {type(weight).__name__}")
    return weight, None


def experts(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    plan: Plan | None = None,
) -> torch.Tensor:
    """The experts `chosen` [T, K] int32 of each row of x [T, H], summed with `weights` [T, K] float32: [T, H].

    gate_up [E, 2I, H] holds gates over ups, down is [E, H, I]; tensors, or float8 with scales [E, 2I] and [E, H], while
    activations keep their precision. A row's result does not depend on the rows beside it, except through the plan,
    which goes by their number.
    """
    gate_up, gate_up_scales = _stacked(gate_up)
    down, down_scales = _stacked(down)
    num_rows, top_k = chosen.shape
    if num_rows == 0:
        return torch.empty_like(x)
    if num_rows == 1 and plan is None:
        return single_row(x, gate_up, down, weights, chosen, gate_up_scales, down_scales)
    plan = plan or plan_for(chosen.numel(), gate_up, x.dtype)
    groups = group(chosen, gate_up.shape[0], plan.row_block)
    if plan.resident:
        h = matrix_product(gather_rows(x, groups, top_k), gate_up, groups, plan.gate_up, silu=True)
        y = matrix_product(h, down, groups, plan.down, silu=False)
    else:
        h = stream_product(x, gate_up, groups, plan.gate_up, silu=True, choices=top_k, scales=gate_up_scales)
        y = stream_product(h, down, groups, plan.down, silu=False, choices=0, scales=down_scales)
    return combine(y, groups, weights)
