"""float8 matrix products of some hundred rows with few outputs on Hopper GPUs, each tile split among multiprocessors.

Roofline: 2 * T * N * K operations at the tensor cores' 8-bit rate; below some 160 rows N * K bytes of weights. But a
product of 256 rows with 4,096 outputs has 64 tiles of 128 by 128: the library leaves half of the multiprocessors idle,
and takes as long for 65 rows. Here 2 to 4 programs share a tile's columns of K: the first one waits for what the others
have summed up, and adds that to its own in their order. All programs are resident at once.

A warp asks the copy engine (TMA) for blocks of both operands, the first weights before the kernel in front is done; two
groups of four warps multiply 64 rows each by the same 128 weight rows. Needs Gluon, which Triton's interpreter can't
run; `bench/prefill.py` compares it.
"""

from __future__ import annotations

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.fp8 import Fp8Rows, Fp8Weight
from trine.kernels.triton.device import cdiv, num_multiprocessors
from trine.kernels.triton.hopper_attention import async_load, barrier

ROWS = 128  # of a tile: 64 a group of warps
COLUMNS = 128  # outputs of a tile
K_BLOCK = 256
STAGES = 3


@gluon.jit
def _fetch(
    x_desc, w_desc, x_ring, w_ring, ready, empty, row, column, first, count,
    k_block: gl.constexpr, stages: gl.constexpr,
):  # fmt: skip
    """The fetching warp: both operands of this program's steps; weights don't wait for the kernel in front."""
    size: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes
    for i in gl.static_range(stages):
        mbarrier.expect(ready.index(i), size, pred=i < count)
        async_load(w_desc, [column, (first + i) * k_block], ready.index(i), w_ring.index(i), pred=i < count)
    gdc_wait()
    for i in gl.static_range(stages):
        async_load(x_desc, [row, (first + i) * k_block], ready.index(i), x_ring.index(i), pred=i < count)
    for i in range(stages, count):
        slot = i % stages
        mbarrier.wait(empty.index(slot), ((i // stages) & 1) ^ 1)
        mbarrier.expect(ready.index(slot), size)
        async_load(w_desc, [column, (first + i) * k_block], ready.index(slot), w_ring.index(slot))
        async_load(x_desc, [row, (first + i) * k_block], ready.index(slot), x_ring.index(slot))


@gluon.jit
def _multiply(
    group: gl.constexpr, x_scales_ptr, w_scales_ptr, bias_ptr, y_ptr, parts_ptr, arrivals_ptr, x_ring, w_ring,
    ready, empty, tile, row, column, count, num_rows, outputs,
    columns: gl.constexpr, stages: gl.constexpr, splits: gl.constexpr, has_bias: gl.constexpr,
):  # fmt: skip
    """A computing group of warps: its 64 rows of this program's part of a tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32])
    m = gl.arange(0, 64, gl.SliceLayout(1, layout))
    n = gl.arange(0, columns, gl.SliceLayout(0, layout))
    acc = gl.zeros([64, columns], gl.float32, layout)
    for i in range(count):
        slot = i % stages
        mbarrier.wait(ready.index(slot), (i // stages) & 1)
        x = x_ring.index(slot).slice(group * 64, 64, 0)
        acc = warpgroup_mma(x, w_ring.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(slot))
    # Any order of a part's numbers will do; in this one a warp's neighbours store side by side.
    place = (m[:, None] // 8 * (columns // 8) + n[None, :] // 8) * 64 + m[:, None] % 8 * 8 + n[None, :] % 8
    size: gl.constexpr = 64 * columns
    part_ptr = parts_ptr + (gl.program_id(0) * 2 + group) * size + place
    arrival_ptr = arrivals_ptr + tile * 2 + group
    if gl.program_id(0) % splits > 0:
        gl.store(part_ptr, acc)
        barrier()
        gl.atomic_add(arrival_ptr, 1, sem="release")
    else:
        m += row + group * 64
        n += column
        x_scales = gl.load(x_scales_ptr + m, mask=m < num_rows, other=0.0)
        w_scales = gl.load(w_scales_ptr + n, mask=n < outputs, other=0.0)
        arrived = 0
        while arrived != splits - 1:
            arrived = gl.atomic_add(arrival_ptr, 0, sem="acquire")
        barrier()
        for other in gl.static_range(1, splits):
            acc += gl.load(part_ptr + other * 2 * size, cache_modifier=".cg")
        gl.store(arrival_ptr, 0)  # ready for the next launch
        y = acc * x_scales[:, None] * w_scales[None, :]
        if has_bias:
            y += gl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(gl.float32)[None, :]
        mask = (m < num_rows)[:, None] & (n < outputs)[None, :]
        gl.store(y_ptr + m[:, None] * outputs + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["num_rows", "row_tiles"])
def _fp8_matrix_kernel(
    x_desc, w_desc, x_scales_ptr, w_scales_ptr, bias_ptr, y_ptr, parts_ptr, arrivals_ptr,
    row_tiles, k_steps, num_rows, outputs,
    rows: gl.constexpr, columns: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr, splits: gl.constexpr,
    has_bias: gl.constexpr,
):  # fmt: skip
    """Program i: part i % splits of tile i // splits."""
    tile, part = gl.program_id(0) // splits, gl.program_id(0) % splits
    row, column = tile % row_tiles * rows, tile // row_tiles * columns
    first = part * k_steps // splits
    count = (part + 1) * k_steps // splits - first
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [stages, rows, k_block], x_desc.layout)
    w_ring = gl.allocate_shared_memory(x_desc.dtype, [stages, columns, k_block], w_desc.layout)
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
                0, x_scales_ptr, w_scales_ptr, bias_ptr, y_ptr, parts_ptr, arrivals_ptr, x_ring, w_ring,
                ready, empty, tile, row, column, count, num_rows, outputs, columns, stages, splits, has_bias,
            )),
            (_multiply, (
                1, x_scales_ptr, w_scales_ptr, bias_ptr, y_ptr, parts_ptr, arrivals_ptr, x_ring, w_ring,
                ready, empty, tile, row, column, count, num_rows, outputs, columns, stages, splits, has_bias,
            )),
            (_fetch, (
                x_desc, w_desc, x_ring, w_ring, ready, empty, row, column, first, count, k_block, stages,
            )),
        ],
        [4, 1],
        [200, 40],
    )  # fmt: skip


