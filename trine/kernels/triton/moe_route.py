"""The router of a mixture of experts: gate product, softmax and choice in one launch, then a counting sort.

Roofline: the gate's E * H weights are read once (0.5 MB in Qwen3-30B-A3B), so all is latency. For few rows the gate's
rows are spread over programs, which ask for them before the kernel in front has finished, and the last program to
finish chooses for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import cdiv, early_launch, wait_for_inputs

_FEW_ROWS = 16
_TILE_ELEMENTS = 16384  # of the gate that a program of the few-rows kernel holds
_SORT_BLOCK = 4096


@triton.jit
def _choose(
    logits, rows, present, weights_ptr, chosen_ptr,
    top_k: tl.constexpr, normalize: tl.constexpr, choices: tl.constexpr,
):  # fmt: skip
    """Write the `top_k` largest of softmax(logits [R, E]) and their columns to rows `rows` of [T, top_k]."""
    p = tl.exp(logits - tl.max(logits, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    experts = tl.arange(0, logits.shape[1])
    places = tl.arange(0, choices)
    weights = tl.zeros([logits.shape[0], choices], tl.float32)
    chosen = tl.zeros([logits.shape[0], choices], tl.int32)
    for place in tl.static_range(top_k):
        largest, expert = tl.max(p, 1, return_indices=True)
        weights = tl.where(places[None, :] == place, largest[:, None], weights)
        chosen = tl.where(places[None, :] == place, expert[:, None], chosen)
        p = tl.where(experts[None, :] == expert[:, None], -1.0, p)
    if normalize:
        weights = weights / tl.sum(weights, 1)[:, None]
    offsets = rows[:, None] * top_k + places[None, :]
    mask = present[:, None] & (places < top_k)[None, :]
    tl.store(weights_ptr + offsets, weights, mask=mask)
    tl.store(chosen_ptr + offsets, chosen, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _route_few_kernel(
    x_ptr, gate_ptr, logits_ptr, arrivals_ptr, weights_ptr, chosen_ptr, num_rows, hidden, num_experts, x_stride,
    top_k: tl.constexpr, normalize: tl.constexpr, choices: tl.constexpr, expert_block: tl.constexpr,
    experts_block: tl.constexpr, hidden_block: tl.constexpr, rows_block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program i: logits of `expert_block` experts for every row; the last one to arrive chooses."""
    columns = tl.arange(0, hidden_block)
    inside = columns < hidden
    experts = tl.program_id(0) * expert_block + tl.arange(0, expert_block)
    present = experts < num_experts
    gate = tl.load(
        gate_ptr + experts[:, None] * hidden + columns[None, :], mask=present[:, None] & inside[None, :], other=0.0
    )
    wait_for_inputs(early)
    for row in range(num_rows):
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        logits = tl.sum(gate.to(tl.float32) * x[None, :], 1)
        tl.store(logits_ptr + row * num_experts + experts, logits, mask=present)
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        rows = tl.arange(0, rows_block)
        every = tl.arange(0, experts_block)
        mask = (rows < num_rows)[:, None] & (every < num_experts)[None, :]
        offsets = rows[:, None] * num_experts + every[None, :]
        logits = tl.load(logits_ptr + offsets, mask=mask, other=-float("inf"), cache_modifier=".cg")
        logits = tl.where((rows < num_rows)[:, None], logits, 0.0)
        _choose(logits, rows, rows < num_rows, weights_ptr, chosen_ptr, top_k, normalize, choices)
        tl.store(arrivals_ptr, 0)  # ready for the next launch


