"""Decode attention on Hopper: what bounds it is memory and latency, so nothing waits that need not.

Roofline: 4 * D bytes for each position and key-value head, as in `decode_attention`; but a chain of dependent loads
(length, block numbers, keys) takes as long as the bytes of a hundred positions. Here a program (sequence, key-value
head, run) asks the copy engine for several tiles of keys and values at once, and for those that earlier steps have
written before the kernel in front is done. Where the sequences and heads are fewer than the multiprocessors, a program
has all the memory of one: a context that fits is one program's; a longer one is cut into runs, as many as fill the
card, and the program that comes last adds them up (flash-decoding, Dao et al. 2023). With more, three programs share
one, whose chains hide behind each other's bytes.

Keys and values are the first operands of the tensor cores' products, which take 64 rows at least: scores are
[positions, heads of the group], results [head_dim, heads]. A row's result depends on its own sequence and on how many
sequences there are. Blocks are fetched whole, so that a cache must hold finite numbers everywhere, which the engine's
does. Needs Gluon, which Triton's interpreter can't run; `bench/gpu_check.py` compares it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.triton.decode_attention import LOG2_E
from trine.kernels.triton.descriptors import tiles_of
from trine.kernels.triton.device import cdiv, num_multiprocessors
from trine.kernels.triton.hopper_attention import async_load, barrier
from trine.kernels.triton.launch import launch
from trine.kernels.types import PagedBatch

MAX_GROUP = 16  # heads of a group, the least that a product's second operand is padded to
MAX_RUNS = 16
MANY = 12  # units a multiprocessor, from which on rounds of three for each are full enough
FULL = 0.85  # else the share of all rounds' places that are taken; a single round is as fast as memory


@dataclass(frozen=True, slots=True)
class Tiling:
    """Positions of a tile, tiles in flight, programs that share a sequence and key-value head."""

    kv_block: int
    stages: int
    runs: int


def tiling(units: int, multiprocessors: int, block_size: int) -> Tiling:
    """For so many sequences times key-value heads: all the shared memory for a program, or a third of it.

    Where nearly every multiprocessor has a unit, tiles of half the size: less of them lies past a sequence's end.
    """
    if units > multiprocessors:
        return Tiling(64, 2, 1)
    if units >= FULL * multiprocessors and block_size <= 64:
        return Tiling(64, 4, 1)
    return Tiling(128, 3, min(multiprocessors // units, MAX_RUNS))


def fills(units: int, multiprocessors: int) -> bool:
    """Whether units, three for each multiprocessor at a time, leave few places empty in the last of several rounds."""
    at_once, rounds = 3 * multiprocessors, cdiv(units, 3 * multiprocessors)
    return rounds == 1 or units >= MANY * multiprocessors or units >= FULL * at_once * rounds


@gluon.jit
def _expect(ready, descriptor, kv_block: gl.constexpr, wanted):
    """`ready` will count the bytes of a tile's keys and values."""
    size: gl.constexpr = 2 * kv_block * descriptor.block_shape[1] * descriptor.dtype.primitive_bitwidth // 8
    mbarrier.expect(ready, size, pred=wanted)


@gluon.jit
def _block_numbers(table_row_ptr, first, num_blocks, count: gl.constexpr, per_thread: gl.constexpr):
    """Cache blocks `first` to `first + count` of a sequence, all in each thread; block 0, which always exists, past
    its end.
    """
    index = gl.arange(0, per_thread, gl.BlockedLayout([per_thread], [32], [gl.num_warps()], [0]))
    present = (index < count) & (first + index < num_blocks)
    return gl.load(table_row_ptr + first + index, mask=present, other=0)


