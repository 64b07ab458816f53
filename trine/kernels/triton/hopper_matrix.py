"""Products of some hundred rows with few outputs on Hopper GPUs, in bfloat16 and float8, left in parts.

Roofline: 2 * T * N * K operations at the tensor cores' rate; below some 160 rows N * K weights. But a product of 256
rows with 4,096 outputs has 64 tiles of 128 by 128: half of the multiprocessors would idle. So up to 4 programs share a
tile, each with its columns of K, all of them resident at once, and nobody adds up what they leave: every part is
rounded to bfloat16 and written, and the kernel behind, which reads each number once anyway (a norm, the rotation of
heads), reads it as so many parts. Parts of half the size have half the error: the sum is as exact as one rounding.

A warp asks the copy engine (TMA) for blocks of both operands, the first weights before the kernel in front is done; two
groups of four warps multiply 64 rows each by all columns of the tile, then write them by way of the ring's places for
their own rows, which nobody needs any more.
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.fp8 import Fp8Rows, Fp8Weight, StoredRows
from trine.kernels.triton.descriptors import tiles_of
from trine.kernels.triton.device import cdiv, num_multiprocessors
from trine.kernels.triton.hopper_attention import async_load, barrier, reinterpret
from trine.kernels.triton.hopper_gated import async_store
from trine.kernels.triton.launch import launch

ROWS = 128  # of a tile: 64 a group of warps
COLUMNS = ((128, 0, 6), (128, 64, 5))  # of a tile, in powers of two; steps in flight
MOST_SPLITS = 4
K_BYTES = 128  # of a row in a step: a line of the swizzled layout


@gluon.jit
def _load_weights(
    first_desc, second_desc, first_ring, second_ring, ready, slot, column, k, pred,
    first: gl.constexpr, second: gl.constexpr,
):  # fmt: skip
    """The weight rows of a step, as many as `ready` expects beside x."""
    async_load(first_desc, [column, k], ready.index(slot), first_ring.index(slot), pred=pred)
    if second > 0:
        async_load(second_desc, [column + first, k], ready.index(slot), second_ring.index(slot), pred=pred)


@gluon.jit
def _fetch(
    x_desc, first_desc, second_desc, x_ring, first_ring, second_ring, ready, empty, row, column, start, count,
    rows: gl.constexpr, first: gl.constexpr, second: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr,
):  # fmt: skip
    """The fetching warp: both operands of this program's steps; weights don't wait for the kernel in front."""
    size: gl.constexpr = (rows + first + second) * k_block * x_desc.dtype.primitive_bitwidth // 8
    for i in gl.static_range(stages):
        mbarrier.expect(ready.index(i), size, pred=i < count)
        _load_weights(
            first_desc, second_desc, first_ring, second_ring, ready, i, column, (start + i) * k_block, i < count,
            first, second,
        )  # fmt: skip
    gdc_wait()
    gdc_launch_dependents()  # all before this kernel are done: the one behind may read what they wrote
    for i in gl.static_range(stages):
        async_load(x_desc, [row, (start + i) * k_block], ready.index(i), x_ring.index(i), pred=i < count)
    for i in range(stages, count):
        slot = i % stages
        mbarrier.wait(empty.index(slot), ((i // stages) & 1) ^ 1)
        mbarrier.expect(ready.index(slot), size)
        _load_weights(
            first_desc, second_desc, first_ring, second_ring, ready, slot, column, (start + i) * k_block, True,
            first, second,
        )  # fmt: skip
        async_load(x_desc, [row, (start + i) * k_block], ready.index(slot), x_ring.index(slot))


@gluon.jit
def _finished(
    acc, x_scales_ptr, w_scales_ptr, bias_ptr, row, column, part, num_rows, outputs,
    columns: gl.constexpr, has_scales: gl.constexpr, has_bias: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Sums [64, columns] with their scales, and in the first part with the bias."""
    n = column + gl.arange(0, columns, gl.SliceLayout(0, layout))
    if has_scales:
        m = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
        acc *= gl.load(x_scales_ptr + m, mask=m < num_rows, other=0.0)[:, None]
        acc *= gl.load(w_scales_ptr + n, mask=n < outputs, other=0.0)[None, :]
    if has_bias:
        acc += gl.load(bias_ptr + n, mask=(n < outputs) & (part == 0), other=0.0).to(gl.float32)[None, :]
    return acc


