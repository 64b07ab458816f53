"""The inputs of a decode step, made on the device from what the rows of running sequences hold there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import early_launch, wait_for_inputs
from trine.kernels.triton.launch import launch
from trine.kernels.types import PagedBatch

_BLOCK = 1024
HEADER = 2  # numbers before the entries: how many there are, and columns of their block tables
FIELDS = 4  # of an entry: row, length with the new token, token or -1 for the row's last one, new block or 0


@triton.jit
def _stage_kernel(
    step_ptr, last_token_ptr, table_ptr, table_stride, spare_row, block_size,
    to_token_ids_ptr, to_positions_ptr, to_slots_ptr, to_seq_lens_ptr, to_rows_ptr, to_table_ptr, to_stride,
    header: tl.constexpr, fields: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program e: entry e, or past their number a sequence of one token in block 0."""
    wait_for_inputs(early)
    entry = tl.program_id(0).to(tl.int64)
    used = entry < tl.load(step_ptr)
    own_width = tl.where(used, tl.load(step_ptr + 1), 0)
    width = tl.maximum(own_width, 1)
    entry_ptr = step_ptr + header + entry * fields
    row = tl.load(entry_ptr, mask=used, other=0).to(tl.int64)
    length = tl.load(entry_ptr + 1, mask=used, other=1)
    token = tl.load(entry_ptr + 2, mask=used, other=0).to(tl.int64)
    new_block = tl.load(entry_ptr + 3, mask=used, other=0)
    if token < 0:
        token = tl.load(last_token_ptr + row)
    newest = (length - 1) // block_size
    table_row_ptr = table_ptr + row * table_stride
    own = tl.where(new_block > 0, new_block, tl.load(table_row_ptr + newest, mask=used, other=0))
    tl.store(table_row_ptr + newest, own, mask=new_block > 0)
    tl.store(to_token_ids_ptr + entry, token)
    tl.store(to_positions_ptr + entry, (length - 1).to(tl.int64))
    tl.store(to_slots_ptr + entry, own.to(tl.int64) * block_size + (length - 1) % block_size)
    tl.store(to_seq_lens_ptr + entry, length)
    tl.store(to_rows_ptr + entry, tl.where(used, row, spare_row))
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        blocks = tl.load(table_row_ptr + columns, mask=columns < own_width, other=0)
        tl.store(to_table_ptr + entry * to_stride + columns, tl.where(columns == newest, own, blocks), mask=inside)


def stage_decode(
    step: torch.Tensor,
    last_token: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    token_ids: torch.Tensor,
    rows: torch.Tensor,
    batch: PagedBatch,
) -> None:
    """Write the decode step that `step` describes into token_ids [n] and rows [n] int64 and the batch of n sequences.

    step int32: HEADER numbers, then FIELDS for each of up to n entries. last_token [R + 1] int64 and table [R, columns]
    int32 belong to the rows of running sequences; an entry's new block goes into the table too. Entries past those in
    `step` become sequences of one token in block 0, which belongs to no one, and of row R, which nobody has. Block
    tables keep what is right of the columns in use.
    """
    launch(
        _stage_kernel,
        (token_ids.shape[0],),
        step,
        last_token,
        table,
        table.stride(0),
        last_token.shape[0] - 1,
        block_size,
        token_ids,
        batch.positions,
        batch.slots,
        batch.seq_lens,
        rows,
        batch.block_table,
        batch.block_table.stride(0),
        header=HEADER,
        fields=FIELDS,
        block=_BLOCK,
        num_warps=4,
        **early_launch(token_ids.device),
    )
