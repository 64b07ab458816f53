"""Products of many rows with bias, activation and rounding in their epilogue, as one Hopper kernel in Gluon.

Roofline: 2 M N K operations on tensor cores; with K below a thousand what counts besides is how many tiles a
multiprocessor gets (a last round that half of them sit out costs as much as a full one), and that loads of the next
tile run under the end of this one. So tiles come in several sizes, among them 192 columns and 192 rows, and a program
is a multiprocessor that takes every so-manieth tile.

A warp asks the copy engine for blocks of both operands some steps ahead, on into the next tile; two or three groups of
four warps multiply 64 rows each by all columns of the tile (a part of 128 and one of 64, where these are 192), and
write their results while the next blocks come. Derived from `trine.kernels.triton.hopper_gated`.
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

from trine.graph.gpu.kernels.epilogue import place
from trine.kernels import fp8
from trine.kernels.triton.descriptors import tiles_of
from trine.kernels.triton.device import cdiv, num_multiprocessors
from trine.kernels.triton.hopper_attention import async_load, barrier

TILES = ((128, 256), (128, 192), (192, 192), (128, 128), (192, 128))
"""Rows (64 a group of warps) and columns."""
K_BYTES = 128  # of a row in a step: a line of the swizzled layout
TOGETHER = 8  # row tiles that run side by side

async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


def parts(columns: int) -> tuple[int, int]:
    """Columns as powers of two, which a product of the tensor cores takes."""
    return (128, 64) if columns == 192 else (columns, 0)


@gluon.jit
def _place(tile, row_tiles, column_tiles, together: gl.constexpr):
    """Row and column of a tile: `together` row tiles deep, then along the columns."""
    strip = tile // (together * column_tiles)
    depth = gl.minimum(row_tiles - strip * together, together)
    inside = tile % (together * column_tiles)
    return strip * together + inside % depth, inside // depth


@gluon.jit
def _fetch(
    x_desc, first_desc, second_desc, x_smem, first_smem, second_smem, ready, empty, row_tiles, column_tiles, inputs,
    groups: gl.constexpr, first: gl.constexpr, second: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr,
    together: gl.constexpr,
):  # fmt: skip
    """The fetching warp: both operands of all tiles of this program, in order."""
    size: gl.constexpr = (64 * groups + first + second) * k_block * x_desc.dtype.primitive_bitwidth // 8
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _place(tile, row_tiles, column_tiles, together)
        for k in range(0, inputs, k_block):
            stage = step % stages
            mbarrier.wait(empty.index(stage), ((step // stages) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), size)
            for group in gl.static_range(groups):
                at = row * (64 * groups) + group * 64
                async_load(x_desc, [at, k], ready.index(stage), x_smem.index(stage * groups + group))
            at = column * (first + second)
            async_load(first_desc, [at, k], ready.index(stage), first_smem.index(stage))
            if second > 0:
                async_load(second_desc, [at + first, k], ready.index(stage), second_smem.index(stage))
            step += 1


@gluon.jit
def _activated(x, activation: gl.constexpr):
    """The activation at that place of `epilogue.ACTIVATIONS`: none, ReLU, or GELU by the card's tanh."""
    if activation == 1:
        x = gl.maximum(x, 0.0)
    elif activation == 9:
        inner = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
        tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], gl.float32, True, 1)
        x = 0.5 * x + 0.5 * x * tanh
    return x


