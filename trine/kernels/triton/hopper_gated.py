"""The gate and up projections of a SwiGLU block and what follows them, silu(gate) * up, as one Hopper kernel in Gluon.

Roofline: 4 * T * K * I operations; the library's product reaches as much of the tensor cores' rate as the card's power
allows, but writes T * 2I numbers that the activation reads back. Here a tile of 128 rows by 128 outputs takes the
128 gates and the 128 ups of its outputs side by side, so that the activation happens in registers.

A warp asks the copy engine for blocks of both operands, four steps ahead, on into the next tile, the first weights
before the kernel in front is done; two groups of four warps multiply 64 rows each by the same 256 columns, and write
their results while the next blocks come. A program is a multiprocessor and takes every so-manieth tile, in an order in
which those that run together share operands. Where that leaves a last round of tiles half empty, a program's tiles are
by turns of 128 and of 96 outputs: 256 rows with 14,336 outputs are 128 programs of one of each.
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.fp8 import Fp8Rows, Fp8Weight, StoredRows
from trine.kernels.triton.descriptors import tiles_of
from trine.kernels.triton.device import cdiv, num_multiprocessors
from trine.kernels.triton.hopper_attention import async_load, barrier, reinterpret
from trine.kernels.triton.launch import launch

ROWS = 128  # of a tile: 64 a group of warps
COLUMNS = 128  # outputs of a tile
NARROW = 96  # outputs of every second tile, where there are two kinds: 64 and 32
K_BYTES = 128  # of a row in a step: a line of the swizzled layout
STAGES = 4
TOGETHER = 16  # row tiles that run side by side

async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _place(unit, row_tiles, columns, num_rows, rows: gl.constexpr, together: gl.constexpr):
    """First row of a tile or a pair of them, and its place in a row: `together` row tiles deep, then along the columns.

    The last row tile ends with x: the copy engine is slow with rows that are not there, more than others are computed
    twice.
    """
    strip = unit // (together * columns)
    depth = gl.minimum(row_tiles - strip * together, together)
    inside = unit % (together * columns)
    row = gl.minimum((strip * together + inside % depth) * rows, gl.maximum(num_rows - rows, 0))
    return row, inside // depth


@gluon.jit
def _load_weights(desc, w_smem, at: gl.constexpr, columns: gl.constexpr, ready, column, outputs, k, pred):
    """Gate and up of `columns` outputs, one after the other, to a stage's row `at` on."""
    async_load(desc, [column, k], ready, w_smem.slice(at, columns, 0), pred=pred)
    async_load(desc, [outputs + column, k], ready, w_smem.slice(at + columns, columns, 0), pred=pred)


