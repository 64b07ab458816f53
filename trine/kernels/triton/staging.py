"""The inputs of a small step, made on the device from what the rows of running sequences hold there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import early_launch, wait_for_inputs
from trine.kernels.triton.launch import launch
from trine.kernels.types import PagedBatch

_BLOCK = 1024
HEADER = 5
"""Numbers before the entries: of decodes, of prompts, of prompt tokens, of columns of their block tables, and of tokens
up to those that pad at the end, which these kernels don't read."""
FIELDS = 4
"""Numbers of an entry: row, length with the new tokens; of a decode the token or -1 for the row's last one, new block
or 0; of a prompt where its tokens begin among the prompts' tokens, 0."""


@triton.jit
def _stage_decodes_kernel(
    step_ptr, last_token_ptr, table_ptr, table_stride, spare_row, block_size,
    to_token_ids_ptr, to_positions_ptr, to_slots_ptr, to_query_start_ptr, to_seq_lens_ptr, to_table_ptr, to_stride,
    to_rows_ptr, to_outputs_ptr,
    header: tl.constexpr, fields: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program e: entry e, or past their number a sequence of one token in block 0."""
    wait_for_inputs(early)
    entry = tl.program_id(0).to(tl.int64)
    used = entry < tl.load(step_ptr)
    own_width = tl.where(used, tl.load(step_ptr + 3), 0)
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
    tl.store(to_query_start_ptr + entry + 1, (entry + 1).to(tl.int32))
    tl.store(to_seq_lens_ptr + entry, length)
    place = tl.where(used, entry, entry + tl.load(step_ptr + 1))  # prompts come first
    tl.store(to_rows_ptr + place, tl.where(used, row, spare_row))
    tl.store(to_outputs_ptr + place, entry)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        inside = columns < width
        blocks = tl.load(table_row_ptr + columns, mask=columns < own_width, other=0)
        tl.store(to_table_ptr + entry * to_stride + columns, tl.where(columns == newest, own, blocks), mask=inside)


@triton.jit(do_not_specialize=["num_decodes", "num_tokens"])
def _stage_prompts_kernel(
    step_ptr, table_ptr, table_stride, spare_row, block_size, num_decodes, num_tokens,
    to_token_ids_ptr, to_positions_ptr, to_slots_ptr, to_query_start_ptr, to_seq_lens_ptr, to_table_ptr, to_stride,
    to_rows_ptr, to_outputs_ptr,
    header: tl.constexpr, fields: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program p: the p-th prompt, or past their number a sequence of no tokens; the last one takes what is left."""
    wait_for_inputs(early)
    prompt = tl.program_id(0).to(tl.int64)
    sequence = num_decodes + prompt
    decodes, prompts = tl.load(step_ptr), tl.load(step_ptr + 1)
    prompt_tokens, table_width = tl.load(step_ptr + 2), tl.load(step_ptr + 3)
    used = prompt < prompts
    entry = decodes + prompt
    entry_ptr = step_ptr + header + entry * fields
    row = tl.load(entry_ptr, mask=used, other=0).to(tl.int64)
    begin = tl.load(entry_ptr + 2, mask=used, other=0)
    begin = tl.where(used, begin, prompt_tokens)
    end = tl.load(entry_ptr + fields + 2, mask=prompt + 1 < prompts, other=0)
    end = tl.where(prompt + 1 < prompts, end, prompt_tokens)
    end = tl.where(prompt == tl.num_programs(0) - 1, num_tokens - num_decodes, end)
    count = end - begin
    own_count = tl.where(used, count, 0)
    length = tl.load(entry_ptr + 1, mask=used, other=0)
    length = tl.where(used, length, count)
    tl.store(to_query_start_ptr + sequence + 1, num_decodes + end)
    tl.store(to_seq_lens_ptr + sequence, length)
    place = tl.where(used, entry, sequence)
    tl.store(to_rows_ptr + place, tl.where(used, row, spare_row))
    tl.store(to_outputs_ptr + place, tl.where(used, num_decodes + end - 1, 0).to(tl.int64))
    tokens_ptr = step_ptr + header + (decodes + prompts) * fields
    blocks_ptr = tokens_ptr + prompt_tokens + prompt * table_width
    tokens_ptr += begin
    first = num_decodes + begin
    for start in range(0, count, block):
        token = start + tl.arange(0, block)
        inside = token < count
        own = token < own_count
        position = tl.where(used, length - count + token, 0)
        blocks = tl.load(blocks_ptr + position // block_size, mask=own, other=0).to(tl.int64)
        token_ids = tl.load(tokens_ptr + token, mask=own, other=0).to(tl.int64)
        tl.store(to_token_ids_ptr + first + token, token_ids, mask=inside)
        tl.store(to_positions_ptr + first + token, position.to(tl.int64), mask=inside)
        offset = tl.where(used, position, token) % block_size
        tl.store(to_slots_ptr + first + token, blocks * block_size + offset, mask=inside)
    own_width = tl.where(used, table_width, 0)
    width = tl.where(used, table_width, tl.cdiv(count, block_size))
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        blocks = tl.load(blocks_ptr + columns, mask=columns < own_width, other=0)
        tl.store(table_ptr + row * table_stride + columns, blocks, mask=columns < own_width)
        tl.store(to_table_ptr + sequence * to_stride + columns, blocks, mask=columns < width)


def stage(
    step: torch.Tensor,
    last_token: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    token_ids: torch.Tensor,
    batch: PagedBatch,
    rows: torch.Tensor,
    output_rows: torch.Tensor,
) -> None:
    """Write the step that `step` describes into token_ids [T] int64 and the batch of T tokens of S sequences.

    step int32: HEADER numbers, FIELDS for each entry, decodes first, the prompts' tokens, their block tables. There are
    at most `batch.num_decodes` decodes and fewer prompts than sequences behind them, if there are any; or none of
    either. last_token [R + 1] int64 and table [R, columns] int32 belong to the rows of running sequences; a decode's
    new block goes into the table too, and what comes for prompts. Decodes past those in `step` become sequences of one
    token in block 0, which belongs to no one; tokens past the prompts' one sequence in that block, the last; the others
    have no tokens. Block tables keep what is right of the columns in use.

    rows and output_rows [S] int64: each entry's row and last token, in their order, then row R, which nobody has.
    """
    to = (
        token_ids,
        batch.positions,
        batch.slots,
        batch.query_start,
        batch.seq_lens,
        batch.block_table,
        batch.block_table.stride(0),
        rows,
        output_rows,
    )
    spare_row = last_token.shape[0] - 1
    own = {"header": HEADER, "fields": FIELDS, "block": _BLOCK, "num_warps": 4, **early_launch(token_ids.device)}
    if batch.num_decodes:
        launch(
            _stage_decodes_kernel,
            (batch.num_decodes,),
            step,
            last_token,
            table,
            table.stride(0),
            spare_row,
            block_size,
            *to,
            **own,
        )
    num_prompts = batch.seq_lens.shape[0] - batch.num_decodes
    if num_prompts:
        launch(
            _stage_prompts_kernel,
            (num_prompts,),
            step,
            table,
            table.stride(0),
            spare_row,
            block_size,
            batch.num_decodes,
            token_ids.shape[0],
            *to,
            **own,
        )
