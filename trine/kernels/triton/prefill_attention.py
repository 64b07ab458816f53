"""Attention of sequences with several new tokens: flash attention (Dao 2023) that reads keys and values by block table.

Bound by arithmetic in long prompts: 4 * D operations for each pair of a query and a key that it sees. A program
holds up to `row_block` query rows of one key-value head, the group's query heads side by side, and walks over the
keys from the first one that any row sees to the diagonal; only blocks on the diagonal, and all under a window, are
masked.
The walk starts at a multiple of `kv_block`, so that a row's sums do not depend on how a prompt was cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from trine.kernels.triton.decode_attention import LOG2_E
from trine.kernels.triton.device import (
    cdiv,
    early_launch,
    hopper_kernels,
    next_power_of_2,
    sequences_block,
    wait_for_inputs,
)
from trine.kernels.triton.launch import launch
from trine.kernels.types import PagedBatch


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    """The free choices of the kernel. They change its speed and, in the last bits, its rounding."""

    row_block: int = 128  # query rows (tokens times heads of the group) of a program
    kv_block: int = 128  # positions a step of the inner loop
    num_warps: int = 8
    num_stages: int = 3


def _tuning(head_dim: int, dtype: torch.dtype) -> PrefillTuning:
    """What fits the registers and the shared memory of a multiprocessor."""
    if dtype == torch.float32:
        return PrefillTuning(row_block=32, kv_block=32, num_warps=4, num_stages=1)
    if head_dim > 128:
        return PrefillTuning(row_block=64, kv_block=32, num_warps=4, num_stages=2)
    return PrefillTuning()


@triton.jit
def _attend(
    q, m, sums, acc, k_cache_ptr, v_cache_ptr, table_row_ptr, position, stop, row_positions, window, scale,
    head_offset, cache_block_stride, cache_token_stride,
    masked: tl.constexpr, has_window: tl.constexpr, block_size: tl.constexpr, head_dim: tl.constexpr,
    kv_block: tl.constexpr, dim_block: tl.constexpr,
):  # fmt: skip
    """Add keys and values `position` to `position + kv_block` to the running softmax (m, sums, acc) of the rows."""
    dims = tl.arange(0, dim_block)
    positions = position + tl.arange(0, kv_block)
    present = positions < stop
    block = tl.load(table_row_ptr + positions // block_size, mask=present, other=0).to(tl.int64)
    offset = block * cache_block_stride + head_offset + (positions % block_size) * cache_token_stride
    kv_mask = present[:, None]
    if head_dim < dim_block:
        kv_mask = kv_mask & (dims < head_dim)[None, :]
    k = tl.load(k_cache_ptr + offset[:, None] + dims[None, :], mask=kv_mask, other=0.0)
    v = tl.load(v_cache_ptr + offset[:, None] + dims[None, :], mask=kv_mask, other=0.0)
    k = k.to(q.dtype)  # from a float8 cache
    v = v.to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if masked:
        visible = positions[None, :] <= row_positions[:, None]
        if has_window:
            visible = visible & (positions[None, :] > row_positions[:, None] - window)
        scores = tl.where(visible, scores, -float("inf"))
    new_m = tl.maximum(m, tl.max(scores, 1) * scale)
    p = tl.exp2(tl.fma(scores, scale, -new_m[:, None]))  # spelt out, so that masked and other blocks round alike
    rescale = tl.exp2(m - new_m)
    sums = sums * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return new_m, sums, acc


@triton.jit(do_not_specialize=["first_sequence", "num_sequences", "window", "table_stride"])
def _prefill_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr, query_start_ptr, out_ptr,
    first_sequence, num_sequences, num_kv_heads, window, scale,
    table_stride, cache_block_stride, cache_head_stride, cache_token_stride,
    has_window: tl.constexpr, block_size: tl.constexpr, group: tl.constexpr, head_dim: tl.constexpr,
    row_block: tl.constexpr, kv_block: tl.constexpr, dim_block: tl.constexpr, sequences_block: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """Program (i, h): the i-th tile from the end, of the sequences' tiles of `row_block // group` tokens; head h."""
    wait_for_inputs(early)
    tokens_block: tl.constexpr = row_block // group
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles have the most keys: they start first
    head = tl.program_id(1)
    sequences = tl.arange(0, sequences_block)
    in_batch = sequences < num_sequences
    starts = tl.load(query_start_ptr + first_sequence + sequences, mask=in_batch, other=0)
    stops = tl.load(query_start_ptr + first_sequence + sequences + 1, mask=in_batch, other=0)
    ends = tl.cumsum(tl.cdiv(stops - starts, tokens_block), 0)
    if tile >= tl.max(ends, 0):
        return
    sequence = first_sequence + tl.sum((ends <= tile).to(tl.int32), 0)
    tile -= tl.max(tl.where(ends <= tile, ends, 0), 0)
    query_start = tl.load(query_start_ptr + sequence)
    num_queries = tl.load(query_start_ptr + sequence + 1) - query_start
    num_before = tl.load(seq_lens_ptr + sequence) - num_queries

    rows = tl.arange(0, row_block)
    dims = tl.arange(0, dim_block)
    tokens = tile * tokens_block + rows // group
    heads = head * group + rows % group
    row_positions = num_before + tokens
    row_mask = ((tokens < num_queries) & (rows < tokens_block * group))[:, None] & (dims < head_dim)[None, :]
    row_offset = ((query_start + tokens).to(tl.int64) * (num_kv_heads * group) + heads)[:, None] * head_dim
    q = tl.load(q_ptr + row_offset + dims[None, :], mask=row_mask, other=0.0)

    first_position = num_before + tile * tokens_block
    stop = num_before + tl.minimum((tile + 1) * tokens_block, num_queries)
    start = 0
    unmasked_stop = (first_position + 1) // kv_block * kv_block
    if has_window:
        start = tl.maximum(first_position - window + 1, 0) // kv_block * kv_block
        unmasked_stop = start
    table_row_ptr = block_table_ptr + sequence.to(tl.int64) * table_stride
    head_offset = head.to(tl.int64) * cache_head_stride
    m = tl.full([row_block], -1e30, tl.float32)
    sums = tl.zeros([row_block], tl.float32)
    acc = tl.zeros([row_block, dim_block], tl.float32)
    for position in range(start, unmasked_stop, kv_block):
        m, sums, acc = _attend(
            q, m, sums, acc, k_cache_ptr, v_cache_ptr, table_row_ptr, position, stop, row_positions, window, scale,
            head_offset, cache_block_stride, cache_token_stride,
            False, has_window, block_size, head_dim, kv_block, dim_block,
        )  # fmt: skip
    for position in range(unmasked_stop, stop, kv_block):
        m, sums, acc = _attend(
            q, m, sums, acc, k_cache_ptr, v_cache_ptr, table_row_ptr, position, stop, row_positions, window, scale,
            head_offset, cache_block_stride, cache_token_stride,
            True, has_window, block_size, head_dim, kv_block, dim_block,
        )  # fmt: skip
    out = (acc / sums[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_offset + dims[None, :], out, mask=row_mask)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
    tuning: PrefillTuning | None = None,
) -> None:
    """Attention of the rows of q [T, Hq, D] from `batch.num_decodes` on, into those of out [T, Hq * D].

    Without a `tuning`, Hopper's own kernel runs where it can.
    """
    hopper = hopper_kernels(q.device, "hopper_attention") if tuning is None else None
    if hopper is not None and hopper.supports(q, k_cache):
        hopper.hopper_prefill_attention(q, k_cache, v_cache, batch, scale, sliding_window, out)
        return
    num_tokens, num_heads, head_dim = q.shape
    tuning = tuning or _tuning(head_dim, q.dtype)
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    row_block = max(tuning.row_block, next_power_of_2(group))
    num_sequences = batch.seq_lens.shape[0] - batch.num_decodes
    # each sequence adds at most one tile that is not full
    tiles = cdiv(num_tokens - batch.num_decodes, row_block // group) + num_sequences
    launch(
        _prefill_kernel,
        (tiles, num_kv_heads),
        q,
        k_cache,
        v_cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start,
        out,
        batch.num_decodes,
        num_sequences,
        num_kv_heads,
        sliding_window or 0,
        scale * LOG2_E,
        batch.block_table.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        has_window=sliding_window is not None,
        block_size=block_size,
        group=group,
        head_dim=head_dim,
        row_block=row_block,
        kv_block=tuning.kv_block,
        dim_block=max(next_power_of_2(head_dim), 16),
        sequences_block=sequences_block(num_sequences),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **early_launch(q.device),
    )
