"""Attention of sequences with one new token each: flash-decoding over the paged cache (Dao et al. 2023).

Roofline: every key and value is read once, for all query heads of its group together, so it is bound by memory: 4 * D
bytes for each position and key-value head in 16-bit types.

A sequence is cut into pieces of a size that follows from its own length alone. Programs (sequence and key-value head,
run) take a run of neighbouring pieces each. With many sequences one run takes all; with few, pieces are spread over as
many programs as fill the card, and the program that comes last merges them. Either way the pieces are computed alike
and added up in order, and what they are scaled by are powers of two, which is exact: a row's result does not depend on
how many rows there are. The grid follows from the number of sequences, and lengths are read on the device, so that a
captured graph serves any lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from trine.kernels import fp8
from trine.kernels.fp8 import Fp8Rows
from trine.kernels.triton.device import (
    cdiv,
    early_launch,
    hopper_kernels,
    next_power_of_2,
    num_multiprocessors,
    wait_for_inputs,
)
from trine.kernels.triton.launch import launch
from trine.kernels.types import PagedBatch

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """The free choices of the kernel. The first three change the rounding of results; the others only speed."""

    kv_block: int = 128  # positions a step of the inner loop, fewer where their keys take more than `kv_bytes`
    min_piece: int = 128  # positions of a piece are a multiple of this ...
    max_pieces: int = 32  # ... the smallest one that cuts the sequence into no more pieces than this
    programs_per_sm: int = 3  # with fewer, pieces are spread
    num_warps: int = 4
    num_stages: int = 3
    kv_bytes: int = 32768


@triton.jit
def _merge(
    m_ptr, sums_ptr, acc_ptr, out_ptr, num_pieces, v_scale, group: tl.constexpr, head_dim: tl.constexpr,
    max_pieces: tl.constexpr, ahead: tl.constexpr, group_block: tl.constexpr, dim_block: tl.constexpr,
):  # fmt: skip
    """Add up the pieces of one sequence and key-value head in order, and write its `group` output rows.

    A piece has a whole number m not below its scores, the sum of exp2(score - m) and the values weighted so, acc
    [head_dim]. Loads go around the first-level cache, since other programs wrote what they read, and are issued `ahead`
    pieces at a time.
    """
    heads = tl.arange(0, group_block)
    dims = tl.arange(0, dim_block)
    pieces = tl.arange(0, max_pieces)
    known = (pieces < num_pieces)[:, None] & (heads < group)[None, :]
    tops = tl.load(m_ptr + pieces[:, None] * group + heads[None, :], mask=known, other=-1e30, cache_modifier=".cg")
    top = tl.max(tops, 0)
    total = tl.zeros([group_block], tl.float32)
    acc = tl.zeros([group_block, dim_block], tl.float32)
    for first in range(0, num_pieces, ahead):
        for next in tl.static_range(ahead):
            piece = first + next
            row = piece * group + heads
            present = heads < tl.where(piece < num_pieces, group, 0)
            m = tl.load(m_ptr + row, mask=present, other=-1e30, cache_modifier=".cg")
            sums = tl.load(sums_ptr + row, mask=present, other=0.0, cache_modifier=".cg")
            part = tl.load(
                acc_ptr + row[:, None] * head_dim + dims[None, :],
                mask=present[:, None] & (dims < head_dim)[None, :], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            weight = tl.exp2(m - top)
            total += weight * sums
            acc += weight[:, None] * part
    total = tl.where(heads < group, total, 1.0)
    out = (acc / total[:, None] * v_scale).to(out_ptr.dtype.element_ty)
    inside = (heads < group)[:, None] & (dims < head_dim)[None, :]
    tl.store(out_ptr + heads[:, None] * head_dim + dims[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["window", "table_stride"])
def _decode_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr, out_ptr, m_ptr, sums_ptr, acc_ptr, arrivals_ptr,
    num_kv_heads, window, scale, v_scale, table_stride, cache_block_stride, cache_head_stride, cache_token_stride,
    spread: tl.constexpr, has_window: tl.constexpr, early: tl.constexpr,
    block_size: tl.constexpr, group: tl.constexpr, head_dim: tl.constexpr,
    kv_block: tl.constexpr, min_piece: tl.constexpr, max_pieces: tl.constexpr,
    group_block: tl.constexpr, merge_group_block: tl.constexpr, ahead: tl.constexpr, dim_block: tl.constexpr,
):  # fmt: skip
    """Program (unit, run): the run-th part of the pieces of sequence unit // Hkv and key-value head unit % Hkv."""
    unit = tl.program_id(0)
    sequence = unit // num_kv_heads
    head = unit % num_kv_heads
    length = tl.load(seq_lens_ptr + sequence)
    wait_for_inputs(early)
    begin = 0
    if has_window:
        begin = tl.maximum(length - window, 0)
    piece_size = tl.cdiv(length - begin, max_pieces * min_piece) * min_piece
    num_pieces = tl.cdiv(length - begin, piece_size)
    pieces_a_run = tl.cdiv(num_pieces, tl.num_programs(1))
    first_piece = tl.program_id(1) * pieces_a_run
    if first_piece >= num_pieces:
        return
    start = begin + first_piece * piece_size
    stop = tl.minimum(start + pieces_a_run * piece_size, length)

    rows = tl.arange(0, group_block)
    dims = tl.arange(0, dim_block)
    first_row = unit.to(tl.int64) * group
    q_mask = (rows < group)[:, None] & (dims < head_dim)[None, :]
    q = tl.load(q_ptr + (first_row + rows)[:, None] * head_dim + dims[None, :], mask=q_mask, other=0.0)
    table_row_ptr = block_table_ptr + sequence.to(tl.int64) * table_stride
    head_offset = head.to(tl.int64) * cache_head_stride
    pieces_row = unit.to(tl.int64) * max_pieces
    m = tl.full([group_block], -1e30, tl.float32)
    sums = tl.zeros([group_block], tl.float32)
    acc = tl.zeros([group_block, dim_block], tl.float32)
    total_m = tl.full([group_block], -1e30, tl.float32)
    total_sums = tl.zeros([group_block], tl.float32)
    total_acc = tl.zeros([group_block, dim_block], tl.float32)
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
        scores = tl.where(visible[None, :], tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee"), -float("inf"))
        new_m = tl.maximum(m, tl.ceil(tl.max(scores, 1) * scale))  # whole: what follows scales by powers of two
        p = tl.exp2(tl.fma(scores, scale, -new_m[:, None]))
        rescale = tl.exp2(m - new_m)
        sums = sums * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        m = new_m

        piece = (position - begin) // piece_size
        ends = (position + kv_block >= stop) | ((position - begin + kv_block) % piece_size == 0)
        if spread:
            if ends:
                row = (pieces_row + piece) * group + rows
                tl.store(m_ptr + row, m, mask=rows < group)
                tl.store(sums_ptr + row, sums, mask=rows < group)
                tl.store(acc_ptr + row[:, None] * head_dim + dims[None, :], acc, mask=q_mask)
        else:
            kept = tl.where(ends, m, -1e30)
            new_total_m = tl.maximum(total_m, kept)
            old, new = tl.exp2(total_m - new_total_m), tl.exp2(kept - new_total_m)
            total_sums = total_sums * old + sums * new
            total_acc = total_acc * old[:, None] + acc * new[:, None]
            total_m = new_total_m
        m = tl.where(ends, -1e30, m)
        sums = tl.where(ends, 0.0, sums)
        acc = tl.where(ends, 0.0, acc)

    if spread:
        tl.debug_barrier()  # all of this program's stores come before its arrival
        arrival_ptr = arrivals_ptr + unit
        if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == tl.cdiv(num_pieces, pieces_a_run) - 1:
            _merge(
                m_ptr + pieces_row * group, sums_ptr + pieces_row * group, acc_ptr + pieces_row * group * head_dim,
                out_ptr + first_row * head_dim, num_pieces, v_scale, group, head_dim,
                max_pieces, ahead, merge_group_block, dim_block,
            )  # fmt: skip
            tl.store(arrival_ptr, 0)  # ready for the next launch
    else:
        out = (total_acc / total_sums[:, None] * v_scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (first_row + rows)[:, None] * head_dim + dims[None, :], out, mask=q_mask)


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
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Attention of the first `batch.num_decodes` rows of q [T, Hq, D] into those of out [T, Hq * D].

    A float8 cache holds keys and values divided by `k_scale` and `v_scale`. Without a `tuning`, Hopper's own kernel for
    few sequences runs where it can.
    """
    if tuning is None:
        alone, few = (hopper_kernels(q.device, name) for name in ("register_decode", "hopper_decode"))
        if alone is not None and alone.supports(q, k_cache, batch):
            alone.register_decode_attention(q, k_cache, v_cache, batch, scale, sliding_window, out)
            return
        if few is not None and few.supports(q, k_cache, batch.num_decodes):
            few.hopper_decode_attention(q, k_cache, v_cache, batch, scale, sliding_window, out)
            return
    tuning = tuning or DecodeTuning()
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    dim_block = max(next_power_of_2(head_dim), 16)
    merge_group_block = next_power_of_2(group)
    units = batch.num_decodes * num_kv_heads
    wanted = num_multiprocessors(q.device) * tuning.programs_per_sm
    runs = max(1, min(cdiv(wanted, units), tuning.max_pieces))
    spread = runs > 1
    pieces = units * tuning.max_pieces if spread else 0
    stats = torch.empty((2, pieces, group), dtype=torch.float32, device=q.device)
    acc = torch.empty((pieces, group, head_dim), dtype=torch.float32, device=q.device)
    launch(
        _decode_kernel,
        (units, runs),
        q,
        k_cache,
        v_cache,
        batch.block_table,
        batch.seq_lens,
        out,
        stats[0],
        stats[1],
        acc,
        _arrivals(q.device, max(65536, next_power_of_2(units))),
        num_kv_heads,
        sliding_window or 0,
        scale * k_scale * LOG2_E,
        v_scale,
        batch.block_table.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        spread=spread,
        has_window=sliding_window is not None,
        block_size=block_size,
        group=group,
        head_dim=head_dim,
        kv_block=min(tuning.kv_block, tuning.min_piece, tuning.kv_bytes // (dim_block * q.itemsize)),
        min_piece=tuning.min_piece,
        max_pieces=tuning.max_pieces,
        group_block=max(merge_group_block, 16),
        merge_group_block=merge_group_block,
        ahead=4,
        dim_block=dim_block,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **early_launch(q.device),
    )


def decode_attention_rows(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
) -> Fp8Rows | None:
    """Attention of q [T, Hq, D] rounded to float8, a scale for the heads of each key-value head, where every sequence
    has one new token and a kernel does that; else None.
    """
    hopper = hopper_kernels(q.device, "hopper_decode")
    if hopper is None or batch.num_decodes < q.shape[0] or not hopper.supports(q, k_cache, batch.num_decodes):
        return None
    values = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=fp8.DTYPE, device=q.device)
    scales = torch.empty((q.shape[0], k_cache.shape[1]), dtype=torch.float32, device=q.device)
    hopper.hopper_decode_attention(q, k_cache, v_cache, batch, scale, sliding_window, values, scales)
    return Fp8Rows(values, scales, q.dtype)
