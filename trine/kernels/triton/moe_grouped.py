"""The products of a mixture of experts: each tile of rows that chose an expert times that expert's weights.

Roofline: the weights of every expert with rows are read once (9.4 MB an expert in Qwen3-30B-A3B), 2 * N * K operations
a row. Up to some 180 rows an expert memory bounds it, from there on the matrix units.

Two kernels for the two sides of that. `_stream_kernel` gathers a tile of few rows and multiplies weights from the left
(weights are the long side of the matrix instruction, so that 16 rows don't cost as much as 64); it takes any shape.
`_matrix_kernel` takes rows sorted by expert, keeps programs resident and reads both operands with the copy engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from trine.kernels.triton.device import cdiv, early_launch, next_power_of_2, num_multiprocessors, wait_for_inputs
from trine.kernels.triton.launch import launch
from trine.kernels.triton.moe_route import Groups, Lists


@dataclass(frozen=True, slots=True)
class Tuning:
    """Free choices of a grouped product. `column_block` counts results, of which SiLU's need two rows of weights."""

    column_block: int
    k_block: int
    num_warps: int
    num_stages: int


@triton.jit
def _find_tile(counts_ptr, tile, num_experts, row_block: tl.constexpr, experts_block: tl.constexpr):
    """Tile `tile` of all experts' tiles of at most `row_block` choices, in order: (expert, its choices before the tile,
    its choices from there on). None where there is no such tile.
    """
    experts = tl.arange(0, experts_block)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0)
    ends = tl.cumsum(tl.cdiv(counts, row_block), 0)
    behind = ends <= tile
    expert = tl.sum(behind.to(tl.int32), 0)
    first = (tile - tl.max(tl.where(behind, ends, 0), 0)) * row_block
    return expert, first, tl.sum(tl.where(experts == expert, counts, 0), 0) - first


