"""The gate and up projections of a SwiGLU block and what follows them, silu(gate) * up, as one Hopper kernel in Gluon.

Roofline: 4 * T * K * I operations; the library's product reaches as much of the tensor cores' rate as the card's power
allows, but writes T * 2I numbers that the activation reads back. Here a tile of 128 rows by 128 outputs takes the
128 gates and the 128 ups of its outputs side by side, so that the activation happens in registers.

A warp asks the copy engine for blocks of both operands, four steps ahead, on into the next tile; two groups of four
warps multiply 64 rows each by the same 256 columns, and write their results while the next blocks come. A program is a
multiprocessor and takes every so-manieth tile, in an order in which those that run together share operands.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from trine.kernels.fp8 import Fp8Rows, Fp8Weight, Rows
from trine.kernels.triton.device import cdiv, num_multiprocessors
from trine.kernels.triton.hopper_attention import async_load, barrier

ROWS = 128  # of a tile: 64 a group of warps
COLUMNS = 128  # outputs of a tile
K_BYTES = 128  # of a row in a step: a line of the swizzled layout
STAGES = 4
TOGETHER = 16  # row tiles that run side by side

async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _place(tile, row_tiles, column_tiles, together: gl.constexpr):
    """Row and column of a tile: `together` row tiles deep, then along the columns."""
    strip = tile // (together * column_tiles)
    depth = gl.minimum(row_tiles - strip * together, together)
    inside = tile % (together * column_tiles)
    return strip * together + inside % depth, inside // depth


@gluon.jit
def _fetch(
    x_desc, weight_desc, x_smem, w_smem, ready, empty, row_tiles, column_tiles, inputs, outputs,
    rows: gl.constexpr, columns: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr, together: gl.constexpr,
):  # fmt: skip
    """The fetching warp: both operands of all tiles of this program, in order."""
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _place(tile, row_tiles, column_tiles, together)
        for k in range(0, inputs, k_block):
            stage = step % stages
            mbarrier.wait(empty.index(stage), ((step // stages) & 1) ^ 1)
            mbarrier.expect(
                ready.index(stage), (rows + 2 * columns) * k_block * x_desc.dtype.primitive_bitwidth // 8
            )  # fmt: skip
            w_stage = w_smem.index(stage)
            async_load(x_desc, [row * rows, k], ready.index(stage), x_smem.index(stage))
            async_load(weight_desc, [column * columns, k], ready.index(stage), w_stage.slice(0, columns, 0))
            up = w_stage.slice(columns, columns, 0)
            async_load(weight_desc, [outputs + column * columns, k], ready.index(stage), up)
            step += 1


@gluon.jit
def _multiply(
    group_id: gl.constexpr, out_desc, x_scales_ptr, weight_scales_ptr, x_smem, w_smem, out_smem, ready, empty,
    row_tiles, column_tiles, inputs, outputs, num_rows,
    rows: gl.constexpr, columns: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr, together: gl.constexpr,
    has_scales: gl.constexpr,
):  # fmt: skip
    """A computing group of warps: its 64 rows of every tile of this program."""
    depth: gl.constexpr = 256 // x_smem.dtype.primitive_bitwidth  # 32 bytes of a row an instruction
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * columns, depth])
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _place(tile, row_tiles, column_tiles, together)
        acc = gl.zeros([64, 2 * columns], gl.float32, layout)
        for _ in range(0, inputs, k_block):
            stage = step % stages
            mbarrier.wait(ready.index(stage), (step // stages) & 1)
            x = x_smem.index(stage).slice(group_id * 64, 64, 0)
            acc = warpgroup_mma(x, w_smem.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(stage))
            step += 1
        if has_scales:
            at = row * rows + group_id * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
            acc *= gl.load(x_scales_ptr + at, mask=at < num_rows, other=0.0)[:, None]
            at = gl.arange(0, 2 * columns, gl.SliceLayout(0, layout))
            at = column * columns + at % columns + at // columns * outputs
            acc *= gl.load(weight_scales_ptr + at)[None, :]
        gate, up = gl.split(acc.reshape([64, 2, columns]).permute(0, 2, 1))
        y = (gate / (1.0 + gl.exp(-gate)) * up).to(out_smem.dtype)
        tma.store_wait(0)  # of the tile before
        barrier()
        out_smem.store(y)
        fence_async_shared()
        barrier()
        async_store(out_desc, [row * rows + group_id * 64, column * columns], out_smem)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["row_tiles", "num_rows"])
def _gated_kernel(
    x_desc, weight_desc, out_desc, x_scales_ptr, weight_scales_ptr, row_tiles, column_tiles, inputs, outputs, num_rows,
    rows: gl.constexpr, columns: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr, together: gl.constexpr,
    has_scales: gl.constexpr,
):  # fmt: skip
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [stages, rows, k_block], x_desc.layout)
    w_smem = gl.allocate_shared_memory(x_desc.dtype, [stages, 2 * columns, k_block], weight_desc.layout)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [2, 64, columns], out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_multiply, (
                0, out_desc, x_scales_ptr, weight_scales_ptr, x_smem, w_smem, out_smem.index(0), ready, empty,
                row_tiles, column_tiles, inputs, outputs, num_rows,
                rows, columns, k_block, stages, together, has_scales,
            )),
            (_multiply, (
                1, out_desc, x_scales_ptr, weight_scales_ptr, x_smem, w_smem, out_smem.index(1), ready, empty,
                row_tiles, column_tiles, inputs, outputs, num_rows,
                rows, columns, k_block, stages, together, has_scales,
            )),
            (_fetch, (
                x_desc, weight_desc, x_smem, w_smem, ready, empty, row_tiles, column_tiles, inputs, outputs,
                rows, columns, k_block, stages, together,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def supports(x: Rows, weight: torch.Tensor | Fp8Weight) -> bool:
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


def gated_linear(x: Rows, weight: torch.Tensor | Fp8Weight) -> torch.Tensor:
    """silu(gate) * up of x [T, K] times the transpose of weight [2I, K], whose first half is the gate: [T, I].

    Both are bfloat16, or both float8 with their scales; the result is bfloat16.
    """
    rows, x_scales = (x.values, x.scales) if isinstance(x, Fp8Rows) else (x, None)
    values, weight_scales = (weight.values, weight.scales) if isinstance(weight, Fp8Weight) else (weight, None)
    (num_rows, inputs), outputs = rows.shape, values.shape[0] // 2
    k_block = K_BYTES // rows.itemsize
    y = torch.empty((num_rows, outputs), dtype=torch.bfloat16, device=rows.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * rows.itemsize, rank=2)
    out_layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    row_tiles, column_tiles = cdiv(num_rows, ROWS), outputs // COLUMNS
    _gated_kernel[(min(num_multiprocessors(rows.device), row_tiles * column_tiles),)](
        TensorDescriptor(rows, list(rows.shape), [inputs, 1], [ROWS, k_block], layout),
        TensorDescriptor(values, list(values.shape), [inputs, 1], [COLUMNS, k_block], layout),
        TensorDescriptor(y, list(y.shape), [outputs, 1], [64, COLUMNS], out_layout),
        x_scales,
        weight_scales,
        row_tiles,
        column_tiles,
        inputs,
        outputs,
        num_rows,
        rows=ROWS,
        columns=COLUMNS,
        k_block=k_block,
        stages=STAGES,
        together=TOGETHER,
        has_scales=x_scales is not None,
        num_warps=4,
    )
    return y
