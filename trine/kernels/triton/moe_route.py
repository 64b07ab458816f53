"""The router of a mixture of experts: gate product, softmax and choice in one launch, then a counting sort.

Roofline: the gate's E * H weights are read once (0.5 MB in Qwen3-30B-A3B), so all is latency. Up to 256 rows the
gate is spread over programs, which ask for their part before the kernel in front has finished, and the last one of a
row to finish chooses its experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import cdiv, early_launch, next_power_of_2, wait_for_inputs
from trine.kernels.triton.launch import launch

_FEW_ROWS = 16  # up to here a program has one row
_SOME_ROWS = 256  # up to here the experts too are spread over programs
_TILE_BYTES = 8192  # of the gate that a program of the few-rows kernel, which is one warp, holds; half of one row's
_ONE_LAUNCH = 4096  # choices that are sorted by one launch
_PART = 256  # choices that a program places, where there are two


@triton.jit
def _choose(
    logits, rows, present, num_used, weights_ptr, chosen_ptr, counts_ptr, lists_ptr, capacity,
    listed: tl.constexpr, top_k: tl.constexpr, normalize: tl.constexpr, choices: tl.constexpr,
):  # fmt: skip
    """Write the `top_k` largest of softmax(logits [R, E]) and their columns to rows `rows` of [T, top_k].

    Among equals the first wins: a row of NaNs, which count as zeros, chooses experts that exist. `listed`: each choice
    of the rows before `num_used` goes to its expert's list too, at the end.

    Numbers that aren't negative are in the order of their bits: a warp finds the largest integer in one instruction.
    """
    p = tl.exp(logits - tl.max(logits, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    bits = tl.where(p == p, p, 0.0).to(tl.int32, bitcast=True)
    experts = tl.arange(0, logits.shape[1])
    places = tl.arange(0, choices)
    weights = tl.zeros([logits.shape[0], choices], tl.int32)
    chosen = tl.zeros([logits.shape[0], choices], tl.int32)
    for place in tl.static_range(top_k):
        largest = tl.max(bits, 1)
        expert = tl.min(tl.where(bits == largest[:, None], experts[None, :], logits.shape[1]), 1)
        weights = tl.where(places[None, :] == place, largest[:, None], weights)
        chosen = tl.where(places[None, :] == place, expert[:, None], chosen)
        bits = tl.where(experts[None, :] == expert[:, None], -1, bits)
    weights = weights.to(tl.float32, bitcast=True)
    if normalize:
        weights = weights / tl.sum(weights, 1)[:, None]
    offsets = rows[:, None] * top_k + places[None, :]
    mask = present[:, None] & (places < top_k)[None, :]
    tl.store(weights_ptr + offsets, weights, mask=mask)
    tl.store(chosen_ptr + offsets, chosen, mask=mask)
    if listed:
        used = mask & (rows < num_used)[:, None]
        ranks = tl.atomic_add(counts_ptr + chosen, 1, mask=used, sem="relaxed")
        tl.store(lists_ptr + chosen.to(tl.int64) * capacity + ranks, offsets.to(tl.int32), mask=used)


@triton.jit
def _is_last(arrivals_ptr):
    """Whether all other programs of a group, one a column of the grid's first dimension, have been here before."""
    tl.debug_barrier()
    return tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def _choose_whole(
    rows, present, num_used, num_experts, logits_ptr, weights_ptr, chosen_ptr, counts_ptr, lists_ptr, capacity,
    listed: tl.constexpr, top_k: tl.constexpr, normalize: tl.constexpr, choices: tl.constexpr,
    experts_block: tl.constexpr,
):  # fmt: skip
    """`_choose` for rows whose logits others have written."""
    every = tl.arange(0, experts_block)
    in_row = (every < num_experts)[None, :]
    at = rows[:, None] * num_experts + every[None, :]
    whole = tl.load(logits_ptr + at, mask=present[:, None] & in_row, other=0.0, cache_modifier=".cg")
    whole = tl.where(in_row, whole, -float("inf"))
    _choose(
        whole, rows, present, num_used, weights_ptr, chosen_ptr, counts_ptr, lists_ptr, capacity,
        listed, top_k, normalize, choices,
    )  # fmt: skip