@triton.jit(do_not_specialize=["capacity"])
def _stream_kernel(
    x_ptr, weight_ptr, scales_ptr, y_ptr, counts_ptr, lists_ptr, capacity, num_experts, inputs, outputs, x_stride,
    has_scales: tl.constexpr, silu: tl.constexpr, choices: tl.constexpr, row_block: tl.constexpr,
    column_block: tl.constexpr, k_block: tl.constexpr, even: tl.constexpr, experts_block: tl.constexpr,
    num_stages: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program (i, j): columns block i of tile j. Choice c is computed from row c // choices of x to row c of y.

    Of gate and up the next kernel may start only when the router is known to be done: see `_combine_kernel`.
    """
    if early & silu:
        gdc_wait()
        gdc_launch_dependents()
    else:
        wait_for_inputs(early)
    expert, first, count = _find_tile(counts_ptr, tl.program_id(1), num_experts, row_block, experts_block)
    if count <= 0:
        return
    present = tl.arange(0, row_block) < count
    list_ptr = lists_ptr + expert.to(tl.int64) * capacity + first
    places = tl.load(list_ptr + tl.arange(0, row_block), mask=present, other=0)
    rows = places // choices
    expert = expert.to(tl.int64)
    columns = tl.program_id(0) * column_block + tl.arange(0, column_block)
    served = columns < outputs
    ks = tl.arange(0, k_block)
    x_tile_ptr = x_ptr + rows.to(tl.int64)[None, :] * x_stride + ks[:, None]
    weight_rows = expert * outputs * (2 if silu else 1) + columns
    weight_tile_ptr = weight_ptr + weight_rows[:, None] * inputs + ks[None, :]
    y = tl.zeros([column_block, row_block], tl.float32)
    up = tl.zeros([column_block, row_block], tl.float32)
    for start in tl.range(0, inputs, k_block, num_stages=num_stages):
        if even:
            x = tl.load(x_tile_ptr + start, mask=present[None, :], other=0.0)
            weight = tl.load(weight_tile_ptr + start)
        else:
            inside = start + ks < inputs
            x = tl.load(x_tile_ptr + start, mask=present[None, :] & inside[:, None], other=0.0)
            weight = tl.load(weight_tile_ptr + start, mask=served[:, None] & inside[None, :], other=0.0)
        y = tl.dot(weight.to(x.dtype), x, y, input_precision="ieee")
        if silu:
            if even:
                weight = tl.load(weight_tile_ptr + outputs * inputs + start)
            else:
                weight = tl.load(
                    weight_tile_ptr + outputs * inputs + start, mask=served[:, None] & inside[None, :], other=0.0
                )
            up = tl.dot(weight.to(x.dtype), x, up, input_precision="ieee")
    if has_scales:
        y *= tl.load(scales_ptr + weight_rows, mask=served, other=0.0)[:, None]
        if silu:
            up *= tl.load(scales_ptr + outputs + weight_rows, mask=served, other=0.0)[:, None]
    if silu:
        y = y * tl.sigmoid(y) * up
    y_tile_ptr = y_ptr + places.to(tl.int64)[None, :] * outputs + columns[:, None]
    tl.store(y_tile_ptr, y.to(y_ptr.dtype.element_ty), mask=present[None, :] & served[:, None])


@triton.jit
def _matrix_kernel(
    x_desc, weight_desc, y_ptr, ends_ptr, tile_experts_ptr, tile_starts_ptr, num_tiles_ptr, inputs, outputs,
    silu: tl.constexpr, row_block: tl.constexpr, column_block: tl.constexpr, k_block: tl.constexpr,
    num_stages: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Programs take (tile, columns block) pairs in turn, so that those of an expert run side by side.

    Rows of a tile past its expert's last are other experts' rows: computed, not stored. With `silu` a block of gates
    and the same block of ups are one operand.
    """
    wait_for_inputs(early)
    parts: tl.constexpr = 2 if silu else 1
    column_blocks = tl.cdiv(outputs, column_block)
    for index in tl.range(tl.program_id(0), tl.load(num_tiles_ptr) * column_blocks, tl.num_programs(0), flatten=True):
        tile = index // column_blocks
        column = index % column_blocks * column_block
        expert = tl.load(tile_experts_ptr + tile)
        first = tl.load(tile_starts_ptr + tile)
        y = tl.zeros([row_block, parts * column_block], tl.float32)
        for k in tl.range(0, inputs, k_block, num_stages=num_stages):
            weight = weight_desc.load([expert * parts, column, k]).reshape(parts * column_block, k_block)
            y = tl.dot(x_desc.load([first, k]), weight.T, y)
        if silu:
            gate, up = y.reshape(row_block, 2, column_block).permute(0, 2, 1).split()
            y = gate * tl.sigmoid(gate) * up
        places = first + tl.arange(0, row_block)
        columns = column + tl.arange(0, column_block)
        mask = (places < tl.load(ends_ptr + expert))[:, None] & (columns < outputs)[None, :]
        y_tile_ptr = y_ptr + places.to(tl.int64)[:, None] * outputs + columns[None, :]
        tl.store(y_tile_ptr, y.to(y_ptr.dtype.element_ty), mask=mask)


def stream_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    lists: Lists,
    num_choices: int,
    choices: int,
    row_block: int,
    tuning: Tuning,
    *,
    silu: bool,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of x times the transposes of their experts' weights [E, N, K], a row a choice: [P, N], or silu: [P, N / 2].

    Choice c takes row c // choices of x: `choices` is K of tokens [T, K], or 1 where x [P, K] has a row a choice.
    weight is of x's dtype, or float8 with `scales` [E, N] float32.
    """
    num_experts, inputs = weight.shape[0], weight.shape[2]
    outputs = weight.shape[1] // (2 if silu else 1)
    y = torch.empty((num_choices, outputs), dtype=x.dtype, device=x.device)
    launch(
        _stream_kernel, (cdiv(outputs, tuning.column_block), min(num_experts, num_choices) + num_choices // row_block),
        x, weight, scales, y, lists.counts, lists.choices, lists.choices.shape[1],
        num_experts, inputs, outputs, x.stride(0), has_scales=scales is not None,
        silu=silu, choices=choices, row_block=row_block, column_block=tuning.column_block,
        k_block=tuning.k_block, even=inputs % tuning.k_block == 0 and outputs % tuning.column_block == 0,
        experts_block=next_power_of_2(num_experts), num_stages=tuning.num_stages, num_warps=tuning.num_warps,
        **early_launch(x.device),
    )  # fmt: skip
    return y


def matrix_product(
    x: torch.Tensor, weight: torch.Tensor, groups: Groups, tuning: Tuning, *, silu: bool
) -> torch.Tensor:
    """`stream_product` for many rows: x [P, K] and the result are sorted, rows of both a multiple of 16 bytes long."""
    num_experts, rows, inputs = weight.shape
    outputs = rows // (2 if silu else 1)
    y = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    x_desc = TensorDescriptor.from_tensor(x, [groups.row_block, tuning.k_block])
    parts = 2 if silu else 1
    halves = weight.view(num_experts * parts, outputs, inputs)
    weight_desc = TensorDescriptor.from_tensor(halves, [parts, tuning.column_block, tuning.k_block])
    launch(
        _matrix_kernel, (num_multiprocessors(x.device),),
        x_desc, weight_desc, y, groups.ends, groups.tile_experts, groups.tile_starts, groups.num_tiles,
        inputs, outputs,
        silu=silu, row_block=groups.row_block, column_block=tuning.column_block, k_block=tuning.k_block,
        num_stages=tuning.num_stages, num_warps=tuning.num_warps, **early_launch(x.device),
    )  # fmt: skip
    return y
