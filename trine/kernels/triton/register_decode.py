"""Decode attention of one short sequence on Hopper GPUs, all of it in registers.

Roofline: 4 * D bytes for each position and key-value head, as in `decode_attention`; but a sequence of some hundred
positions is a chain of latencies. Here a program (key-value head, run) holds a tile of keys and values in registers and
asks for those that earlier steps have written before the kernel in front is done. It takes next to no shared memory, so
that it finds a place beside the programs of the product in front, where one that wants much of it waits until a
multiprocessor is empty; and what follows is placed as early. Runs are as many as there are tiles, up to `MAX_RUNS` a
head; the program that comes last adds them up (flash-decoding, Dao et al. 2023).

Only one sequence: the products of more take all of the shared memory, and nothing is placed beside them. Only short
ones: from some 5,000 positions on `hopper_decode`, which has more of them in flight, is faster. Needs Gluon, which
Triton's interpreter can't run; `bench/gpu_check.py` compares it.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.triton.decode_attention import LOG2_E
from trine.kernels.triton.device import next_power_of_2, num_multiprocessors
from trine.kernels.triton.hopper_attention import barrier
from trine.kernels.triton.launch import launch
from trine.kernels.types import SHORT_CONTEXT, PagedBatch

TILE = 32  # positions
MAX_GROUP_SIZE = 512  # dimensions of all query heads of a group, which a thread has a part of in registers
MAX_RUNS = 32
MAX_HEADS = 16  # of keys and values
_MERGED = 16  # runs that are read at once


@gluon.jit
def _load_tile(
    k_ptr, v_ptr, table_ptr, positions, dims, wanted, block_stride, token_stride, block_size: gl.constexpr
):  # fmt: skip
    """Keys and values [warps, rows, head_dim] of the positions [warps, rows] that are wanted."""
    block = gl.load(table_ptr + positions // block_size, mask=wanted, other=0).to(gl.int64)
    at = (block * block_stride + positions % block_size * token_stride)[:, :, None] + dims
    k = gl.load(k_ptr + at, mask=wanted[:, :, None], other=0.0)
    v = gl.load(v_ptr + at, mask=wanted[:, :, None], other=0.0)
    return k, v


@gluon.jit
def _add_up(m, sums, acc, axis: gl.constexpr):
    """One maximum, sum and result of several along an axis."""
    top = gl.max(m, axis)
    weight = gl.exp2(m - gl.expand_dims(top, axis))
    return top, gl.sum(weight * sums, axis), gl.sum(gl.expand_dims(weight, 2) * acc, axis)


@gluon.jit
def _merge(
    m_ptr, sums_ptr, acc_ptr, parts,
    group: gl.constexpr, head_dim: gl.constexpr, group_block: gl.constexpr, merged: gl.constexpr,
):  # fmt: skip
    """The sum of a head's runs, `merged` at a time: sums [group] and results [group, head_dim]. Others wrote what it
    reads: loads go around the first-level cache.
    """
    layout: gl.constexpr = gl.BlockedLayout([merged, 1, 4], [1, 128 // head_dim, head_dim // 4], [1, 4, 1], [2, 1, 0])
    stats_layout: gl.constexpr = gl.SliceLayout(2, layout)
    acc_layout: gl.constexpr = gl.SliceLayout(0, layout)
    runs = gl.arange(0, merged, gl.SliceLayout(1, stats_layout))
    heads = gl.arange(0, group_block, gl.SliceLayout(0, stats_layout))
    dims = gl.arange(0, head_dim, gl.SliceLayout(0, acc_layout))
    top = gl.full([group_block], -1e30, gl.float32, gl.SliceLayout(0, stats_layout))
    total = gl.zeros([group_block], gl.float32, gl.SliceLayout(0, stats_layout))
    acc = gl.zeros([group_block, head_dim], gl.float32, acc_layout)
    for first in range(0, parts, merged):
        there = (first + runs < parts)[:, None] & (heads < group)[None, :]
        at = (first + runs)[:, None] * group + heads[None, :]
        place = at[:, :, None] * head_dim + gl.expand_dims(gl.expand_dims(dims, 0), 0)
        part = gl.load(acc_ptr + place, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        m = gl.load(m_ptr + at, mask=there, other=-1e30, cache_modifier=".cg")
        sums = gl.load(sums_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
        new_top, new_total, new_acc = _add_up(m, sums, part, 0)
        both = gl.maximum(top, new_top)
        old, new = gl.exp2(top - both), gl.exp2(new_top - both)
        total = total * old + new_total * new
        acc *= gl.convert_layout(old, gl.SliceLayout(1, acc_layout))[:, None]
        acc += gl.convert_layout(new, gl.SliceLayout(1, acc_layout))[:, None] * new_acc
        top = both
    return gl.convert_layout(total, gl.SliceLayout(1, acc_layout)), acc


@gluon.jit
def _store_rows(y_ptr, sums, acc, group: gl.constexpr):
    """Write the first `group` rows of acc [group_block, head_dim] over sums [group_block]."""
    heads = gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    dims = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    present = heads < group
    y = acc / gl.where(present, sums, 1.0)[:, None]
    at = heads[:, None] * acc.shape[1] + dims[None, :]
    gl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=present[:, None])


@gluon.jit(do_not_specialize=["window"])
def _register_decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, seq_lens_ptr, out_ptr, m_ptr, sums_ptr, acc_ptr, arrivals_ptr,
    window, scale, block_stride, head_stride, token_stride,
    settled: gl.constexpr, has_window: gl.constexpr, block_size: gl.constexpr, group: gl.constexpr,
    head_dim: gl.constexpr, group_block: gl.constexpr, tile: gl.constexpr, max_runs: gl.constexpr,
    merged: gl.constexpr,
):  # fmt: skip
    """Program (head, run): the run-th part of the tiles of a key-value head. Each warp has its own rows of a tile, with
    sums of its own until the end.
    """
    warps: gl.constexpr = gl.num_warps()
    rows: gl.constexpr = tile // warps
    # [heads of the group, warps, rows, dimensions]
    layout: gl.constexpr = gl.BlockedLayout(
        [group_block, 1, 1, 8], [1, 1, 256 // head_dim, head_dim // 8], [1, warps, 1, 1], [3, 2, 1, 0]
    )
    kv_layout: gl.constexpr = gl.SliceLayout(0, layout)
    places_layout: gl.constexpr = gl.SliceLayout(2, kv_layout)
    scores_layout: gl.constexpr = gl.SliceLayout(3, layout)
    stats_layout: gl.constexpr = gl.SliceLayout(2, scores_layout)
    acc_layout: gl.constexpr = gl.SliceLayout(2, layout)
    q_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    head = gl.program_id(0)
    length = gl.load(seq_lens_ptr)
    begin = 0
    if has_window:
        begin = gl.maximum(length - window, 0)
    tiles = (length - begin + tile - 1) // tile
    tiles_a_run = (tiles + gl.num_programs(1) - 1) // gl.num_programs(1)
    parts = (tiles + tiles_a_run - 1) // tiles_a_run
    first = gl.program_id(1) * tiles_a_run
    count = gl.minimum(tiles - first, tiles_a_run)
    start = begin + first * tile
    known = start  # positions up to here are read before the kernel in front is done
    if settled:
        known = length - 1
    k_ptr += head.to(gl.int64) * head_stride
    v_ptr += head.to(gl.int64) * head_stride
    dims = gl.arange(0, head_dim, gl.SliceLayout(0, gl.SliceLayout(0, kv_layout)))
    dims = gl.expand_dims(gl.expand_dims(dims, 0), 0)
    positions = start + (
        gl.arange(0, warps, gl.SliceLayout(1, places_layout))[:, None] * rows
        + gl.arange(0, rows, gl.SliceLayout(0, places_layout))[None, :]
    )
    wanted = (positions < known) & (count > 0)
    k, v = _load_tile(k_ptr, v_ptr, table_ptr, positions, dims, wanted, block_stride, token_stride, block_size)
    gdc_launch_dependents()
    gdc_wait()
    if count > 0:
        heads = gl.arange(0, group_block, gl.SliceLayout(1, q_layout))
        q_dims = gl.arange(0, head_dim, gl.SliceLayout(0, q_layout))
        at = heads[:, None] * head_dim + q_dims[None, :]
        q = gl.load(q_ptr + head * group * head_dim + at, mask=(heads < group)[:, None], other=0.0)
        q = gl.expand_dims(gl.expand_dims(q.to(gl.float32) * scale, 1), 2)
        if start + tile > known:
            late = (positions >= known) & (positions < length)
            new_k, new_v = _load_tile(
                k_ptr, v_ptr, table_ptr, positions, dims, late, block_stride, token_stride, block_size
            )  # fmt: skip
            k = gl.where(late[:, :, None], new_k, k)
            v = gl.where(late[:, :, None], new_v, v)
        m = gl.full([group_block, warps], -1e30, gl.float32, stats_layout)
        sums = gl.zeros([group_block, warps], gl.float32, stats_layout)
        acc = gl.zeros([group_block, warps, head_dim], gl.float32, acc_layout)
        scored = gl.convert_layout(positions, gl.SliceLayout(0, scores_layout))
        for i in range(count):
            ahead = positions + (i + 1) * tile
            wanted = (ahead < length) & (i + 1 < count)
            next_k, next_v = _load_tile(
                k_ptr, v_ptr, table_ptr, ahead, dims, wanted, block_stride, token_stride, block_size
            )  # fmt: skip
            scores = gl.sum(gl.expand_dims(k.to(gl.float32), 0) * q, 3)
            scores = gl.where(gl.expand_dims(scored + i * tile < length, 0), scores, -float("inf"))
            new_m = gl.maximum(m, gl.max(scores, 2))
            p = gl.exp2(scores - gl.expand_dims(new_m, 2))
            rescale = gl.exp2(m - new_m)
            sums = sums * rescale + gl.sum(p, 2)
            acc *= gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(2, acc_layout)), 2)
            acc += gl.sum(gl.expand_dims(p, 3) * gl.expand_dims(v.to(gl.float32), 0), 2)
            m = new_m
            k = next_k
            v = next_v
        # From now on a thread has elements of all warps: [heads, warps, dimensions].
        own: gl.constexpr = gl.BlockedLayout([1, warps, 4], [128 // head_dim, 1, head_dim // 4], [4, 1, 1], [2, 1, 0])
        m = gl.convert_layout(m, gl.SliceLayout(2, own))
        m, sums, acc = _add_up(m, gl.convert_layout(sums, gl.SliceLayout(2, own)), gl.convert_layout(acc, own), 1)
        row_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, own))
        out_row_ptr = out_ptr + head * group * head_dim
        if parts == 1:
            _store_rows(out_row_ptr, gl.convert_layout(sums, row_layout), acc, group)
        else:
            base = head * max_runs * group
            row = base + gl.program_id(1) * group
            stat_heads = gl.arange(0, group_block, gl.SliceLayout(1, gl.SliceLayout(2, own)))
            ones = gl.full([group_block], 1.0, gl.float32, row_layout)
            _store_rows(acc_ptr + row * head_dim, ones, acc, group)
            gl.store(m_ptr + row + stat_heads, m, mask=stat_heads < group)
            gl.store(sums_ptr + row + stat_heads, sums, mask=stat_heads < group)
            barrier()  # all of this program's stores come before its arrival
            if gl.atomic_add(arrivals_ptr + head, 1, sem="acq_rel") == parts - 1:
                total, merged_acc = _merge(
                    m_ptr + base, sums_ptr + base, acc_ptr + base * head_dim, parts,
                    group, head_dim, group_block, merged,
                )  # fmt: skip
                _store_rows(out_row_ptr, total, merged_acc, group)
                gl.store(arrivals_ptr + head, 0)  # ready for the next launch


@cache
def _scratch(device: torch.device, group: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs' maxima and sums, their results, and zeroed counters, which every launch leaves at zero: kernels of one
    device run in one stream at a time.
    """
    stats = torch.empty((2, MAX_HEADS, MAX_RUNS, group), dtype=torch.float32, device=device)
    acc = torch.empty((MAX_HEADS, MAX_RUNS, group, head_dim), dtype=torch.float32, device=device)
    return stats, acc, torch.zeros(MAX_HEADS, dtype=torch.int32, device=device)


