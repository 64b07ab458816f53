"""What prompts' attention has to do in a step, found on the device in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import cdiv, early_launch, sequences_block, wait_for_inputs
from trine.kernels.triton.launch import launch
from trine.kernels.types import PagedBatch


@triton.jit
def _tiles(
    numbers, ends, query_start_ptr, seq_lens_ptr,
    tokens_block: tl.constexpr,
):  # fmt: skip
    """Of tiles `numbers` [n]: sequence, first packed token, new tokens, those before, first new one, keys; 0 keys and
    tokens where there is none. `ends` [sequences]: tiles up to each sequence's last.
    """
    passed = ends[None, :] <= numbers[:, None]
    sequence = tl.sum(passed.to(tl.int32), 1)
    first = (numbers - tl.max(tl.where(passed, ends[None, :], 0), 1)) * tokens_block
    exists = numbers < tl.max(ends, 0)
    start = tl.load(query_start_ptr + sequence, mask=exists, other=0)
    count = tl.load(query_start_ptr + sequence + 1, mask=exists, other=0) - start
    before = tl.load(seq_lens_ptr + sequence, mask=exists, other=0) - count
    keys = tl.where(exists, before + tl.minimum(first + tokens_block, count), 0)
    return tl.where(exists, sequence, 0), start, count, before, first, keys


@triton.jit(do_not_specialize=["first_sequence", "num_sequences", "num_tiles"])
def _ordered_tiles_kernel(
    query_start_ptr, seq_lens_ptr, tiles_ptr, first_sequence, num_sequences, num_tiles,
    tokens_block: tl.constexpr, sequences_block: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program i: puts tiles i * block to (i + 1) * block where the number of those with more keys says."""
    wait_for_inputs(early)
    query_start_ptr += first_sequence
    seq_lens_ptr += first_sequence
    sequences = tl.arange(0, sequences_block)
    in_batch = sequences < num_sequences
    starts = tl.load(query_start_ptr + sequences, mask=in_batch, other=0)
    stops = tl.load(query_start_ptr + sequences + 1, mask=in_batch, other=0)
    ends = tl.cumsum(tl.cdiv(stops - starts, tokens_block), 0)
    numbers = tl.program_id(0) * block + tl.arange(0, block)
    sequence, start, count, before, first, keys = _tiles(numbers, ends, query_start_ptr, seq_lens_ptr, tokens_block)
    place = tl.zeros([block], tl.int32)
    for other in range(0, num_tiles, block):
        others = other + tl.arange(0, block)
        _sequence, _start, _count, _before, _first, their_keys = _tiles(
            others, ends, query_start_ptr, seq_lens_ptr, tokens_block
        )
        earlier = (their_keys[None, :] == keys[:, None]) & (others[None, :] < numbers[:, None])
        ahead = (their_keys[None, :] > keys[:, None]) | earlier
        place += tl.sum(ahead.to(tl.int32), 1)
    inside = numbers < num_tiles
    tl.store(tiles_ptr + place, sequence + first_sequence, mask=inside)
    tl.store(tiles_ptr + num_tiles + place, start, mask=inside)
    tl.store(tiles_ptr + 2 * num_tiles + place, count, mask=inside)
    tl.store(tiles_ptr + 3 * num_tiles + place, before, mask=inside)
    tl.store(tiles_ptr + 4 * num_tiles + place, first, mask=inside)


def ordered_tiles(batch: PagedBatch, tokens_block: int) -> torch.Tensor:
    """What there is to do in a step, most keys first: int32 [5, tiles], a column a tile of `tokens_block` tokens.

    Rows: the sequence, its first token in the packed order, how many new tokens it has, how many came before, the
    tile's first among the new ones. The last columns may be of no sequence: 0 new tokens. Lengths are read on the
    device; all layers of a step share the result.
    """
    num_sequences = batch.seq_lens.shape[0] - batch.num_decodes
    # each sequence adds at most one tile that is not full
    most = cdiv(batch.positions.shape[0] - batch.num_decodes, tokens_block) + num_sequences
    tiles = torch.empty((5, most), dtype=torch.int32, device=batch.seq_lens.device)
    width = sequences_block(num_sequences)
    block = max(16384 // max(width, 256), 16)
    launch(
        _ordered_tiles_kernel,
        (cdiv(most, block),),
        batch.query_start,
        batch.seq_lens,
        tiles,
        batch.num_decodes,
        num_sequences,
        most,
        tokens_block=tokens_block,
        sequences_block=width,
        block=block,
        num_warps=8,
        **early_launch(tiles.device),
    )
    return tiles
