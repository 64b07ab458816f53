"""Prefill attention for Hopper: flash attention 3's division of labour (Shah et al. 2024) over a paged cache, in Gluon.

Roofline: 4 * D operations for each pair of a query and a key that it sees, on tensor cores that take 64 rows of a warp
group at a time; the exponentials of a block take about as long as its products. So one warp does nothing but ask the
copy engine for blocks of keys and values, and two groups of four warps hold 64 query rows each and compute: while one
takes its softmax, the other's products run, and a group's own product with the values runs under its next softmax.

A program is one multiprocessor's share of the tiles: of all sequences those with the most keys first, dealt to and fro,
so that shares are even. Keys of the next tile are fetched while this one ends. Rows, blocks and rounding are those of
`prefill_attention`, whose twin this is for 16-bit caches: a row's sums depend on nothing but the row. A cache block is
fetched whole, so that entries past a sequence's end must be finite, which the engine's caches are: zeroed at the start,
written by bfloat16 rows since.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trine.kernels.triton.descriptors import tiles_of
from trine.kernels.triton.device import num_multiprocessors
from trine.kernels.triton.launch import launch
from trine.kernels.triton.prefill_tiles import ordered_tiles
from trine.kernels.types import PagedBatch

LOG2_E = 1.4426950408889634
ROWS = 128  # query rows (tokens times heads of the group) of a tile: 64 a group of warps
KV_BLOCK = 128  # positions a step
STAGES = 2  # blocks of keys, and of values, in flight

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the names until Triton 3.6
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret


@gluon.jit
def _find_tile(
    base, tiles_ptr, num_tiles, num_kv_heads, window,
    has_window: gl.constexpr, tokens_block: gl.constexpr, kv_block: gl.constexpr,
):  # fmt: skip
    """This program's tile of the round that starts at item `base`: sequence, head, first query and where keys lie.

    Returns (sequence, head, query_start, first, num_queries, num_before, start, stop); no keys where there is no tile.
    """
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    item = base + gl.where((base // programs) % 2 == 1, programs - 1 - place, place)
    head = item % num_kv_heads
    exists = item < num_tiles * num_kv_heads
    tile_ptr = tiles_ptr + gl.where(exists, item // num_kv_heads, 0)
    sequence = gl.load(tile_ptr)
    query_start = gl.load(tile_ptr + num_tiles)
    num_queries = gl.load(tile_ptr + 2 * num_tiles)
    num_before = gl.load(tile_ptr + 3 * num_tiles)
    first = gl.load(tile_ptr + 4 * num_tiles)
    start = 0
    if has_window:
        start = gl.maximum(num_before + first - window + 1, 0) // kv_block * kv_block
    exists = exists & (num_queries > 0)
    stop = gl.where(exists, num_before + gl.minimum(first + tokens_block, num_queries), 0)
    return sequence, head, query_start, first, num_queries, num_before, start, stop


@gluon.jit
def _fetch(
    descriptor, buffer, ready, empty, phase, blocks, head, num_kv_heads,
    block_size: gl.constexpr, kv_block: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Ask for a step's cache blocks, whose numbers `blocks` holds one a lane, once `buffer` is free."""
    lanes = gl.arange(0, 32, layout)
    mbarrier.wait(empty, phase ^ 1)
    mbarrier.expect(ready, kv_block * descriptor.block_shape[1] * descriptor.dtype.primitive_bitwidth // 8)
    for part in gl.static_range(kv_block // block_size):
        block = gl.sum(gl.where(lanes == part, blocks, 0), 0)
        row = (block * num_kv_heads + head) * block_size
        rows = buffer.slice(part * block_size, block_size, 0)
        async_load(descriptor, [row, 0], ready, rows)


@gluon.jit
def _block_numbers(
    table_row_ptr, position, stop, block_size: gl.constexpr, kv_block: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """The cache blocks of a step, one a lane; block 0, which always exists, past the end."""
    lanes = gl.arange(0, 32, layout)
    present = (lanes < kv_block // block_size) & (position + lanes * block_size < stop)
    return gl.load(table_row_ptr + position // block_size + lanes, mask=present, other=0)


@gluon.jit
def _fetch_tiles(
    k_desc, v_desc, k_smem, v_smem, k_ready, v_ready, k_empty, v_empty,
    block_table_ptr, tiles_ptr, num_tiles, num_kv_heads, window, table_stride,
    has_window: gl.constexpr, block_size: gl.constexpr, kv_block: gl.constexpr, tokens_block: gl.constexpr,
    stages: gl.constexpr,
):  # fmt: skip
    """The fetching warp: keys and values of all tiles of this program, in order."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step = 0
    for base in range(0, num_tiles * num_kv_heads, gl.num_programs(0)):
        sequence, head, _query_start, _first, _num_queries, _num_before, start, stop = _find_tile(
            base, tiles_ptr, num_tiles, num_kv_heads, window, has_window, tokens_block, kv_block
        )
        table_row_ptr = block_table_ptr + sequence.to(gl.int64) * table_stride
        blocks = _block_numbers(table_row_ptr, start, stop, block_size, kv_block, layout)
        for position in range(start, stop, kv_block):
            # asked for a step ahead: a number takes longer to come than a step's blocks to be ordered
            following = _block_numbers(table_row_ptr, position + kv_block, stop, block_size, kv_block, layout)
            stage = step % stages
            phase = (step // stages) & 1
            _fetch(
                k_desc, k_smem.index(stage), k_ready.index(stage), k_empty.index(stage), phase,
                blocks, head, num_kv_heads, block_size, kv_block, layout,
            )  # fmt: skip
            _fetch(
                v_desc, v_smem.index(stage), v_ready.index(stage), v_empty.index(stage), phase,
                blocks, head, num_kv_heads, block_size, kv_block, layout,
            )  # fmt: skip
            blocks = following
            step += 1


@gluon.jit
def _softmax(
    scores, m, sums, position, row_positions, window, scale,
    masked: gl.constexpr, has_window: gl.constexpr, kv_block: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Weights of a block of scores [64, kv_block], the rows' running maximum and sums, and their rescaling."""
    if masked:
        positions = position + gl.arange(0, kv_block, gl.SliceLayout(0, layout))
        visible = positions[None, :] <= row_positions[:, None]
        if has_window:
            visible = visible & (positions[None, :] > row_positions[:, None] - window)
        scores = gl.where(visible, scores, -float("inf"))
    new_m = gl.maximum(m, gl.max(scores, 1) * scale)
    p = gl.exp2(gl.fma(scores, scale, -new_m[:, None]))
    rescale = gl.exp2(m - new_m)
    return p, new_m, sums * rescale + gl.sum(p, 1), rescale


@gluon.jit
def _scores(q_smem, k_smem, kv_block: gl.constexpr, layout: gl.constexpr):
    """Start the products of 64 queries and a block of keys."""
    nothing = gl.zeros([64, kv_block], gl.float32, layout)
    return warpgroup_mma(q_smem, k_smem.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _advance(
    group_id: gl.constexpr, q_smem, k_smem, v_smem, k_ready, v_ready, k_empty, v_empty, turns, step, turn,
    p, m, sums, acc, position, row_positions, window, scale,
    masked: gl.constexpr, has_window: gl.constexpr, kv_block: gl.constexpr, stages: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Start the scores of the block at `position` and the product of its predecessor's weights p with the values; take
    the softmax while the latter and the other group's products run.

    Called, and left, in this group's turn to start products.
    """
    stage = step % stages
    before = (step + stages - 1) % stages
    mbarrier.wait(k_ready.index(stage), (step // stages) & 1)
    scores = _scores(q_smem, k_smem.index(stage), kv_block, s_layout)
    mbarrier.wait(v_ready.index(before), ((step - 1) // stages) & 1)
    acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
    mbarrier.arrive(turns.index(1 - group_id))
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(stage))
    p, m, sums, rescale = _softmax(
        scores, m, sums, position, row_positions, window, scale, masked, has_window, kv_block, s_layout
    )
    mbarrier.wait(turns.index(group_id), (turn & 1) ^ (1 - group_id))
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(before))
    p = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None]
    return p, m, sums, acc


@gluon.jit
def _query_rows(
    group_id: gl.constexpr, query_start, first, num_queries, head, num_kv_heads,
    group: gl.constexpr, head_dim: gl.constexpr, tokens_block: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Where the 64 rows of a group of warps lie, [64, head_dim] offsets, and whether they are there."""
    rows = group_id * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    dims = gl.arange(0, head_dim, gl.SliceLayout(0, layout))
    tokens = first + rows // group
    present = (tokens < num_queries) & (rows < tokens_block * group)
    row = (query_start + tokens).to(gl.int64) * (num_kv_heads * group) + head * group + rows % group
    return row[:, None] * head_dim + dims[None, :], present[:, None]


@gluon.jit
def _attend_tiles(
    group_id: gl.constexpr, q_smem, k_smem, v_smem, k_ready, v_ready, k_empty, v_empty, turns,
    q_ptr, out_ptr, tiles_ptr, num_tiles, num_kv_heads, window, scale,
    has_window: gl.constexpr, group: gl.constexpr, head_dim: gl.constexpr, kv_block: gl.constexpr,
    tokens_block: gl.constexpr, stages: gl.constexpr,
):  # fmt: skip
    """A computing group of warps: its 64 rows of every tile of this program."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kv_block, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (head_dim // 8), head_dim // 8], [4, 1], [1, 0])
    step = 0
    turn = 0
    _sequence, head, query_start, first, num_queries, num_before, start, stop = _find_tile(
        0, tiles_ptr, num_tiles, num_kv_heads, window, has_window, tokens_block, kv_block
    )
    offsets, present = _query_rows(
        group_id, query_start, first, num_queries, head, num_kv_heads, group, head_dim, tokens_block, row_layout
    )
    q = gl.load(q_ptr + offsets, mask=present & (stop > start), other=0.0)
    for base in range(0, num_tiles * num_kv_heads, gl.num_programs(0)):
        q_smem.store(q)
        fence_async_shared()
        barrier()
        own_rows = group_id * 64 + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        row_positions = num_before + first + own_rows // group
        unmasked_stop = (num_before + first + 1) // kv_block * kv_block
        if has_window:
            unmasked_stop = start
        m = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
        sums = gl.zeros([64], gl.float32, gl.SliceLayout(1, s_layout))
        acc = gl.zeros([64, head_dim], gl.float32, o_layout)
        if stop > start:
            mbarrier.wait(k_ready.index(step % stages), (step // stages) & 1)
            scores = warpgroup_mma_wait(0, deps=[_scores(q_smem, k_smem.index(step % stages), kv_block, s_layout)])
            mbarrier.arrive(k_empty.index(step % stages))
            p, m, sums, _rescale = _softmax(
                scores, m, sums, start, row_positions, window, scale, True, has_window, kv_block, s_layout
            )
            p = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
            mbarrier.wait(turns.index(group_id), (turn & 1) ^ (1 - group_id))
            step += 1
            turn += 1
            for position in range(start + kv_block, unmasked_stop, kv_block):
                p, m, sums, acc = _advance(
                    group_id, q_smem, k_smem, v_smem, k_ready, v_ready, k_empty, v_empty, turns, step, turn,
                    p, m, sums, acc, position, row_positions, window, scale,
                    False, has_window, kv_block, stages, s_layout, o_layout,
                )  # fmt: skip
                step += 1
                turn += 1
            for position in range(gl.maximum(unmasked_stop, start + kv_block), stop, kv_block):
                p, m, sums, acc = _advance(
                    group_id, q_smem, k_smem, v_smem, k_ready, v_ready, k_empty, v_empty, turns, step, turn,
                    p, m, sums, acc, position, row_positions, window, scale,
                    True, has_window, kv_block, stages, s_layout, o_layout,
                )  # fmt: skip
                step += 1
                turn += 1
            before = (step + stages - 1) % stages
            mbarrier.wait(v_ready.index(before), ((step - 1) // stages) & 1)
            acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v_smem.index(before), acc, is_async=True)])
            mbarrier.arrive(turns.index(1 - group_id))
            mbarrier.arrive(v_empty.index(before))

        out_offsets, out_present = _query_rows(
            group_id, query_start, first, num_queries, head, num_kv_heads, group, head_dim, tokens_block, row_layout
        )
        out_present = out_present & (stop > start)
        # the next tile's queries come while this one's results leave, by way of the buffer that both use
        _sequence, head, query_start, first, num_queries, num_before, start, stop = _find_tile(
            base + gl.num_programs(0), tiles_ptr, num_tiles, num_kv_heads, window, has_window, tokens_block, kv_block
        )
        offsets, present = _query_rows(
            group_id, query_start, first, num_queries, head, num_kv_heads, group, head_dim, tokens_block, row_layout
        )
        q = gl.load(q_ptr + offsets, mask=present & (stop > start), other=0.0)
        out = acc / gl.convert_layout(sums, gl.SliceLayout(1, o_layout))[:, None]
        q_smem.store(out.to(out_ptr.dtype.element_ty))
        gl.store(out_ptr + out_offsets, q_smem.load(row_layout), mask=out_present)


@gluon.jit(do_not_specialize=["num_tiles", "window", "table_stride"])
def _hopper_prefill_kernel(
    q_ptr, k_desc, v_desc, block_table_ptr, tiles_ptr, out_ptr, num_tiles, num_kv_heads, window, scale, table_stride,
    has_window: gl.constexpr, block_size: gl.constexpr, group: gl.constexpr, head_dim: gl.constexpr,
    kv_block: gl.constexpr, tokens_block: gl.constexpr, stages: gl.constexpr,
):  # fmt: skip
    kv_layout: gl.constexpr = k_desc.layout
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [stages, kv_block, head_dim], kv_layout)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, [stages, kv_block, head_dim], kv_layout)
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [2, 64, head_dim], kv_layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    for group_id in gl.static_range(2):
        mbarrier.init(turns.index(group_id), count=1)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_attend_tiles, (
                0, q_smem.index(0), k_smem, v_smem, k_ready, v_ready, k_empty, v_empty, turns,
                q_ptr, out_ptr, tiles_ptr, num_tiles, num_kv_heads, window, scale,
                has_window, group, head_dim, kv_block, tokens_block, stages,
            )),
            (_attend_tiles, (
                1, q_smem.index(1), k_smem, v_smem, k_ready, v_ready, k_empty, v_empty, turns,
                q_ptr, out_ptr, tiles_ptr, num_tiles, num_kv_heads, window, scale,
                has_window, group, head_dim, kv_block, tokens_block, stages,
            )),
            (_fetch_tiles, (
                k_desc, v_desc, k_smem, v_smem, k_ready, v_ready, k_empty, v_empty,
                block_table_ptr, tiles_ptr, num_tiles, num_kv_heads, window, table_stride,
                has_window, block_size, kv_block, tokens_block, stages,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def supports(q: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """Whether this kernel can run: bfloat16, heads of 64 or 128, cache blocks of 16 to 128, a group of heads a tile."""
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    return (
        q.dtype == k_cache.dtype == torch.bfloat16
        and head_dim in (64, 128)
        and 16 <= block_size <= KV_BLOCK
        and q.shape[1] // num_kv_heads <= ROWS
        and k_cache.is_contiguous()
    )


def hopper_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
) -> None:
    """Attention of the rows of q [T, Hq, D] from `batch.num_decodes` on, into those of out [T, Hq * D]."""
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    tokens_block = ROWS // group
    if batch.prefill_tiles is None:
        batch.prefill_tiles = ordered_tiles(batch, tokens_block)
    num_tiles = batch.prefill_tiles.shape[1]
    launch(
        _hopper_prefill_kernel,
        (min(num_multiprocessors(q.device), num_tiles * num_kv_heads),),
        q,
        tiles_of(k_cache, [block_size, head_dim]),
        tiles_of(v_cache, [block_size, head_dim]),
        batch.block_table,
        batch.prefill_tiles,
        out,
        num_tiles,
        num_kv_heads,
        sliding_window or 0,
        scale * LOG2_E,
        batch.block_table.stride(0),
        has_window=sliding_window is not None,
        block_size=block_size,
        group=group,
        head_dim=head_dim,
        kv_block=KV_BLOCK,
        tokens_block=tokens_block,
        stages=STAGES,
        num_warps=4,
    )