@gluon.jit
def _leave(y, smem, out_desc, row, column):
    """Write y [64, 64] by way of shared memory that is free."""
    smem.store(y)
    fence_async_shared()
    barrier()
    async_store(out_desc, [row, column], smem)


@gluon.jit
def _multiply(
    group: gl.constexpr, x_scales_ptr, w_scales_ptr, bias_ptr, out_desc, x_ring, first_ring, second_ring, out_ring,
    ready, empty, row, column, out_row, part, count, num_rows, outputs,
    first: gl.constexpr, second: gl.constexpr, stages: gl.constexpr, has_scales: gl.constexpr, has_bias: gl.constexpr,
):  # fmt: skip
    """A computing group of warps: its 64 rows of this program's part of a tile."""
    depth: gl.constexpr = 256 // x_ring.dtype.primitive_bitwidth  # 32 bytes of a row an instruction
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, first, depth])
    acc = gl.zeros([64, first], gl.float32, layout)
    if second > 0:
        other_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, second, depth])
        other = gl.zeros([64, second], gl.float32, other_layout)
    for i in range(count):
        slot = i % stages
        mbarrier.wait(ready.index(slot), (i // stages) & 1)
        x = x_ring.index(slot).slice(group * 64, 64, 0)
        acc = warpgroup_mma(x, first_ring.index(slot).permute((1, 0)), acc, is_async=True)
        if second > 0:
            other = warpgroup_mma(x, second_ring.index(slot).permute((1, 0)), other, is_async=True)
            acc, other = warpgroup_mma_wait(0, deps=[acc, other])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(slot))
    row += group * 64
    out_row += group * 64
    acc = _finished(
        acc, x_scales_ptr, w_scales_ptr, bias_ptr, row, column, part, num_rows, outputs,
        first, has_scales, has_bias, layout,
    )  # fmt: skip
    left, right = gl.split(acc.to(out_desc.dtype).reshape([64, 2, first // 2]).permute(0, 2, 1))
    barrier()  # all warps of the group are done with its rows of x
    _leave(left, out_ring.index(0).slice(group * 64, 64, 0), out_desc, out_row, column)
    _leave(right, out_ring.index(1).slice(group * 64, 64, 0), out_desc, out_row, column + 64)
    if second > 0:
        other = _finished(
            other, x_scales_ptr, w_scales_ptr, bias_ptr, row, column + first, part, num_rows, outputs,
            second, has_scales, has_bias, other_layout,
        )  # fmt: skip
        smem = out_ring.index(2).slice(group * 64, 64, 0)
        _leave(other.to(out_desc.dtype), smem, out_desc, out_row, column + first)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "row_tiles", "splits"])
def _matrix_kernel(
    x_desc, first_desc, second_desc, out_desc, x_scales_ptr, w_scales_ptr, bias_ptr, row_tiles, k_steps,
    splits, num_rows, outputs,
    rows: gl.constexpr, first: gl.constexpr, second: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr,
    has_scales: gl.constexpr, has_bias: gl.constexpr,
):  # fmt: skip
    """Program i: part i % splits of tile i // splits."""
    tile, part = gl.program_id(0) // splits, gl.program_id(0) % splits
    # The last row tile ends with x: the copy engine is slow with rows that are not there.
    row = gl.minimum(tile % row_tiles * rows, gl.maximum(num_rows - rows, 0))
    column = tile // row_tiles * (first + second)
    out_row = row + part * gl.maximum(num_rows, rows)
    start = part * k_steps // splits
    count = (part + 1) * k_steps // splits - start
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [stages, rows, k_block], x_desc.layout)
    out_ring = reinterpret(x_ring, out_desc.dtype, [stages, rows, 64], out_desc.layout)
    first_ring = gl.allocate_shared_memory(x_desc.dtype, [stages, first, k_block], first_desc.layout)
    second_ring = first_ring
    if second > 0:
        second_ring = gl.allocate_shared_memory(x_desc.dtype, [stages, second, k_block], second_desc.layout)
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
                0, x_scales_ptr, w_scales_ptr, bias_ptr, out_desc, x_ring, first_ring, second_ring, out_ring,
                ready, empty, row, column, out_row, part, count, num_rows, outputs,
                first, second, stages, has_scales, has_bias,
            )),
            (_multiply, (
                1, x_scales_ptr, w_scales_ptr, bias_ptr, out_desc, x_ring, first_ring, second_ring, out_ring,
                ready, empty, row, column, out_row, part, count, num_rows, outputs,
                first, second, stages, has_scales, has_bias,
            )),
            (_fetch, (
                x_desc, first_desc, second_desc, x_ring, first_ring, second_ring, ready, empty,
                row, column, start, count, rows, first, second, k_block, stages,
            )),
        ],
        [4, 1],
        [200, 40],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut up: columns of a tile in two powers of two (or one and 0), programs that share it, and
    steps in flight.
    """

    first: int
    second: int
    splits: int
    stages: int


@cache
def tiling(num_rows: int, inputs_bytes: int, outputs: int, multiprocessors: int) -> Tiling | None:
    """The one that leaves the least to a program, with a multiprocessor for each; None where there is none.

    Each program has a step at least: it is by x that it knows the kernel in front to be done.
    """
    row_tiles, steps = cdiv(num_rows, ROWS), cdiv(inputs_bytes, K_BYTES)
    found: list[tuple[int, Tiling]] = []
    for first, second, stages in COLUMNS:
        tiles = row_tiles * cdiv(outputs, first + second)
        splits = min(multiprocessors // tiles, MOST_SPLITS, steps)
        if splits:
            found.append(((first + second) * cdiv(steps, splits), Tiling(first, second, splits, stages)))
    return min(found, key=lambda choice: choice[0])[1] if found else None


def _tiling(x: torch.Tensor, weight: torch.Tensor) -> Tiling | None:
    return tiling(x.shape[0], x.shape[1] * x.itemsize, weight.shape[0], num_multiprocessors(x.device))


def supports(x: StoredRows, weight: torch.Tensor | Fp8Weight) -> bool:
    """Whether this kernel takes x [T, K] and weight [N, K], both bfloat16 or both float8 with a scale a row."""
    values, numbers = (x.values, weight.values) if isinstance(x, Fp8Rows) else (x, weight)
    return (
        isinstance(numbers, torch.Tensor)
        and values.dtype == numbers.dtype
        and x.dtype == torch.bfloat16
        and (x.scales.shape[1] == 1 if isinstance(x, Fp8Rows) else True)
        and values.is_contiguous()
        and numbers.is_contiguous()
        and numbers.shape[1] * numbers.itemsize % 16 == 0
        and numbers.shape[0] % 8 == 0
        and _tiling(values, numbers) is not None
    )


def linear_parts(x: StoredRows, weight: torch.Tensor | Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: parts [P, T, N] bfloat16, whose sum it is.

    For what `supports` says. Nothing may write to the weights in the kernels just before: they are read meanwhile.
    """
    values, x_scales = (x.values, x.scales) if isinstance(x, Fp8Rows) else (x, None)
    numbers, w_scales = (weight.values, weight.scales) if isinstance(weight, Fp8Weight) else (weight, None)
    (num_rows, inputs), outputs = values.shape, numbers.shape[0]
    own = _tiling(values, numbers)
    assert own is not None
    k_block = K_BYTES // values.itemsize
    row_tiles = cdiv(num_rows, ROWS)
    parts = torch.empty((own.splits, max(num_rows, ROWS), outputs), dtype=torch.bfloat16, device=values.device)
    launch(
        _matrix_kernel,
        (row_tiles * cdiv(outputs, own.first + own.second) * own.splits,),
        tiles_of(values, [ROWS, k_block]),
        tiles_of(numbers, [own.first, k_block]),
        tiles_of(numbers, [own.second or own.first, k_block]),
        tiles_of(parts, [64, 64]),
        x_scales,
        w_scales,
        bias,
        row_tiles,
        cdiv(inputs, k_block),
        own.splits,
        num_rows,
        outputs,
        rows=ROWS,
        first=own.first,
        second=own.second,
        k_block=k_block,
        stages=own.stages,
        has_scales=x_scales is not None,
        has_bias=bias is not None,
        num_warps=4,
        launch_pdl=True,
    )
    return parts[:, :num_rows]
