"""The choice of a token on the device.

Roofline of the greedy choice: logits are read once, 4 bytes each. A row is cut into parts so that few rows fill the
card too; the program that finishes a row's last part compares the parts' winners: one launch in place of a dozen.

Filters need no sorted vocabulary. Each keeps the tokens from some scaled logit on, and that one is found by search over
the bits of a float32: a program a row halves the interval twice with each pass over the row, 16 passes at most, against
some 60 of a sort that also writes.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import early_launch, next_power_of_2, wait_for_inputs
from trine.kernels.triton.launch import launch

_PARTS = 16
_BLOCK = 2048


@triton.jit
def _argmax_kernel(
    logits_ptr, largest_ptr, tokens_ptr, part_largest_ptr, part_tokens_ptr, arrivals_ptr, rows_ptr, last_token_ptr,
    width, row_stride, chooses: tl.constexpr, parts: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program (row, part): the largest logit of a part of a row and the first column that has it.

    The program that comes last has the row's: its outputs, or if it `chooses` the token alone.
    """
    wait_for_inputs(early)
    row = tl.program_id(0)
    part = tl.program_id(1)
    part_width = tl.cdiv(tl.cdiv(width, parts), block) * block
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    start = part * part_width
    largest = -float("inf")
    token = start
    for first in range(start, tl.minimum(start + part_width, width), block):
        columns = first + tl.arange(0, block)
        x = tl.load(row_ptr + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))
        block_largest, place = tl.max(x, 0, return_indices=True)
        if block_largest > largest:
            largest = block_largest
            token = first + place
    tl.store(part_largest_ptr + row * parts + part, largest)
    tl.store(part_tokens_ptr + row * parts + part, token)
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == parts - 1:
        every = row * parts + tl.arange(0, parts)
        winner, winning_part = tl.max(tl.load(part_largest_ptr + every, cache_modifier=".cg"), 0, return_indices=True)
        chosen = tl.load(part_tokens_ptr + row * parts + winning_part, cache_modifier=".cg").to(tl.int64)
        if chooses:
            finite = winner - winner == 0.0  # infinity and NaN give NaN
            tl.store(last_token_ptr + tl.load(rows_ptr + row), tl.where(finite, chosen, 0))
            chosen = tl.where(finite, chosen, -1)
        else:
            tl.store(largest_ptr + row, winner)
        tl.store(tokens_ptr + row, chosen)
        tl.store(arrivals_ptr + row, 0)  # ready for the next launch


@cache
def _arrivals(device: torch.device, size: int) -> torch.Tensor:
    """Zeroed counters, which every launch leaves at zero: kernels of one device run in one stream at a time."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest logit [B] float32 and the first token that has it [B] int64, of logits [B, V] of any float type.

    A NaN counts as infinity, so that a row with one has no finite largest logit.
    """
    largest = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return largest, _launch(logits, largest, None, None)


def choose_greedy(logits: torch.Tensor, rows: torch.Tensor, last_token: torch.Tensor) -> torch.Tensor:
    """The first token with the largest logit [B] int64, -1 where that is not finite; logits [B, V].

    It becomes `last_token` of the rows `rows` [B] int64 too, 0 in place of -1.
    """
    return _launch(logits, None, rows, last_token)


def _launch(
    logits: torch.Tensor, largest: torch.Tensor | None, rows: torch.Tensor | None, last_token: torch.Tensor | None
) -> torch.Tensor:
    count, width = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    part_largest = torch.empty((count, _PARTS), dtype=torch.float32, device=logits.device)
    part_tokens = torch.empty((count, _PARTS), dtype=torch.int32, device=logits.device)
    if count:
        launch(
            _argmax_kernel,
            (count, _PARTS),
            logits,
            largest,
            tokens,
            part_largest,
            part_tokens,
            _arrivals(logits.device, max(4096, next_power_of_2(count))),
            rows,
            last_token,
            width,
            logits.stride(0),
            chooses=rows is not None,
            parts=_PARTS,
            block=_BLOCK,
            num_warps=8,
            **early_launch(logits.device),
        )
    return tokens


_LEAST_BITS = 0x41C80000  # of 25: scaled logits below -24.3 have weight 0, see trine.llm.sampling.distribution
_WEIGHT_ONE = float(1 << 34)
_SEARCH_BLOCK = 4096