@gluon.jit
def _finish(
    acc, scales_ptr, bias_ptr, out_smem, out_desc, row, column, outputs, inverse_scale,
    columns: gl.constexpr, has_scales: gl.constexpr, has_bias: gl.constexpr, activation: gl.constexpr,
    has_rounded: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Scale, add, activate, round and write sums [64, columns] at (row, column)."""
    at = column + gl.arange(0, columns, gl.SliceLayout(0, layout))
    if has_scales:
        acc *= gl.load(scales_ptr + at, mask=at < outputs, other=0.0)[None, :]
    if has_bias:
        acc += gl.load(bias_ptr + at, mask=at < outputs, other=0.0).to(gl.float32)[None, :]
    acc = _activated(acc, activation)
    if has_rounded:
        acc = gl.minimum(gl.maximum(acc * inverse_scale, -448.0), 448.0)
    out_smem.store(acc.to(out_smem.dtype))
    fence_async_shared()
    barrier()
    async_store(out_desc, [row, column], out_smem)


@gluon.jit
def _multiply(
    group: gl.constexpr, first_out_desc, second_out_desc, scales_ptr, bias_ptr, x_smem, first_smem, second_smem,
    first_out, second_out, ready, empty, row_tiles, column_tiles, inputs, outputs, inverse_scale,
    groups: gl.constexpr, first: gl.constexpr, second: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr,
    together: gl.constexpr, has_scales: gl.constexpr, has_bias: gl.constexpr, activation: gl.constexpr,
    has_rounded: gl.constexpr,
):  # fmt: skip
    """A computing group of warps: its 64 rows of every tile of this program."""
    depth: gl.constexpr = 256 // x_smem.dtype.primitive_bitwidth  # 32 bytes of a row an instruction
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, first, depth])
    if second > 0:
        other_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, second, depth])
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = _place(tile, row_tiles, column_tiles, together)
        acc = gl.zeros([64, first], gl.float32, layout)
        if second > 0:
            other = gl.zeros([64, second], gl.float32, other_layout)
        for _ in range(0, inputs, k_block):
            stage = step % stages
            mbarrier.wait(ready.index(stage), (step // stages) & 1)
            x = x_smem.index(stage * groups + group)
            acc = warpgroup_mma(x, first_smem.index(stage).permute((1, 0)), acc, is_async=True)
            if second > 0:
                other = warpgroup_mma(x, second_smem.index(stage).permute((1, 0)), other, is_async=True)
                acc, other = warpgroup_mma_wait(0, deps=[acc, other])
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(stage))
            step += 1
        tma.store_wait(0)  # of the tile before
        barrier()
        top, left = (row * groups + group) * 64, column * (first + second)
        _finish(
            acc, scales_ptr, bias_ptr, first_out, first_out_desc, top, left, outputs, inverse_scale,
            first, has_scales, has_bias, activation, has_rounded, layout,
        )  # fmt: skip
        if second > 0:
            _finish(
                other, scales_ptr, bias_ptr, second_out, second_out_desc, top, left + first, outputs, inverse_scale,
                second, has_scales, has_bias, activation, has_rounded, other_layout,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["row_tiles"])
def _linear_kernel(
    x_desc, first_desc, second_desc, first_out_desc, second_out_desc, scales_ptr, bias_ptr,
    row_tiles, column_tiles, inputs, outputs, inverse_scale,
    groups: gl.constexpr, first: gl.constexpr, second: gl.constexpr, k_block: gl.constexpr, stages: gl.constexpr,
    together: gl.constexpr, has_scales: gl.constexpr, has_bias: gl.constexpr, activation: gl.constexpr,
    has_rounded: gl.constexpr,
):  # fmt: skip
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [stages * groups, 64, k_block], x_desc.layout)
    first_smem = gl.allocate_shared_memory(x_desc.dtype, [stages, first, k_block], first_desc.layout)
    first_out = gl.allocate_shared_memory(first_out_desc.dtype, [groups, 64, first], first_out_desc.layout)
    second_smem = first_smem
    second_out = first_out
    if second > 0:
        second_smem = gl.allocate_shared_memory(x_desc.dtype, [stages, second, k_block], second_desc.layout)
        second_out = gl.allocate_shared_memory(second_out_desc.dtype, [groups, 64, second], second_out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=groups)
    fence_async_shared()
    barrier()
    if groups == 2:
        gl.warp_specialize(
            [
                (_multiply, (
                    0, first_out_desc, second_out_desc, scales_ptr, bias_ptr, x_smem, first_smem, second_smem,
                    first_out.index(0), second_out.index(0), ready, empty, row_tiles, column_tiles, inputs, outputs,
                    inverse_scale, groups, first, second, k_block, stages, together,
                    has_scales, has_bias, activation, has_rounded,
                )),
                (_multiply, (
                    1, first_out_desc, second_out_desc, scales_ptr, bias_ptr, x_smem, first_smem, second_smem,
                    first_out.index(1), second_out.index(1), ready, empty, row_tiles, column_tiles, inputs, outputs,
                    inverse_scale, groups, first, second, k_block, stages, together,
                    has_scales, has_bias, activation, has_rounded,
                )),
                (_fetch, (
                    x_desc, first_desc, second_desc, x_smem, first_smem, second_smem, ready, empty,
                    row_tiles, column_tiles, inputs, groups, first, second, k_block, stages, together,
                )),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (
                    0, first_out_desc, second_out_desc, scales_ptr, bias_ptr, x_smem, first_smem, second_smem,
                    first_out.index(0), second_out.index(0), ready, empty, row_tiles, column_tiles, inputs, outputs,
                    inverse_scale, groups, first, second, k_block, stages, together,
                    has_scales, has_bias, activation, has_rounded,
                )),
                (_multiply, (
                    1, first_out_desc, second_out_desc, scales_ptr, bias_ptr, x_smem, first_smem, second_smem,
                    first_out.index(1), second_out.index(1), ready, empty, row_tiles, column_tiles, inputs, outputs,
                    inverse_scale, groups, first, second, k_block, stages, together,
                    has_scales, has_bias, activation, has_rounded,
                )),
                (_multiply, (
                    2, first_out_desc, second_out_desc, scales_ptr, bias_ptr, x_smem, first_smem, second_smem,
                    first_out.index(2), second_out.index(2), ready, empty, row_tiles, column_tiles, inputs, outputs,
                    inverse_scale, groups, first, second, k_block, stages, together,
                    has_scales, has_bias, activation, has_rounded,
                )),
                (_fetch, (
                    x_desc, first_desc, second_desc, x_smem, first_smem, second_smem, ready, empty,
                    row_tiles, column_tiles, inputs, groups, first, second, k_block, stages, together,
                )),
            ],
            [4, 4, 1],
            [152, 152, 40],
        )  # fmt: skip


def stages(rows: int, columns: int, out_bytes: int) -> int:
    """Steps in flight that fit a multiprocessor's 227 KB beside the results."""
    return min(5, (226 * 1024 - rows * columns * out_bytes) // ((rows + columns) * K_BYTES))


def supports(inputs: int, outputs: int, itemsize: int, activation: str) -> bool:
    """Whether the copy engine takes rows of such operands (of `itemsize` bytes a number) and results."""
    return inputs * itemsize % 16 == 0 and outputs % 16 == 0 and activation in ("", "relu", "gelu", "gelu_tanh")


def hopper_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    tile: tuple[int, int],
    scales: torch.Tensor | None = None,
    out_scale: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """activation(x [..., K] weightᵀ [N, K] + bias [N]), all contiguous, of one 16-bit type or float8.

    `scales` [N] float32, of float8 operands: x's scale times the weight's. The result is of x's type, `out_dtype`, or
    float8 over `out_scale`.
    """
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs)
    dtype = fp8.DTYPE if out_scale else out_dtype or x.dtype
    y = torch.empty((rows.shape[0], outputs), dtype=dtype, device=x.device)
    groups, (first, second) = tile[0] // 64, parts(tile[1])
    k_block = K_BYTES // x.itemsize
    row_tiles, column_tiles = cdiv(rows.shape[0], tile[0]), cdiv(outputs, tile[1])
    name = "gelu_fast" if activation.startswith("gelu") else activation
    _linear_kernel[(min(num_multiprocessors(x.device), row_tiles * column_tiles),)](
        tiles_of(rows, [64, k_block]),
        tiles_of(weight, [first, k_block]),
        tiles_of(weight, [second or first, k_block]),
        tiles_of(y, [64, first]),
        tiles_of(y, [64, second or first]),
        scales,
        bias,
        row_tiles,
        column_tiles,
        inputs,
        outputs,
        1.0 / out_scale if out_scale else 0.0,
        groups=groups,
        first=first,
        second=second,
        k_block=k_block,
        stages=stages(*tile, y.itemsize),
        together=TOGETHER,
        has_scales=scales is not None,
        has_bias=bias is not None,
        activation=place(name, True),
        has_rounded=bool(out_scale),
        num_warps=4,
    )
    return y.view(*x.shape[:-1], outputs)
