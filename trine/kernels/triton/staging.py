"""Copy a decode step's inputs to where a captured graph reads them: one launch instead of five copies and fills."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import early_launch, wait_for_inputs
from trine.kernels.types import PagedBatch

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows", "width", "source_stride", "target_stride"])
def _stage_kernel(
    token_ids_ptr, positions_ptr, slots_ptr, seq_lens_ptr, table_ptr,
    to_token_ids_ptr, to_positions_ptr, to_slots_ptr, to_seq_lens_ptr, to_table_ptr,
    num_rows, width, source_stride, target_stride, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program r fills row r: from row r of the sources, or past their end with one token in block 0."""
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    used = tl.program_id(0) < num_rows
    source_width = tl.where(used, width, 0)
    tl.store(to_token_ids_ptr + row, tl.load(token_ids_ptr + row, mask=used, other=0))
    tl.store(to_positions_ptr + row, tl.load(positions_ptr + row, mask=used, other=0))
    tl.store(to_slots_ptr + row, tl.load(slots_ptr + row, mask=used, other=0))
    tl.store(to_seq_lens_ptr + row, tl.load(seq_lens_ptr + row, mask=used, other=1))
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        blocks = tl.load(table_ptr + row * source_stride + columns, mask=columns < source_width, other=0)
        tl.store(to_table_ptr + row * target_stride + columns, blocks, mask=inside)


def stage_decode(token_ids: torch.Tensor, batch: PagedBatch, to_token_ids: torch.Tensor, to_batch: PagedBatch) -> None:
    """Write token_ids [n] and the batch of n decode rows into `to_token_ids` [m] and `to_batch`, m >= n.

    Rows from n on become sequences of one token in block 0, which belongs to no one. Block tables keep their old
    columns past the source's width.
    """
    width = batch.block_table.shape[1]
    if width > to_batch.block_table.shape[1]:
        raise ValueError(f"block table of {width} columns, but the graphs hold {to_batch.block_table.shape[1]}")
    _stage_kernel[(to_token_ids.shape[0],)](
        token_ids,
        batch.positions,
        batch.slots,
        batch.seq_lens,
        batch.block_table,
        to_token_ids,
        to_batch.positions,
        to_batch.slots,
        to_batch.seq_lens,
        to_batch.block_table,
        token_ids.shape[0],
        width,
        batch.block_table.stride(0),
        to_batch.block_table.stride(0),
        block=_BLOCK,
        num_warps=4,
        **early_launch(token_ids.device),
    )