@gluon.jit
def _fetch(
    x_desc, wide_desc, middle_desc, small_desc, x_smem, w_smem, ready, empty, row_tiles, column_units, inputs, outputs,
    num_rows,
    rows: gl.constexpr, wide: gl.constexpr, narrow: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr,
    together: gl.constexpr,
):  # fmt: skip
    """The fetching warp: both operands of all tiles of this program; weights don't wait for the kernel in front."""
    row_bytes: gl.constexpr = k_block * x_desc.dtype.primitive_bitwidth // 8
    row, column = _place(gl.program_id(0), row_tiles, column_units, num_rows, rows, together)
    ahead = gl.minimum(inputs // k_block, stages)
    for i in gl.static_range(stages):
        early = i < ahead
        at = column * (wide + narrow)
        mbarrier.expect(ready.index(i), (rows + 2 * wide) * row_bytes, pred=early)
        _load_weights(wide_desc, w_smem.index(i), 0, wide, ready.index(i), at, outputs, i * k_block, early)
    gdc_wait()
    for i in gl.static_range(stages):
        async_load(x_desc, [row, i * k_block], ready.index(i), x_smem.index(i), pred=i < ahead)
    step = ahead
    for unit in range(gl.program_id(0), row_tiles * column_units, gl.num_programs(0)):
        row, column = _place(unit, row_tiles, column_units, num_rows, rows, together)
        column *= wide + narrow
        begun = gl.where(unit == gl.program_id(0), ahead, 0)
        for k in range(begun * k_block, inputs, k_block):
            stage = step % stages
            mbarrier.wait(empty.index(stage), ((step // stages) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (rows + 2 * wide) * row_bytes)
            async_load(x_desc, [row, k], ready.index(stage), x_smem.index(stage))
            _load_weights(wide_desc, w_smem.index(stage), 0, wide, ready.index(stage), column, outputs, k, True)
            step += 1
        if narrow > 0:
            column += wide
            for k in range(0, inputs, k_block):
                stage = step % stages
                mbarrier.wait(empty.index(stage), ((step // stages) & 1) ^ 1)
                mbarrier.expect(ready.index(stage), (rows + 192) * row_bytes)
                async_load(x_desc, [row, k], ready.index(stage), x_smem.index(stage))
                w = w_smem.index(stage)
                _load_weights(middle_desc, w, 0, 64, ready.index(stage), column, outputs, k, True)
                _load_weights(small_desc, w, 128, 32, ready.index(stage), column + 64, outputs, k, True)
                step += 1


@gluon.jit
def _finish(
    acc, x_scales_ptr, weight_scales_ptr, out_smem, out_desc, row, column, outputs, num_rows,
    columns: gl.constexpr, has_scales: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Write silu(gate) * up of sums [64, 2 columns] of gates and ups to (row, column)."""
    if has_scales:
        at = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
        acc *= gl.load(x_scales_ptr + at, mask=at < num_rows, other=0.0)[:, None]
        at = gl.arange(0, 2 * columns, gl.SliceLayout(0, layout))
        at = column + at % columns + at // columns * outputs
        acc *= gl.load(weight_scales_ptr + at)[None, :]
    gate, up = gl.split(acc.reshape([64, 2, columns]).permute(0, 2, 1))
    out_smem.store((gate / (1.0 + gl.exp(-gate)) * up).to(out_smem.dtype))
    fence_async_shared()
    barrier()
    async_store(out_desc, [row, column], out_smem)


@gluon.jit
def _multiply(
    group: gl.constexpr, wide_out_desc, middle_out_desc, small_out_desc, x_scales_ptr, weight_scales_ptr,
    x_smem, w_smem, wide_out, middle_out, small_out, ready, empty, row_tiles, column_units, inputs, outputs, num_rows,
    rows: gl.constexpr, wide: gl.constexpr, narrow: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr,
    together: gl.constexpr, has_scales: gl.constexpr,
):  # fmt: skip
    """A computing group of warps: its 64 rows of every tile of this program."""
    depth: gl.constexpr = 256 // x_smem.dtype.primitive_bitwidth  # 32 bytes of a row an instruction
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * wide, depth])
    middle_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, depth])
    small_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, depth])
    step = 0
    for unit in range(gl.program_id(0), row_tiles * column_units, gl.num_programs(0)):
        row, column = _place(unit, row_tiles, column_units, num_rows, rows, together)
        row += group * 64
        column *= wide + narrow
        acc = gl.zeros([64, 2 * wide], gl.float32, wide_layout)
        for _ in range(0, inputs, k_block):
            stage = step % stages
            mbarrier.wait(ready.index(stage), (step // stages) & 1)
            x = x_smem.index(stage).slice(group * 64, 64, 0)
            acc = warpgroup_mma(x, w_smem.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(stage))
            step += 1
        tma.store_wait(0)  # of the tile before
        barrier()
        _finish(
            acc, x_scales_ptr, weight_scales_ptr, wide_out, wide_out_desc, row, column, outputs, num_rows,
            wide, has_scales, wide_layout,
        )  # fmt: skip
        if narrow > 0:
            column += wide
            middle = gl.zeros([64, 128], gl.float32, middle_layout)
            small = gl.zeros([64, 64], gl.float32, small_layout)
            for _ in range(0, inputs, k_block):
                stage = step % stages
                mbarrier.wait(ready.index(stage), (step // stages) & 1)
                x = x_smem.index(stage).slice(group * 64, 64, 0)
                w = w_smem.index(stage)
                middle = warpgroup_mma(x, w.slice(0, 128, 0).permute((1, 0)), middle, is_async=True)
                small = warpgroup_mma(x, w.slice(128, 64, 0).permute((1, 0)), small, is_async=True)
                middle, small = warpgroup_mma_wait(0, deps=[middle, small])
                mbarrier.arrive(empty.index(stage))
                step += 1
            tma.store_wait(0)
            barrier()
            _finish(
                middle, x_scales_ptr, weight_scales_ptr, middle_out, middle_out_desc, row, column, outputs, num_rows,
                64, has_scales, middle_layout,
            )  # fmt: skip
            _finish(
                small, x_scales_ptr, weight_scales_ptr, small_out, small_out_desc, row, column + 64, outputs, num_rows,
                32, has_scales, small_layout,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["row_tiles", "num_rows"])
def _gated_kernel(
    x_desc, wide_desc, middle_desc, small_desc, wide_out_desc, middle_out_desc, small_out_desc, x_scales_ptr,
    weight_scales_ptr, row_tiles, column_units, inputs, outputs, num_rows,
    rows: gl.constexpr, wide: gl.constexpr, narrow: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr,
    together: gl.constexpr, has_scales: gl.constexpr,
):  # fmt: skip
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [stages, rows, k_block], x_desc.layout)
    w_smem = gl.allocate_shared_memory(x_desc.dtype, [stages, 2 * wide, k_block], wide_desc.layout)
    wide_out = gl.allocate_shared_memory(wide_out_desc.dtype, [2, 64, wide], wide_out_desc.layout)
    # A group's place for its results holds a wide tile's 128 columns, or a narrow one's 64 and 32.
    middle_out = reinterpret(wide_out, wide_out_desc.dtype, [4, 64, wide // 2], middle_out_desc.layout)
    small_out = reinterpret(wide_out, wide_out_desc.dtype, [8, 64, wide // 4], small_out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    barrier()
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_multiply, (
                0, wide_out_desc, middle_out_desc, small_out_desc, x_scales_ptr, weight_scales_ptr, x_smem, w_smem,
                wide_out.index(0), middle_out.index(0), small_out.index(2), ready, empty,
                row_tiles, column_units, inputs, outputs, num_rows,
                rows, wide, narrow, k_block, stages, together, has_scales,
            )),
            (_multiply, (
                1, wide_out_desc, middle_out_desc, small_out_desc, x_scales_ptr, weight_scales_ptr, x_smem, w_smem,
                wide_out.index(1), middle_out.index(2), small_out.index(6), ready, empty,
                row_tiles, column_units, inputs, outputs, num_rows,
                rows, wide, narrow, k_block, stages, together, has_scales,
            )),
            (_fetch, (
                x_desc, wide_desc, middle_desc, small_desc, x_smem, w_smem, ready, empty,
                row_tiles, column_units, inputs, outputs, num_rows, rows, wide, narrow, k_block, stages, together,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def utilization(num_rows: int, outputs: int, device: torch.device) -> float:
    """The share of the multiprocessors' time, while this kernel runs, in which they compute what is wanted."""
    busiest = _rounds(num_rows, outputs, COLUMNS + _narrow(num_rows, outputs, device), device)
    return num_rows * outputs / (busiest * ROWS * num_multiprocessors(device))


def _rounds(num_rows: int, outputs: int, columns: int, device: torch.device) -> int:
    """Columns that the busiest multiprocessor computes, with units of so many."""
    return cdiv(cdiv(num_rows, ROWS) * (outputs // columns), num_multiprocessors(device)) * columns


def _narrow(num_rows: int, outputs: int, device: torch.device) -> int:
    """Outputs of every second tile: 0, all are wide, unless other ones leave less to the busiest multiprocessor."""
    pair = COLUMNS + NARROW
    if outputs % pair:
        return 0
    return NARROW if _rounds(num_rows, outputs, pair, device) < _rounds(num_rows, outputs, COLUMNS, device) else 0


def supports(x: StoredRows, weight: torch.Tensor | Fp8Weight) -> bool:
    """Whether this kernel takes x [T, K] and weight [2I, K], both bfloat16 or both float8."""
    values, numbers = (x.values, weight.values) if isinstance(x, Fp8Rows) else (x, weight)
    return (
        isinstance(numbers, torch.Tensor)
        and values.dtype == numbers.dtype
        and x.dtype == torch.bfloat16
        and values.is_contiguous()
        and numbers.is_contiguous()
        and numbers.shape[0] % (2 * COLUMNS) == 0
        and numbers.shape[1] * numbers.itemsize % K_BYTES == 0
    )


def gated_linear(x: StoredRows, weight: torch.Tensor | Fp8Weight) -> torch.Tensor:
    """silu(gate) * up of x [T, K] times the transpose of weight [2I, K], whose first half is the gate: [T, I].

    Both are bfloat16, or both float8 with their scales; the result is bfloat16. Nothing may write to the weights in the
    kernels just before: they are read while those run.
    """
    rows, x_scales = (x.values, x.scales) if isinstance(x, Fp8Rows) else (x, None)
    values, weight_scales = (weight.values, weight.scales) if isinstance(weight, Fp8Weight) else (weight, None)
    (num_rows, inputs), outputs = rows.shape, values.shape[0] // 2
    k_block = K_BYTES // rows.itemsize
    y = torch.empty((num_rows, outputs), dtype=torch.bfloat16, device=rows.device)
    narrow = _narrow(num_rows, outputs, rows.device)
    row_tiles, column_units = cdiv(num_rows, ROWS), outputs // (COLUMNS + narrow)
    launch(
        _gated_kernel,
        (min(num_multiprocessors(rows.device), row_tiles * column_units),),
        tiles_of(rows, [ROWS, k_block]),
        *(tiles_of(values, [columns, k_block]) for columns in (128, 64, 32)),
        *(tiles_of(y, [64, columns]) for columns in (128, 64, 32)),
        x_scales,
        weight_scales,
        row_tiles,
        column_units,
        inputs,
        outputs,
        num_rows,
        rows=ROWS,
        wide=COLUMNS,
        narrow=narrow,
        k_block=k_block,
        stages=STAGES,
        together=TOGETHER,
        has_scales=x_scales is not None,
        num_warps=4,
        launch_pdl=True,
    )
    return y