def supports(q: torch.Tensor, k_cache: torch.Tensor, batch: PagedBatch) -> bool:
    """Whether this kernel can run and is the faster one: one short sequence, 16-bit types, few heads of 64 or 128."""
    _, num_kv_heads, _, head_dim = k_cache.shape
    return (
        q.dtype == k_cache.dtype
        and q.itemsize == 2
        and head_dim in (64, 128)
        and next_power_of_2(q.shape[1] // num_kv_heads) * head_dim <= MAX_GROUP_SIZE
        and batch.num_decodes == 1
        and batch.max_seq_len <= SHORT_CONTEXT
        and num_kv_heads <= MAX_HEADS
    )


def register_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
) -> None:
    """Attention of the first row of q [T, Hq, D], the batch's one decode row, into that of out [T, Hq * D]."""
    _, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    stats, acc, arrivals = _scratch(q.device, group, head_dim)
    launch(
        _register_decode_kernel,
        (num_kv_heads, min(2 * num_multiprocessors(q.device) // num_kv_heads, MAX_RUNS)),
        q,
        k_cache,
        v_cache,
        batch.block_table,
        batch.seq_lens,
        out,
        stats[0],
        stats[1],
        acc,
        arrivals,
        sliding_window or 0,
        scale * LOG2_E,
        *k_cache.stride()[:3],
        settled=batch.settled,
        has_window=sliding_window is not None,
        block_size=block_size,
        group=group,
        head_dim=head_dim,
        group_block=max(next_power_of_2(group), 4),
        tile=TILE,
        max_runs=MAX_RUNS,
        merged=_MERGED,
        num_warps=4,
        launch_pdl=True,
    )