@triton.jit(do_not_specialize=["capacity"])
def _route_few_kernel(
    x_ptr, gate_ptr, logits_ptr, arrivals_ptr, weights_ptr, chosen_ptr, counts_ptr, lists_ptr, capacity, num_used_ptr,
    hidden, num_experts, x_stride,
    listed: tl.constexpr, top_k: tl.constexpr, normalize: tl.constexpr, choices: tl.constexpr,
    expert_block: tl.constexpr, experts_block: tl.constexpr, hidden_block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program (i, t): logits of `expert_block` experts for row t; the row's last one to arrive chooses."""
    columns = tl.arange(0, hidden_block)
    inside = columns < hidden
    experts = tl.program_id(0) * expert_block + tl.arange(0, expert_block)
    present = experts < num_experts
    gate = tl.load(
        gate_ptr + experts[:, None] * hidden + columns[None, :], mask=present[:, None] & inside[None, :], other=0.0
    )
    num_used = tl.load(num_used_ptr) if listed else 0
    wait_for_inputs(early)
    row = tl.program_id(1)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    logits = tl.sum(gate.to(tl.float32) * x[None, :], 1)
    tl.store(logits_ptr + row * num_experts + experts, logits, mask=present)
    if _is_last(arrivals_ptr + row):
        rows = row + tl.arange(0, 1)
        _choose_whole(
            rows, rows >= 0, num_used, num_experts, logits_ptr, weights_ptr, chosen_ptr, counts_ptr, lists_ptr,
            capacity, listed, top_k, normalize, choices, experts_block,
        )  # fmt: skip
        tl.store(arrivals_ptr + row, 0)  # ready for the next launch


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def _route_some_kernel(
    x_ptr, gate_ptr, logits_ptr, arrivals_ptr, weights_ptr, chosen_ptr, counts_ptr, lists_ptr, capacity, num_used_ptr,
    num_rows, hidden, num_experts, x_stride,
    listed: tl.constexpr, top_k: tl.constexpr, normalize: tl.constexpr, choices: tl.constexpr,
    expert_block: tl.constexpr, experts_block: tl.constexpr, chunks: tl.constexpr, chunk: tl.constexpr,
    rows_block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program (i, j): logits of experts block i for rows block j; the block's last one to arrive chooses.

    The sums over H are cut into chunks, one for each warp, and `chunks * chunk` elements are asked for at once.
    """
    experts = tl.program_id(0) * expert_block + tl.arange(0, expert_block)
    served = experts < num_experts
    columns = tl.arange(0, chunks)[:, None] * chunk + tl.arange(0, chunk)[None, :]
    gate_row_ptr = gate_ptr + experts[None, None, :] * hidden
    mask = (columns < hidden)[:, :, None] & served[None, None, :]
    gate = tl.load(gate_row_ptr + columns[:, :, None], mask=mask, other=0.0)
    num_used = tl.load(num_used_ptr) if listed else 0
    wait_for_inputs(early)
    block = tl.program_id(1)
    rows = block * rows_block + tl.arange(0, rows_block)
    present = rows < num_rows
    x_row_ptr = x_ptr + rows[None, :, None] * x_stride
    sums = tl.zeros([chunks, rows_block, expert_block], tl.float32)
    for _ in range(0, hidden, chunks * chunk):
        mask = present[None, :, None] & (columns < hidden)[:, None, :]
        x = tl.load(x_row_ptr + columns[:, None, :], mask=mask, other=0.0)
        sums = tl.dot(x, gate, sums, input_precision="ieee")
        columns += chunks * chunk
        mask = (columns < hidden)[:, :, None] & served[None, None, :]
        gate = tl.load(gate_row_ptr + columns[:, :, None], mask=mask, other=0.0)
    logits = tl.sum(sums, 0)
    own = rows[:, None] * num_experts + experts[None, :]
    tl.store(logits_ptr + own, logits, mask=present[:, None] & served[None, :])
    if _is_last(arrivals_ptr + block):
        _choose_whole(
            rows, present, num_used, num_experts, logits_ptr, weights_ptr, chosen_ptr, counts_ptr, lists_ptr, capacity,
            listed, top_k, normalize, choices, experts_block,
        )  # fmt: skip
        tl.store(arrivals_ptr + block, 0)  # ready for the next launch


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def _route_many_kernel(
    x_ptr, gate_ptr, weights_ptr, chosen_ptr, counts_ptr, lists_ptr, capacity, num_used_ptr,
    num_rows, hidden, num_experts, x_stride,
    listed: tl.constexpr, top_k: tl.constexpr, normalize: tl.constexpr, choices: tl.constexpr,
    experts_block: tl.constexpr, hidden_block: tl.constexpr, rows_block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program i: the experts of rows block i."""
    num_used = tl.load(num_used_ptr) if listed else 0
    wait_for_inputs(early)
    rows = tl.program_id(0).to(tl.int64) * rows_block + tl.arange(0, rows_block)
    present = rows < num_rows
    experts = tl.arange(0, experts_block)
    columns = tl.arange(0, hidden_block)
    logits = tl.zeros([rows_block, experts_block], tl.float32)
    for start in range(0, hidden, hidden_block):
        mask = present[:, None] & (start + columns < hidden)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + (start + columns)[None, :], mask=mask, other=0.0)
        mask = (start + columns < hidden)[:, None] & (experts < num_experts)[None, :]
        gate = tl.load(gate_ptr + experts[None, :] * hidden + (start + columns)[:, None], mask=mask, other=0.0)
        logits = tl.dot(x, gate, logits, input_precision="ieee")
    logits = tl.where((experts < num_experts)[None, :], logits, -float("inf"))
    _choose(
        logits, rows, present, num_used, weights_ptr, chosen_ptr, counts_ptr, lists_ptr, capacity,
        listed, top_k, normalize, choices,
    )  # fmt: skip


@cache
def _zeros(device: torch.device, size: int, purpose: str) -> torch.Tensor:
    """Zeros, which those who count in them leave zero: kernels of one device run in one stream at a time."""
    return torch.zeros(size, dtype=torch.int32, device=device)


@cache
def _any_number(device: torch.device) -> torch.Tensor:
    return torch.full((1,), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class Lists:
    """The choices of each expert: choices [E, T] int32 of numbers (choice i is of token i // K), in any order, of which
    the first counts [E] int32 exist. Counts are zero but between the router and the sum of the experts' results.

    Tokens from num_used [1] int32 on are padding and in no list. Nothing writes to it while a step's kernels run.
    """

    counts: torch.Tensor
    choices: torch.Tensor
    num_used: torch.Tensor

    @staticmethod
    def empty(num_rows: int, num_experts: int, device: torch.device, num_used: torch.Tensor | None = None) -> Lists:
        choices = torch.empty((num_experts, num_rows), dtype=torch.int32, device=device)
        used = _any_number(device) if num_used is None else num_used
        return Lists(_zeros(device, num_experts, "counts"), choices, used)


def route(
    x: torch.Tensor,
    gate: torch.Tensor,
    top_k: int,
    normalize: bool,
    lists: Lists | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, K] float32 and numbers [T, K] int32 of the experts that gate [E, H] chooses for each row of x [T, H].

    Logits are float32 sums. Nothing may write to `gate` in the kernels just before: it is read while they run. The
    choices are put into `lists`, if any.
    """
    num_rows, hidden = x.shape
    num_experts = gate.shape[0]
    weights = torch.empty((num_rows, top_k), dtype=torch.float32, device=x.device)
    chosen = torch.empty((num_rows, top_k), dtype=torch.int32, device=x.device)
    sizes = {
        "listed": lists is not None,
        "top_k": top_k,
        "normalize": normalize,
        "choices": next_power_of_2(top_k),
        "experts_block": max(next_power_of_2(num_experts), 16),
    }
    if num_rows == 0:
        return weights, chosen
    to_lists: tuple[Any, ...] = (None, None, 0, None)
    if lists is not None:
        to_lists = (lists.counts, lists.choices, lists.choices.shape[1], lists.num_used)
    logits = torch.empty((num_rows, num_experts), dtype=torch.float32, device=x.device)
    arrivals = _zeros(x.device, _FEW_ROWS, "arrivals")
    widest = next_power_of_2(hidden)
    early = early_launch(x.device)
    if num_rows <= _FEW_ROWS:
        tile_bytes = _TILE_BYTES // 2 if num_rows == 1 else _TILE_BYTES
        expert_block = max(tile_bytes // x.itemsize // widest, 1)
        launch(
            _route_few_kernel, (cdiv(num_experts, expert_block), num_rows),
            x, gate, logits, arrivals, weights, chosen, *to_lists, hidden, num_experts, x.stride(0),
            **sizes, expert_block=expert_block, hidden_block=widest, num_warps=1, **early,
        )  # fmt: skip
    elif num_rows <= _SOME_ROWS:
        launch(
            _route_some_kernel, (cdiv(num_experts, 16), cdiv(num_rows, 16)),
            x, gate, logits, arrivals, weights, chosen, *to_lists, num_rows, hidden, num_experts, x.stride(0),
            **sizes, expert_block=16, chunks=8, chunk=min(max(widest // 8, 16), 256 if x.itemsize == 2 else 32),
            rows_block=16, num_warps=8, num_stages=1, **early,
        )  # fmt: skip
    else:
        rows_block = 16 if num_rows <= 2048 else 64
        launch(
            _route_many_kernel, (cdiv(num_rows, rows_block),),
            x, gate, weights, chosen, *to_lists, num_rows, hidden, num_experts, x.stride(0),
            **sizes, hidden_block=128 if x.itemsize == 2 else 32, rows_block=rows_block,
            num_warps=4, num_stages=3, **early,
        )  # fmt: skip
    return weights, chosen


@dataclass(frozen=True, slots=True)
class Groups:
    """P = T * K choices sorted by expert, cut into tiles of at most `row_block` choices of one expert.

    order         [P] int32: sorted place to choice (choice i is of token i // K); within an expert in any order
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


@triton.jit
def _write_tiles(
    expert, place, count, first_tile, ends_ptr, tile_experts_ptr, tile_starts_ptr, row_block: tl.constexpr
):
    """Expert's `count` choices begin at `place`, its tiles at `first_tile`."""
    tl.store(ends_ptr + expert, place + count)
    for tile in range(0, tl.cdiv(count, row_block)):
        tl.store(tile_experts_ptr + first_tile + tile, expert)
        tl.store(tile_starts_ptr + first_tile + tile, place + tile * row_block)


@triton.jit(do_not_specialize=["count"])
def _group_kernel(
    chosen_ptr, order_ptr, places_ptr, ends_ptr, tile_experts_ptr, tile_starts_ptr, num_tiles_ptr, count,
    row_block: tl.constexpr, experts_block: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program e: count all experts' choices, at most `block`, then place those of expert e. None waits for another."""
    wait_for_inputs(early)
    expert = tl.program_id(0)
    offsets = tl.arange(0, block)
    experts = tl.arange(0, experts_block)
    chosen = tl.load(chosen_ptr + offsets, mask=offsets < count, other=-1)
    counts = tl.histogram(chosen, experts_block, mask=offsets < count)
    place = tl.sum(tl.where(experts < expert, counts, 0), 0)
    first_tile = tl.sum(tl.where(experts < expert, tl.cdiv(counts, row_block), 0), 0)
    own_count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    if expert == tl.num_programs(0) - 1:
        tl.store(num_tiles_ptr, first_tile + tl.cdiv(own_count, row_block))
    _write_tiles(expert, place, own_count, first_tile, ends_ptr, tile_experts_ptr, tile_starts_ptr, row_block)
    if own_count > 0:
        own = (chosen == expert).to(tl.int32)
        at = place + tl.cumsum(own, 0) - 1
        tl.store(order_ptr + at, offsets, mask=own == 1)
        tl.store(places_ptr + offsets, at, mask=own == 1)


@triton.jit(do_not_specialize=["count"])
def _rank_kernel(chosen_ptr, places_ptr, counts_ptr, count, part: tl.constexpr, early: tl.constexpr):
    """Program i: number the choices i * part to (i + 1) * part among all those of the same expert, in any order."""
    wait_for_inputs(early)
    offsets = tl.program_id(0) * part + tl.arange(0, part)
    inside = offsets < count
    chosen = tl.load(chosen_ptr + offsets, mask=inside, other=0)
    ranks = tl.atomic_add(counts_ptr + chosen, 1, mask=inside, sem="relaxed")
    tl.store(places_ptr + offsets, ranks, mask=inside)


@triton.jit(do_not_specialize=["count", "num_experts"])
def _place_kernel(
    chosen_ptr, counts_ptr, starts_ptr, order_ptr, places_ptr, ends_ptr, tile_experts_ptr, tile_starts_ptr,
    num_tiles_ptr, count, num_experts,
    row_block: tl.constexpr, experts_block: tl.constexpr, part: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program i: from ranks to places of the choices i * part to (i + 1) * part; and the tiles of expert i."""
    wait_for_inputs(early)
    experts = tl.arange(0, experts_block)
    number = tl.program_id(0)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0, cache_modifier=".cg")
    starts = tl.cumsum(counts, 0) - counts
    starts_ptr += number * experts_block
    tl.store(starts_ptr + experts, starts)
    tl.debug_barrier()
    offsets = number * part + tl.arange(0, part)
    inside = offsets < count
    chosen = tl.load(chosen_ptr + offsets, mask=inside, other=0)
    at = tl.load(places_ptr + offsets, mask=inside, other=0) + tl.load(starts_ptr + chosen, mask=inside, other=0)
    tl.store(order_ptr + at, offsets, mask=inside)
    tl.store(places_ptr + offsets, at, mask=inside)
    if number < num_experts:
        tiles = tl.cdiv(counts, row_block)
        own = experts == number
        place = tl.sum(tl.where(own, starts, 0), 0)
        own_count = tl.sum(tl.where(own, counts, 0), 0)
        first_tile = tl.sum(tl.where(experts < number, tiles, 0), 0)
        _write_tiles(number, place, own_count, first_tile, ends_ptr, tile_experts_ptr, tile_starts_ptr, row_block)
        if number == 0:
            tl.store(num_tiles_ptr, tl.sum(tiles, 0))
    if tl.atomic_add(counts_ptr + experts_block, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counts_ptr + experts, tl.zeros([experts_block], tl.int32))  # ready for the next launch
        tl.store(counts_ptr + experts_block, 0)


def group(chosen: torch.Tensor, num_experts: int, row_block: int) -> Groups:
    """Sort the choices of `chosen` [T, K] int32 by expert, on the device."""
    count = chosen.numel()
    most_tiles = min(num_experts, count) + count // row_block
    order, places, ends, experts, starts, num_tiles = (
        torch.empty(size, dtype=torch.int32, device=chosen.device)
        for size in (count, count, num_experts, most_tiles, most_tiles, 1)
    )
    experts_block = next_power_of_2(num_experts)
    options = {"experts_block": experts_block, **early_launch(chosen.device)}
    if count <= _ONE_LAUNCH:
        launch(
            _group_kernel, (num_experts,),
            chosen, order, places, ends, experts, starts, num_tiles, count,
            row_block=row_block, block=max(next_power_of_2(count), 128), num_warps=4, **options,
        )  # fmt: skip
    else:
        parts = max(cdiv(count, _PART), num_experts)  # the last ones may be empty: each writes an expert's tiles too
        counts = _zeros(chosen.device, 2 * experts_block, "ranks")
        first_places = torch.empty((parts, experts_block), dtype=torch.int32, device=chosen.device)
        launch(
            _rank_kernel,
            (cdiv(count, _PART),),
            chosen,
            places,
            counts,
            count,
            part=_PART,
            num_warps=4,
            **early_launch(chosen.device),
        )
        launch(
            _place_kernel, (parts,),
            chosen, counts, first_places, order, places, ends, experts, starts, num_tiles, count, num_experts,
            row_block=row_block, part=_PART, num_warps=4, **options,
        )  # fmt: skip
    return Groups(order, places, ends, experts, starts, num_tiles, row_block)