@gluon.jit
def _fetch(
    k_desc, v_desc, k_smem, v_smem, ready, numbers, offset, head, num_kv_heads, wanted, late_part,
    late: gl.constexpr, block_size: gl.constexpr, kv_block: gl.constexpr, per_thread: gl.constexpr,
):  # fmt: skip
    """Ask for a tile's blocks, `numbers` from `offset` on: all but the one at `late_part`, or if `late` that one."""
    index = gl.arange(0, per_thread, gl.BlockedLayout([per_thread], [32], [gl.num_warps()], [0]))
    for part in gl.static_range(kv_block // block_size):
        row = (gl.sum(gl.where(index == offset + part, numbers, 0), 0) * num_kv_heads + head) * block_size
        now = wanted & ((part == late_part) == late)
        async_load(k_desc, [row, 0], ready, k_smem.slice(part * block_size, block_size, 0), pred=now)
        async_load(v_desc, [row, 0], ready, v_smem.slice(part * block_size, block_size, 0), pred=now)


@gluon.jit
def _merge(
    m_ptr, sums_ptr, acc_ptr, parts, present, m_row, acc_row, cols_layout: gl.constexpr, layout: gl.constexpr,
    group: gl.constexpr, head_dim: gl.constexpr, group_block: gl.constexpr, max_runs: gl.constexpr,
):  # fmt: skip
    """The sum of `parts` runs of a unit: sums [group_block], acc [head_dim, group_block]. Others wrote what it reads:
    loads go around the first-level cache, four runs at a time.
    """
    top = gl.full([group_block], -1e30, gl.float32, cols_layout)
    for each in gl.static_range(max_runs):
        known = gl.load(m_ptr + each * group + m_row, mask=present & (each < parts), other=-1e30, cache_modifier=".cg")
        top = gl.maximum(top, known)
    sums = gl.zeros([group_block], gl.float32, cols_layout)
    acc = gl.zeros([head_dim, group_block], gl.float32, layout)
    for first in range(0, parts, 4):
        for next in gl.static_range(4):
            run = first + next
            there = present & (run < parts)
            m = gl.load(m_ptr + run * group + m_row, mask=there, other=-1e30, cache_modifier=".cg")
            own = gl.load(sums_ptr + run * group + m_row, mask=there, other=0.0, cache_modifier=".cg")
            part = gl.load(
                acc_ptr + run * group * head_dim + acc_row, mask=there[None, :], other=0.0, cache_modifier=".cg"
            )
            weight = gl.exp2(m - top)
            sums += weight * own
            acc += weight[None, :] * part
    return sums, acc


@gluon.jit
def _store(out_row_ptr, scales_ptr, unit, acc, total, acc_row, present, kind: gl.constexpr):
    """Write a unit's heads, acc over total; to float8 with a scale for all of them, of what they are as `kind`."""
    y = (acc / gl.where(present, total, 1.0)[None, :]).to(kind)
    if out_row_ptr.dtype.element_ty != kind:
        y = gl.where(present[None, :], y.to(gl.float32), 0.0)
        largest = gl.max(gl.max(gl.abs(y), 0), 0)
        scale = gl.where(largest == 0.0, 1.0, largest / 448.0)
        gl.store(scales_ptr + unit, scale)
        y /= scale
        y = gl.where(y > 448.0, 448.0, gl.where(y < -448.0, -448.0, y))  # what is no number stays so
    gl.store(out_row_ptr + acc_row, y.to(out_row_ptr.dtype.element_ty), mask=present[None, :])


@gluon.jit(do_not_specialize=["window", "table_stride"])
def _hopper_decode_kernel(
    q_ptr, k_desc, v_desc, block_table_ptr, seq_lens_ptr, out_ptr, out_scales_ptr, m_ptr, sums_ptr, acc_ptr,
    arrivals_ptr, num_kv_heads, window, scale, table_stride,
    settled: gl.constexpr, has_window: gl.constexpr, block_size: gl.constexpr, group: gl.constexpr,
    head_dim: gl.constexpr, group_block: gl.constexpr, kv_block: gl.constexpr, stages: gl.constexpr,
    max_runs: gl.constexpr,
):  # fmt: skip
    """Program (unit, run): the run-th part of the tiles of sequence unit // Hkv and key-value head unit % Hkv."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, group_block, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, layout)
    cols_layout: gl.constexpr = gl.SliceLayout(0, layout)
    blocks_a_tile: gl.constexpr = kv_block // block_size
    in_flight: gl.constexpr = 4 * blocks_a_tile  # a power of two, not below the blocks of all stages
    unit = gl.program_id(0)
    sequence = unit // num_kv_heads
    head = unit % num_kv_heads
    length = gl.load(seq_lens_ptr + sequence)
    begin = 0
    if has_window:
        begin = gl.maximum(length - window, 0) // kv_block
    tiles = (length + kv_block - 1) // kv_block - begin
    tiles_a_run = gl.maximum((tiles + gl.num_programs(1) - 1) // gl.num_programs(1), stages)
    parts = (tiles + tiles_a_run - 1) // tiles_a_run
    first = gl.program_id(1) * tiles_a_run
    count = gl.minimum(tiles - first, tiles_a_run)
    first += begin
    num_blocks = (length + block_size - 1) // block_size
    newest = num_blocks - 1  # the block that holds the new token
    table_row_ptr = block_table_ptr + sequence.to(gl.int64) * table_stride

    k_smem = gl.allocate_shared_memory(k_desc.dtype, [stages, kv_block, head_dim], k_desc.layout)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, [stages, kv_block, head_dim], k_desc.layout)
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [group_block, head_dim], k_desc.layout)
    p_smem = gl.allocate_shared_memory(k_desc.dtype, [group_block, kv_block], k_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    barrier()
    at = first * blocks_a_tile
    numbers = _block_numbers(table_row_ptr, at, num_blocks, stages * blocks_a_tile, in_flight)
    if not settled:
        gdc_launch_dependents()
        gdc_wait()
    for stage in gl.static_range(stages):
        late_part = newest - at - stage * blocks_a_tile
        if not settled:
            late_part = -1
        _expect(ready.index(stage), k_desc, kv_block, stage < count)
        _fetch(
            k_desc, v_desc, k_smem.index(stage), v_smem.index(stage), ready.index(stage), numbers,
            stage * blocks_a_tile, head, num_kv_heads, stage < count, late_part,
            False, block_size, kv_block, in_flight,
        )  # fmt: skip
    if settled:
        gdc_launch_dependents()
        gdc_wait()
        late_tile = newest // blocks_a_tile - first
        wanted = (late_tile >= 0) & (late_tile < gl.minimum(count, stages))
        late_tile = gl.where(wanted, late_tile, 0)
        _fetch(
            k_desc, v_desc, k_smem.index(late_tile), v_smem.index(late_tile), ready.index(late_tile), numbers,
            late_tile * blocks_a_tile, head, num_kv_heads, wanted, newest % blocks_a_tile,
            True, block_size, kv_block, in_flight,
        )  # fmt: skip

    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (head_dim // 8), head_dim // 8], [4, 1], [1, 0])
    q_heads = gl.arange(0, group_block, gl.SliceLayout(1, load_layout))
    q_dims = gl.arange(0, head_dim, gl.SliceLayout(0, load_layout))
    q_at = (unit * group + q_heads)[:, None] * head_dim + q_dims[None, :]
    q_smem.store(gl.load(q_ptr + q_at, mask=(q_heads < group)[:, None], other=0.0))
    fence_async_shared()
    barrier()

    rows = gl.arange(0, kv_block, rows_layout)
    m = gl.full([group_block], -1e30, gl.float32, cols_layout)
    sums = gl.zeros([kv_block, group_block], gl.float32, layout)
    acc = gl.zeros([head_dim, group_block], gl.float32, layout)
    for i in range(count):
        slot = i % stages
        tile = first + i
        ahead = i + stages < count
        next = (tile + stages) * blocks_a_tile
        following = _block_numbers(table_row_ptr, next, num_blocks, blocks_a_tile, blocks_a_tile)
        mbarrier.wait(ready.index(slot), (i // stages) & 1)
        nothing = gl.zeros([kv_block, group_block], gl.float32, layout)
        scores = warpgroup_mma(k_smem.index(slot), q_smem.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        positions = tile * kv_block + rows
        visible = positions < length
        if has_window:
            visible = visible & (positions >= length - window)
        scores = gl.where(visible[:, None], scores, -float("inf"))
        new_m = gl.maximum(m, gl.max(scores, 0) * scale)
        p = gl.exp2(gl.fma(scores, scale, -new_m[None, :]))
        rescale = gl.exp2(m - new_m)
        sums = sums * rescale[None, :] + p
        acc = acc * rescale[None, :]
        m = new_m
        p_smem.store(gl.permute(p.to(k_desc.dtype), (1, 0)))
        fence_async_shared()
        barrier()
        acc = warpgroup_mma(v_smem.index(slot).permute((1, 0)), p_smem.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()  # all warps have read the tile and the weights
        _expect(ready.index(slot), k_desc, kv_block, ahead)
        _fetch(
            k_desc, v_desc, k_smem.index(slot), v_smem.index(slot), ready.index(slot), following, 0,
            head, num_kv_heads, ahead, -1, False, block_size, kv_block, blocks_a_tile,
        )  # fmt: skip

    total = gl.sum(sums, 0)
    heads = gl.arange(0, group_block, cols_layout)
    dims = gl.arange(0, head_dim, rows_layout)
    acc_row = heads[None, :] * head_dim + dims[:, None]
    present = heads < group
    out_row_ptr = out_ptr + unit * group * head_dim
    if parts == 1:
        if count > 0:
            _store(out_row_ptr, out_scales_ptr, unit, acc, total, acc_row, present, q_ptr.dtype.element_ty)
    elif count > 0:
        base = unit * max_runs * group
        m_ptr += base
        sums_ptr += base
        acc_ptr += base * head_dim
        own = gl.program_id(1) * group
        gl.store(m_ptr + own + heads, m, mask=present)
        gl.store(sums_ptr + own + heads, total, mask=present)
        gl.store(acc_ptr + own * head_dim + acc_row, acc, mask=present[None, :])
        barrier()  # all of this program's stores come before its arrival
        if gl.atomic_add(arrivals_ptr + unit, 1, sem="acq_rel") == parts - 1:
            total, acc = _merge(
                m_ptr, sums_ptr, acc_ptr, parts, present, heads, acc_row, cols_layout, layout,
                group, head_dim, group_block, max_runs,
            )  # fmt: skip
            _store(out_row_ptr, out_scales_ptr, unit, acc, total, acc_row, present, q_ptr.dtype.element_ty)
            gl.store(arrivals_ptr + unit, 0)  # ready for the next launch


@cache
def _scratch(device: torch.device, group: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs' maxima and sums, their results, and zeroed counters, which every launch leaves at zero: kernels of one
    device run in one stream at a time. Where units are more, each is one run and needs none.
    """
    units = num_multiprocessors(device)
    stats = torch.empty((2, units, MAX_RUNS, group), dtype=torch.float32, device=device)
    acc = torch.empty((units, MAX_RUNS, group, head_dim), dtype=torch.float32, device=device)
    return stats, acc, torch.zeros(units, dtype=torch.int32, device=device)


def supports(q: torch.Tensor, k_cache: torch.Tensor, num_sequences: int) -> bool:
    """Whether this kernel can run and is the faster one: bfloat16, heads of 64 or 128, a multiprocessor a unit or units
    that fill them all (else the portable kernel spreads long contexts better).
    """
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    units, multiprocessors = num_sequences * num_kv_heads, num_multiprocessors(q.device)
    many = fills(units, multiprocessors) and head_dim == 128 and block_size <= 64
    return (
        q.dtype == k_cache.dtype == torch.bfloat16
        and head_dim in (64, 128)
        and 16 <= block_size <= 128
        and q.shape[1] // num_kv_heads <= MAX_GROUP
        and k_cache.is_contiguous()
        and (units <= multiprocessors or many)
    )


def hopper_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
    out_scales: torch.Tensor | None = None,
) -> None:
    """Attention of the first `batch.num_decodes` rows of q [T, Hq, D] into those of out [T, Hq * D]; a float8 out has
    a scale in `out_scales` [T, Hkv] float32 for each group of heads.
    """
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    units = batch.num_decodes * num_kv_heads
    own = tiling(units, num_multiprocessors(q.device), block_size)
    stats, acc, arrivals = _scratch(q.device, group, head_dim)
    launch(
        _hopper_decode_kernel,
        (units, own.runs),
        q,
        tiles_of(k_cache, [block_size, head_dim]),
        tiles_of(v_cache, [block_size, head_dim]),
        batch.block_table,
        batch.seq_lens,
        out,
        out_scales,
        stats[0],
        stats[1],
        acc,
        arrivals,
        num_kv_heads,
        sliding_window or 0,
        scale * LOG2_E,
        batch.block_table.stride(0),
        settled=batch.settled,
        has_window=sliding_window is not None,
        block_size=block_size,
        group=group,
        head_dim=head_dim,
        group_block=MAX_GROUP,
        kv_block=own.kv_block,
        stages=own.stages,
        max_runs=MAX_RUNS,
        num_warps=4,
        launch_pdl=True,
    )