@triton.jit(do_not_specialize=["num_rows"])
def _route_many_kernel(
    x_ptr, gate_ptr, weights_ptr, chosen_ptr, num_rows, hidden, num_experts, x_stride,
    top_k: tl.constexpr, normalize: tl.constexpr, choices: tl.constexpr,
    experts_block: tl.constexpr, hidden_block: tl.constexpr, rows_block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program i: the experts of rows i * rows_block to (i + 1) * rows_block."""
    wait_for_inputs(early)
    rows = tl.program_id(0).to(tl.int64) * rows_block + tl.arange(0, rows_block)
    present = rows < num_rows
    experts = tl.arange(0, experts_block)
    served = experts < num_experts
    columns = tl.arange(0, hidden_block)
    logits = tl.zeros([rows_block, experts_block], tl.float32)
    for start in range(0, hidden, hidden_block):
        inside = start + columns < hidden
        x = tl.load(
            x_ptr + rows[:, None] * x_stride + (start + columns)[None, :],
            mask=present[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        gate = tl.load(
            gate_ptr + experts[None, :] * hidden + (start + columns)[:, None],
            mask=inside[:, None] & served[None, :], other=0.0,
        )  # fmt: skip
        logits = tl.dot(x, gate, logits, input_precision="ieee")
    logits = tl.where(served[None, :], logits, -float("inf"))
    _choose(logits, rows, present, weights_ptr, chosen_ptr, top_k, normalize, choices)


@cache
def _arrivals(device: torch.device) -> torch.Tensor:
    """A zeroed counter, which every launch leaves at zero: kernels of one device run in one stream at a time."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def route(x: torch.Tensor, gate: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, K] float32 and numbers [T, K] int32 of the experts that gate [E, H] chooses for each row of x [T, H].

    Logits are float32 sums. Nothing may write to `gate` in the kernels just before: it is read while they run.
    """
    num_rows, hidden = x.shape
    num_experts = gate.shape[0]
    weights = torch.empty((num_rows, top_k), dtype=torch.float32, device=x.device)
    chosen = torch.empty((num_rows, top_k), dtype=torch.int32, device=x.device)
    sizes = {
        "top_k": top_k,
        "normalize": normalize,
        "choices": triton.next_power_of_2(top_k),
        "experts_block": max(triton.next_power_of_2(num_experts), 16),
    }
    if 0 < num_rows <= _FEW_ROWS:
        hidden_block = triton.next_power_of_2(hidden)
        expert_block = max(_TILE_ELEMENTS // hidden_block * 2 // x.itemsize, 1)
        logits = torch.empty((num_rows, num_experts), dtype=torch.float32, device=x.device)
        _route_few_kernel[(cdiv(num_experts, expert_block),)](
            x, gate, logits, _arrivals(x.device), weights, chosen, num_rows, hidden, num_experts, x.stride(0),
            **sizes, expert_block=expert_block, hidden_block=hidden_block, rows_block=_FEW_ROWS,
            num_warps=4, **early_launch(x.device),
        )  # fmt: skip
    elif num_rows:
        rows_block = 16 if num_rows <= 2048 else 64
        _route_many_kernel[(cdiv(num_rows, rows_block),)](
            x, gate, weights, chosen, num_rows, hidden, num_experts, x.stride(0),
            **sizes, hidden_block=128 if x.itemsize == 2 else 32, rows_block=rows_block,
            num_warps=4, num_stages=3, **early_launch(x.device),
        )  # fmt: skip
    return weights, chosen


@dataclass(frozen=True, slots=True)
class Groups:
    """P = T * K choices sorted by expert, cut into tiles of at most `row_block` choices of one expert.

    order         [P] int32: sorted place to choice (choice i is of token i // K); within an expert ascending
    places        [P] int32: choice to sorted place, the inverse
    ends          [E] int32: the place past each expert's last choice
    tile_experts  [most tiles] int32, for the first `num_tiles` tiles
    tile_starts   the same: each tile's first place
    num_tiles     [1] int32
    """

    order: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor
    tile_experts: torch.Tensor
    tile_starts: torch.Tensor
    num_tiles: torch.Tensor
    row_block: int


@triton.jit(do_not_specialize=["count"])
def _group_kernel(
    chosen_ptr, order_ptr, places_ptr, ends_ptr, tile_experts_ptr, tile_starts_ptr, num_tiles_ptr, count,
    row_block: tl.constexpr, experts_block: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program e: count all experts' choices, then place those of expert e. No program waits for another."""
    wait_for_inputs(early)
    expert = tl.program_id(0)
    offsets = tl.arange(0, block)
    experts = tl.arange(0, experts_block)
    counts = tl.zeros([experts_block], tl.int32)
    for first in range(0, count, block):
        inside = first + offsets < count
        chosen = tl.load(chosen_ptr + first + offsets, mask=inside, other=0)
        counts += tl.histogram(chosen, experts_block, mask=inside)
    place = tl.sum(tl.where(experts < expert, counts, 0), 0)
    tiles = tl.cdiv(counts, row_block)
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    own_count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    tl.store(ends_ptr + expert, place + own_count)
    if expert == tl.num_programs(0) - 1:
        tl.store(num_tiles_ptr, first_tile + tl.cdiv(own_count, row_block))
    for tile in range(0, tl.cdiv(own_count, row_block)):
        tl.store(tile_experts_ptr + first_tile + tile, expert)
        tl.store(tile_starts_ptr + first_tile + tile, place + tile * row_block)
    if own_count == 0:
        return
    for first in range(0, count, block):
        inside = first + offsets < count
        own = (tl.load(chosen_ptr + first + offsets, mask=inside, other=-1) == expert).to(tl.int32)
        at = place + tl.cumsum(own, 0) - 1
        tl.store(order_ptr + at, first + offsets, mask=own == 1)
        tl.store(places_ptr + first + offsets, at, mask=own == 1)
        place += tl.sum(own, 0)


def group(chosen: torch.Tensor, num_experts: int, row_block: int) -> Groups:
    """Sort the choices of `chosen` [T, K] int32 by expert, on the device."""
    count = chosen.numel()
    most_tiles = min(num_experts, count) + count // row_block
    sizes = (count, count, num_experts, most_tiles, most_tiles, 1)
    order, places, ends, experts, starts, num_tiles = torch.empty(
        sum(sizes), dtype=torch.int32, device=chosen.device
    ).split(sizes)
    _group_kernel[(num_experts,)](
        chosen, order, places, ends, experts, starts, num_tiles, count,
        row_block=row_block, experts_block=triton.next_power_of_2(num_experts),
        block=min(max(triton.next_power_of_2(count), 128), _SORT_BLOCK),
        num_warps=4, **early_launch(chosen.device),
    )  # fmt: skip
    return Groups(order, places, ends, experts, starts, num_tiles, row_block)
