"""The choice of a token on the device.

Roofline: logits are read once, 4 bytes each. A row is cut into parts so that few rows fill the card too; the program
that finishes a row's last part compares the parts' winners, so it is one launch in place of a dozen small ones.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import early_launch, wait_for_inputs

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
        _argmax_kernel[(count, _PARTS)](
            logits,
            largest,
            tokens,
            part_largest,
            part_tokens,
            _arrivals(logits.device, max(4096, triton.next_power_of_2(count))),
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