@triton.jit
def _counts(u, z, weighted: tl.constexpr, one: tl.constexpr, least_bits: tl.constexpr):
    """What a token adds to the sum that a filter looks at: 1, or its weight; int64."""
    if weighted:
        weight = tl.floor(tl.exp(z) * one + 0.5)
        return tl.where(u <= least_bits, weight, 0.0).to(tl.int64)
    return tl.where(u <= least_bits, 1, 0).to(tl.int64)


@triton.jit
def _sum_to(
    row_ptr, width, first, second, third,
    weighted: tl.constexpr, one: tl.constexpr, least_bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sums over the tokens whose bits are at most `first`, `second`, `third`: three int64."""
    zero = tl.zeros([block], tl.int64)
    to_first, to_second, to_third = zero, zero, zero
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        z = tl.load(row_ptr + columns, mask=columns < width, other=-float("inf"))
        u = z.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        count = _counts(u, z, weighted, one, least_bits)
        to_first += tl.where(u <= first, count, zero)
        to_second += tl.where(u <= second, count, zero)
        to_third += tl.where(u <= third, count, zero)
    return tl.sum(to_first, 0), tl.sum(to_second, 0), tl.sum(to_third, 0)


@triton.jit
def _search(
    row_ptr, width, high, goal,
    weighted: tl.constexpr, one: tl.constexpr, least_bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The fewest bits, at most `high`, up to which the sum reaches `goal` (float64); `high` if it never does."""
    low = high * 0
    while low < high:
        quarter = (high - low) // 4
        first, second, third = low + quarter, low + 2 * quarter, low + 3 * quarter
        a, b, c = _sum_to(row_ptr, width, first, second, third, weighted, one, least_bits, block)
        below_first, below_second = a.to(tl.float64) >= goal, b.to(tl.float64) >= goal
        below_third = c.to(tl.float64) >= goal
        high = tl.where(below_first, first, tl.where(below_second, second, tl.where(below_third, third, high)))
        low = tl.where(
            below_first, low, tl.where(below_second, first + 1, tl.where(below_third, second + 1, third + 1))
        )
    return high


@triton.jit
def _threshold_kernel(
    z_ptr, top_k_ptr, top_p_ptr, min_z_ptr, limit_ptr, width, row_stride,
    has_top_k: tl.constexpr, has_top_p: tl.constexpr, has_min_z: tl.constexpr,
    one: tl.constexpr, least_bits: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program r: the smallest scaled logit of row r that passes its filters. Bits are those of its absolute value."""
    wait_for_inputs(early)
    row = tl.program_id(0)
    row_ptr = z_ptr + row.to(tl.int64) * row_stride
    bits = row * 0 + least_bits
    if has_top_k:
        top_k = tl.load(top_k_ptr + row)
        if top_k > 0:
            bits = _search(row_ptr, width, bits, top_k.to(tl.float64), False, one, least_bits, block)
    if has_top_p:
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            total, _, _ = _sum_to(row_ptr, width, bits, bits, bits, True, one, least_bits, block)
            bits = _search(row_ptr, width, bits, total.to(tl.float64) * top_p, True, one, least_bits, block)
    limit = -bits.to(tl.float32, bitcast=True)
    if has_min_z:
        limit = tl.maximum(limit, tl.load(min_z_ptr + row).to(tl.float32))
    tl.store(limit_ptr + row, limit)


def thresholds(
    z: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, min_z: torch.Tensor | None
) -> torch.Tensor:
    """`trine.llm.sampling.distribution.thresholds` without sorting: [B, 1] float32, of z [B, V] float32, at most 0.

    Tokens without weight count for nothing here: where top_k asks for them too, the result is -25, which keeps all that
    have some.
    """
    # The sampler's are columns of one table: the kernel counts in elements of a row of its own.
    top_k, top_p, min_z = (None if column is None else column.contiguous() for column in (top_k, top_p, min_z))
    limit = torch.empty((z.shape[0], 1), dtype=torch.float32, device=z.device)
    if z.shape[0]:
        launch(
            _threshold_kernel,
            (z.shape[0],),
            z,
            top_k,
            top_p,
            min_z,
            limit,
            z.shape[1],
            z.stride(0),
            has_top_k=top_k is not None,
            has_top_p=top_p is not None,
            has_min_z=min_z is not None,
            one=_WEIGHT_ONE,
            least_bits=_LEAST_BITS,
            block=min(_SEARCH_BLOCK, next_power_of_2(z.shape[1])),
            num_warps=16,
            **early_launch(z.device),
        )
    return limit
