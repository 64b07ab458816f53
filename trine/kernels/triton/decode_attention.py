"""Attention of sequences with one new token each: flash-decoding over the paged cache (Dao et al. 2023).

Bound by memory: every key and value is read once, for all query heads of its group together. A sequence is cut into
pieces of a size that follows from its own length, so that its result does not depend on its neighbours. A fixed number
of programs takes the pieces (sequence, piece, key-value head) in turn: the grid does not depend on the lengths, which
are read on the device, so a captured graph serves any lengths. The program that finishes a sequence's last piece
merges them, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import num_multiprocessors, sequences_block
from trine.kernels.types import PagedBatch

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """The free choices of the kernel. They change its speed and, in the last bits, its rounding."""

    kv_block: int = 64  # positions a step of the inner loop
    min_piece: int = 64  # positions of a piece are a multiple of this ...
    max_pieces: int = 32  # ... the smallest one that cuts the sequence into no more pieces than this
    programs_per_sm: int = 4
    num_warps: int = 4
    num_stages: int = 2


@triton.jit
def _merge(
    m_ptr, sums_ptr, acc_ptr, out_ptr, num_pieces, group: tl.constexpr, head_dim: tl.constexpr,
    max_pieces: tl.constexpr, merge_block: tl.constexpr, group_block: tl.constexpr, dim_block: tl.constexpr,
):  # fmt: skip
    """Combine the pieces of one sequence and key-value head, and write its `group` output rows.

    A piece has its scores' largest value m, the sum of exp2(score - m) and the values weighted so, acc [head_dim].
    The loads go around the first-level cache: other programs wrote what is read.
    """
    heads = tl.arange(0, group_block)
    dims = tl.arange(0, dim_block)
    every = tl.arange(0, max_pieces)
    known = (every < num_pieces)[:, None] & (heads < group)[None, :]
    tops = tl.load(m_ptr + every[:, None] * group + heads[None, :], mask=known, other=-1e30, cache_modifier=".cg")
    top = tl.max(tops, 0)
    total = tl.zeros([group_block], tl.float32)
    acc = tl.zeros([group_block, dim_block], tl.float32)
    for first in range(0, num_pieces, merge_block):
        pieces = first + tl.arange(0, merge_block)
        present = (pieces < num_pieces)[:, None] & (heads < group)[None, :]
        rows = pieces[:, None] * group + heads[None, :]
        m = tl.load(m_ptr + rows, mask=present, other=-1e30, cache_modifier=".cg")
        sums = tl.load(sums_ptr + rows, mask=present, other=0.0, cache_modifier=".cg")
        weight = tl.where(present, tl.exp2(m - top[None, :]), 0.0)
        total += tl.sum(weight * sums, 0)
        part = tl.load(
            acc_ptr + rows[:, :, None] * head_dim + dims[None, None, :],
            mask=present[:, :, None] & (dims < head_dim)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        acc += tl.sum(weight[:, :, None] * part, 0)
    inside = (heads < group)[:, None] & (dims < head_dim)[None, :]
    total = tl.where(heads < group, total, 1.0)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + heads[:, None] * head_dim + dims[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["num_sequences", "window", "table_stride"])
def _decode_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr, out_ptr, m_ptr, sums_ptr, acc_ptr, arrivals_ptr,
    num_sequences, num_kv_heads, window, scale,
    table_stride, cache_block_stride, cache_head_stride, cache_token_stride,
    has_window: tl.constexpr, block_size: tl.constexpr, group: tl.constexpr, head_dim: tl.constexpr,
    kv_block: tl.constexpr, min_piece: tl.constexpr, max_pieces: tl.constexpr,
    group_block: tl.constexpr, merge_group_block: tl.constexpr, merge_block: tl.constexpr,
    dim_block: tl.constexpr, sequences_block: tl.constexpr,
):  # fmt: skip
    """Take pieces `program`, `program + programs`, ... of all sequences' pieces times key-value heads."""
    sequences = tl.arange(0, sequences_block)
    lengths = tl.load(seq_lens_ptr + sequences, mask=sequences < num_sequences, other=0)
    if has_window:
        lengths = tl.minimum(lengths, window)
    piece_sizes = tl.maximum(tl.cdiv(lengths, max_pieces * min_piece), 1) * min_piece
    ends = tl.cumsum(tl.cdiv(lengths, piece_sizes), 0)
    total = tl.max(ends, 0) * num_kv_heads

    rows = tl.arange(0, group_block)
    dims = tl.arange(0, dim_block)
    q_mask = (rows < group)[:, None] & (dims < head_dim)[None, :]
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        unit = item // num_kv_heads
        head = item % num_kv_heads
        sequence = tl.sum((ends <= unit).to(tl.int32), 0)
        piece = unit - tl.max(tl.where(ends <= unit, ends, 0), 0)
        length = tl.load(seq_lens_ptr + sequence)
        begin = 0
        if has_window:
            begin = tl.maximum(length - window, 0)
        piece_size = tl.maximum(tl.cdiv(length - begin, max_pieces * min_piece), 1) * min_piece
        num_pieces = tl.cdiv(length - begin, piece_size)
        start = begin + piece * piece_size
        stop = tl.minimum(start + piece_size, length)

        first_row = (sequence * num_kv_heads + head).to(tl.int64) * group
        q = tl.load(q_ptr + (first_row + rows)[:, None] * head_dim + dims[None, :], mask=q_mask, other=0.0)
        table_row_ptr = block_table_ptr + sequence.to(tl.int64) * table_stride
        head_offset = head.to(tl.int64) * cache_head_stride
        m = tl.full([group_block], -1e30, tl.float32)
        sums = tl.zeros([group_block], tl.float32)
        acc = tl.zeros([group_block, dim_block], tl.float32)
        for position in range(start, stop, kv_block):
            positions = position + tl.arange(0, kv_block)
            visible = positions < stop
            block = tl.load(table_row_ptr + positions // block_size, mask=visible, other=0).to(tl.int64)
            offset = block * cache_block_stride + head_offset + (positions % block_size) * cache_token_stride
            kv_mask = visible[:, None]
            if head_dim < dim_block:
                kv_mask = kv_mask & (dims < head_dim)[None, :]
            k = tl.load(k_cache_ptr + offset[:, None] + dims[None, :], mask=kv_mask, other=0.0)
            v = tl.load(v_cache_ptr + offset[:, None] + dims[None, :], mask=kv_mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(visible[None, :], scores, -float("inf"))
            new_m = tl.maximum(m, tl.max(scores, 1))
            p = tl.exp2(scores - new_m[:, None])
            rescale = tl.exp2(m - new_m)
            sums = sums * rescale + tl.sum(p, 1)
            acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            m = new_m

        if num_pieces == 1:
            out = (acc / sums[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + (first_row + rows)[:, None] * head_dim + dims[None, :], out, mask=q_mask)
        else:
            pieces_row = (sequence * num_kv_heads + head).to(tl.int64) * max_pieces
            row = (pieces_row + piece) * group + rows
            tl.store(m_ptr + row, m, mask=rows < group)
            tl.store(sums_ptr + row, sums, mask=rows < group)
            tl.store(acc_ptr + row[:, None] * head_dim + dims[None, :], acc, mask=q_mask)
            tl.debug_barrier()  # all of this program's stores come before its arrival
            arrival_ptr = arrivals_ptr + sequence * num_kv_heads + head
            if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == num_pieces - 1:
                _merge(
                    m_ptr + pieces_row * group, sums_ptr + pieces_row * group, acc_ptr + pieces_row * group * head_dim,
                    out_ptr + first_row * head_dim, num_pieces, group, head_dim,
                    max_pieces, merge_block, merge_group_block, dim_block,
                )  # fmt: skip
                tl.store(arrival_ptr, 0)  # ready for the next launch


@cache
def _arrivals(device: torch.device, size: int) -> torch.Tensor:
    """Zeroed counters, which every launch leaves at zero: kernels of one device run in one stream at a time."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
    tuning: DecodeTuning | None = None,
) -> None:
    """Attention of the first `batch.num_decodes` rows of q [T, Hq, D] into those of out [T, Hq * D]."""
    tuning = tuning or DecodeTuning()
    _, num_heads, head_dim = q.shape
    num_sequences = batch.num_decodes
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    dim_block = max(triton.next_power_of_2(head_dim), 16)
    merge_group_block = triton.next_power_of_2(group)
    units = num_sequences * num_kv_heads
    stats = torch.empty((2, units, tuning.max_pieces, group), dtype=torch.float32, device=q.device)
    acc = torch.empty((units, tuning.max_pieces, group, head_dim), dtype=torch.float32, device=q.device)
    programs = min(num_multiprocessors(q.device) * tuning.programs_per_sm, units * tuning.max_pieces)
    _decode_kernel[(programs,)](
        q,
        k_cache,
        v_cache,
        batch.block_table,
        batch.seq_lens,
        out,
        stats[0],
        stats[1],
        acc,
        _arrivals(q.device, max(65536, triton.next_power_of_2(units))),
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
        kv_block=tuning.kv_block if head_dim <= 128 else tuning.kv_block // 2,
        min_piece=tuning.min_piece,
        max_pieces=tuning.max_pieces,
        group_block=max(merge_group_block, 16),
        merge_group_block=merge_group_block,
        merge_block=min(max(8192 // (merge_group_block * dim_block), 1), tuning.max_pieces),
        dim_block=dim_block,
        sequences_block=sequences_block(num_sequences),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