@cache
def _scratch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of tiles, and zeroed counters, which every launch leaves at zero: kernels run in one stream at a time."""
    programs = num_multiprocessors(device)
    parts = torch.empty(programs * ROWS * COLUMNS, dtype=torch.float32, device=device)
    return parts, torch.zeros(2 * programs, dtype=torch.int32, device=device)


def _splits(num_rows: int, inputs: int, outputs: int, device: torch.device) -> int:
    """Programs a tile, as many as a multiprocessor each allows; 1: none of our business.

    Each has a step at least: it is by x that a program knows the kernel in front to be done.
    """
    tiles = cdiv(num_rows, ROWS) * cdiv(outputs, COLUMNS)
    most = min(num_multiprocessors(device) // tiles, cdiv(inputs, K_BLOCK))
    return next((splits for splits in (4, 3, 2) if splits <= most), 1)


def supports(x: Fp8Rows, weight: Fp8Weight) -> bool:
    """Whether this kernel takes x [T, K] and weight [N, K], and is worth it."""
    outputs, inputs = weight.shape
    return (
        x.shape[0] > 64
        and x.dtype == torch.bfloat16
        and x.scales.shape[1] == 1
        and inputs % 16 == 0
        and x.values.is_contiguous()
        and weight.values.is_contiguous()
        and _splits(x.shape[0], inputs, outputs, x.device) > 1
    )


def fp8_matrix(x: Fp8Rows, weight: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] bfloat16; see `supports`.

    Nothing may write to the weights in the kernels just before: they are read while those run.
    """
    (num_rows, inputs), outputs = x.shape, weight.shape[0]
    device = x.values.device
    y = torch.empty((num_rows, outputs), dtype=torch.bfloat16, device=device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    row_tiles, splits = cdiv(num_rows, ROWS), _splits(num_rows, inputs, outputs, device)
    _fp8_matrix_kernel[(row_tiles * cdiv(outputs, COLUMNS) * splits,)](
        TensorDescriptor(x.values, [num_rows, inputs], [inputs, 1], [ROWS, K_BLOCK], layout),
        TensorDescriptor(weight.values, [outputs, inputs], [inputs, 1], [COLUMNS, K_BLOCK], layout),
        x.scales,
        weight.scales,
        bias,
        y,
        *_scratch(device),
        row_tiles,
        cdiv(inputs, K_BLOCK),
        num_rows,
        outputs,
        rows=ROWS,
        columns=COLUMNS,
        k_block=K_BLOCK,
        stages=STAGES,
        splits=splits,
        has_bias=bias is not None,
        num_warps=4,
        launch_pdl=True,
    )
    return y
