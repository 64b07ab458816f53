"""Mixture of experts on a GPU: which kernels, in which blocks, for how many rows. No step waits for the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from trine.kernels.fp8 import Fp8Weight
from trine.kernels.triton.device import cdiv, early_launch, hopper_kernels, next_power_of_2, wait_for_inputs
from trine.kernels.triton.launch import launch
from trine.kernels.triton.moe_grouped import Tuning, matrix_product, stream_product
from trine.kernels.triton.moe_route import Groups, Lists, group, route
from trine.kernels.triton.moe_single import single_row
from trine.kernels.triton.norm import add_rms_norm, rms_norm
from trine.kernels.types import AddNorm, Mixture, Weight


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
    x_ptr, places_ptr, weights_ptr, counts_ptr, num_used_ptr, residual_ptr, norm_ptr, y_ptr, residual_stride,
    num_experts, hidden, eps,
    is_sorted: tl.constexpr, listed: tl.constexpr, add_norm: tl.constexpr, top_k: tl.constexpr, block: tl.constexpr,
    experts_block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program t: token t's choices, summed with their weights; with `add_norm` added to the residual stream and normed.

    The first one sets `listed` counts back to zero. With lists, gate and up's kernel lets the next one start when the
    router is done: the residual stream is complete then. Rows of no list are padding, and their results zero.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < hidden
    if add_norm:
        norm = tl.load(norm_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        residual_row_ptr = residual_ptr + row * residual_stride + columns
        if listed:
            residual = tl.load(residual_row_ptr, mask=inside, other=0.0, cache_modifier=".cg")
    computed = hidden
    if listed:
        computed = tl.where(row < tl.load(num_used_ptr), hidden, 0)
    wait_for_inputs(early)
    y = tl.zeros([block], tl.float32)
    for choice in tl.static_range(top_k):
        place = row * top_k + choice
        if is_sorted:
            place = tl.load(places_ptr + place).to(tl.int64)
        x = tl.load(x_ptr + place * hidden + columns, mask=columns < computed, other=0.0).to(tl.float32)
        y += x * tl.load(weights_ptr + row * top_k + choice)
    y = y.to(y_ptr.dtype.element_ty)
    if add_norm:
        if not listed:
            residual = tl.load(residual_row_ptr, mask=inside, other=0.0)
        total = y.to(tl.float32) + residual.to(tl.float32)
        total = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_row_ptr, total, mask=inside)
        x = total.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / hidden + eps)
        y = (x * scale * norm).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * hidden + columns, y, mask=inside)
    if listed:  # noqa: SIM102  # only this is known when it compiles
        if row == 0:
            experts = tl.arange(0, experts_block)
            tl.store(counts_ptr + experts, tl.zeros([experts_block], tl.int32), mask=experts < num_experts)


def gather_rows(x: torch.Tensor, groups: Groups, choices: int) -> torch.Tensor:
    """Rows of x [T, H] in sorted order, one for each of its `choices`: [P, H]."""
    count, hidden = groups.order.shape[0], x.shape[1]
    y = torch.empty((count, hidden), dtype=x.dtype, device=x.device)
    row_block, column_block = 8, min(next_power_of_2(hidden), 1024)
    launch(
        _gather_kernel, (cdiv(count, row_block), cdiv(hidden, column_block)),
        x, groups.order, y, count, hidden, x.stride(0), choices,
        row_block=row_block, column_block=column_block, num_warps=4, **early_launch(x.device),
    )  # fmt: skip
    return y


def combine(x: torch.Tensor, how: Groups | Lists, weights: torch.Tensor, after: AddNorm | None = None) -> torch.Tensor:
    """Each token's results in x [P, H], summed with `weights` [T, K] in the order of its choices, then `after`: [T, H].

    x is sorted as `how` says, or a row a choice; the lists' counts become zero. What is in no list counts as zeros.
    """
    (num_rows, top_k), hidden = weights.shape, x.shape[1]
    y = torch.empty((num_rows, hidden), dtype=x.dtype, device=x.device)
    places, counts, num_used = (how.places, None, None) if isinstance(how, Groups) else (None, how.counts, how.num_used)
    residual, norm, eps = (after.residual, after.weight, after.eps) if after else (None, None, 0.0)
    block = next_power_of_2(hidden)
    num_experts = 0 if counts is None else counts.shape[0]
    launch(
        _combine_kernel, (num_rows,),
        x, places, weights, counts, num_used, residual, norm, y, 0 if residual is None else residual.stride(0),
        num_experts, hidden, eps,
        is_sorted=places is not None, listed=counts is not None, add_norm=after is not None, top_k=top_k, block=block,
        experts_block=next_power_of_2(num_experts), num_warps=min(max(block // 512, 1), 16),
        **early_launch(x.device),
    )  # fmt: skip
    return y


def _stacked(weight: Weight | Sequence[Weight]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values [E, N, K] and, of float8, scales [E, N]."""
    if isinstance(weight, Fp8Weight):
        return weight.values, weight.scales
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"experts can't read a {type(weight).__name__}")
    return weight, None


def _experts(
    x: torch.Tensor,
    weights: Mixture,
    shares: torch.Tensor,
    chosen: torch.Tensor,
    lists: Lists | None,
    plan: Plan,
    after: AddNorm | None,
) -> torch.Tensor:
    """The experts `chosen` [T, K] of each row of x [T, H], summed by their `shares` [T, K], then `after`: [T, H]."""
    gate_up, gate_up_scales = _stacked(weights.gate_up)
    down, down_scales = _stacked(weights.down)
    top_k = weights.top_k
    if lists is None:
        groups = group(chosen, gate_up.shape[0], plan.row_block)
        h = matrix_product(gather_rows(x, groups, top_k), gate_up, groups, plan.gate_up, silu=True)
        return combine(matrix_product(h, down, groups, plan.down, silu=False), groups, shares, after)
    own, hopper = (lists, chosen.numel()), hopper_kernels(x.device, "hopper_moe")
    few = hopper is not None and plan.row_block <= hopper.MAX_ROW_BLOCK
    if hopper is not None and few and hopper.can_stream(x, gate_up) and hopper.can_stream(x, down):
        h = hopper.stream_product(x, gate_up, *own, top_k, plan.row_block, silu=True)
        y = hopper.stream_product(h, down, *own, 1, plan.row_block, silu=False)
    else:
        h = stream_product(x, gate_up, *own, top_k, plan.row_block, plan.gate_up, silu=True, scales=gate_up_scales)
        y = stream_product(h, down, *own, 1, plan.row_block, plan.down, silu=False, scales=down_scales)
    return combine(y, lists, shares, after)


def mixture(
    x: torch.Tensor | None,
    before: AddNorm,
    weights: Mixture,
    after: AddNorm | None,
    plan: Plan | None = None,
    num_used: torch.Tensor | None = None,
) -> torch.Tensor:
    """`before` with x [T, H] or parts of it, or without an x the norm alone; of each token the chosen experts' gated
    MLPs, summed with their weights; `after` with that, if there is one: [T, H].

    Experts are stacked: tensors, or float8 with scales [E, 2I] and [E, H], while activations keep their precision. A
    row's result does not depend on the rows beside it, except through the plan, which goes by their number. Rows from
    `num_used` [1] int32 on are padding: no expert is read for them.
    """
    num_rows = before.residual.shape[0]
    gate_up, gate_up_scales = _stacked(weights.gate_up)
    single = num_rows == 1 and plan is None
    plan = plan or plan_for(num_rows * weights.top_k, gate_up, before.residual.dtype)
    by_lists = not (single or plan.resident)
    lists = Lists.empty(num_rows, gate_up.shape[0], gate_up.device, num_used) if by_lists else None
    norm = before.weight, before.eps
    y = rms_norm(before.residual, *norm) if x is None else add_rms_norm(x, before.residual, *norm)
    shares, chosen = route(y, weights.gate, weights.top_k, weights.normalize, lists)
    if num_rows == 0:
        return y
    if not single:
        try:
            return _experts(y, weights, shares, chosen, lists, plan, after)
        except BaseException:  # no memory, say: the next step counts from zero nevertheless
            if lists is not None:
                lists.counts.zero_()
            raise
    down, down_scales = _stacked(weights.down)
    y = single_row(y, gate_up, down, shares, chosen, gate_up_scales, down_scales)
    return y if after is None else add_rms_norm(y, after.residual, after.weight, after.eps)
