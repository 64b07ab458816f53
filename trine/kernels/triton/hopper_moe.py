"""The products of a mixture of few rows an expert on Hopper GPUs.

Roofline: as in `moe_grouped`, the active experts' weights at the speed of reading. What else passes from the
second-level cache to the multiprocessors counts too: a program has 128 results (256 weight rows with SiLU), so that few
programs read the same rows of x, and only rows that exist are read. Weights come by the copy engine through a ring of
shared memory, their rows of x beside them by the threads, which gather.

Weights are the first operand of the tensor core's product, which takes 64 rows at least. Needs Gluon, which Triton's
interpreter can't run; `bench/moe.py` compares it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.triton.descriptors import tiles_of
from trine.kernels.triton.device import cdiv, next_power_of_2
from trine.kernels.triton.hopper_attention import async_load, barrier
from trine.kernels.triton.launch import launch
from trine.kernels.triton.moe_route import Lists

_copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _find_tile(counts_ptr, tile, num_experts, row_block: gl.constexpr, experts_block: gl.constexpr):
    """See `moe_grouped._find_tile`."""
    layout: gl.constexpr = gl.BlockedLayout([experts_block // 32], [32], [gl.num_warps()], [0])
    experts = gl.arange(0, experts_block, layout)
    counts = gl.load(counts_ptr + experts, mask=experts < num_experts, other=0, cache_modifier=".cg")
    ends = gl.associative_scan((counts + row_block - 1) // row_block, 0, _add)
    behind = ends <= tile
    expert = gl.sum(behind.to(gl.int32), 0)
    first = (tile - gl.max(gl.where(behind, ends, 0), 0)) * row_block
    return expert, first, gl.sum(gl.where(experts == expert, counts, 0), 0) - first


@gluon.jit
def _fetch_weights(
    w_desc, row, outputs, k, ready, ring, wanted, silu: gl.constexpr, n_block: gl.constexpr, k_block: gl.constexpr
):
    """Ask for weights [n_block, k_block] at (row, k), and with `silu` for those of up beside them."""
    parts: gl.constexpr = 2 if silu else 1
    mbarrier.expect(ready, parts * w_desc.block_type.nbytes, pred=wanted)
    async_load(w_desc, [row, k], ready, ring.slice(0, n_block, 0), pred=wanted)
    if silu:
        async_load(w_desc, [row + outputs, k], ready, ring.slice(n_block, n_block, 0), pred=wanted)


@gluon.jit(do_not_specialize=["capacity"])
def _stream_kernel(
    w_desc, x_ptr, y_ptr, counts_ptr, lists_ptr, capacity, x_stride, num_experts, inputs, outputs,
    silu: gl.constexpr, choices: gl.constexpr, row_block: gl.constexpr, n_block: gl.constexpr, k_block: gl.constexpr,
    stages: gl.constexpr, experts_block: gl.constexpr,
):  # fmt: skip
    """Program (i, j): columns block i of tile j, for choices lists[expert, first:]; see `stream_product`.

    Gate and up's programs let those of down start when the router is done. So these know the lists, and ask for their
    first weights while the last of the others run.
    """
    parts: gl.constexpr = 2 if silu else 1
    warps: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, row_block, 16])
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])
    y_layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, warps], [0, 1])
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([row_block, k_block], w_desc.dtype)
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [stages, parts * n_block, k_block], w_desc.layout)
    x_ring = gl.allocate_shared_memory(w_desc.dtype, [stages, row_block, k_block], x_shared)
    for i in gl.static_range(stages):
        mbarrier.init(ready.index(i), count=1)
    column, steps = gl.program_id(0) * n_block, inputs // k_block
    if silu:
        gdc_wait()
    gdc_launch_dependents()
    expert, first, rows = _find_tile(counts_ptr, gl.program_id(1), num_experts, row_block, experts_block)
    if rows > 0:
        row = expert * parts * outputs + column
        for i in gl.static_range(stages):
            _fetch_weights(
                w_desc, row, outputs, i * k_block, ready.index(i), w_ring.index(i), i < steps, silu, n_block, k_block
            )
        own_ptr = lists_ptr + expert.to(gl.int64) * capacity + first
        x_rows = gl.arange(0, row_block, gl.SliceLayout(1, x_layout))
        y_rows = gl.arange(0, row_block, gl.SliceLayout(0, y_layout))
        # past the last: any row, to be dropped
        x_row = gl.load(own_ptr + x_rows, mask=x_rows < rows, other=0, cache_modifier=".cg")
        y_row = gl.load(own_ptr + y_rows, mask=y_rows < rows, other=0, cache_modifier=".cg")
        ks = gl.arange(0, k_block, gl.SliceLayout(0, x_layout))
        x_tile_ptr = x_ptr + (x_row // choices).to(gl.int64)[:, None] * x_stride + ks[None, :]
        present = (x_rows < rows)[:, None]
        if not silu:
            gdc_wait()
        for i in gl.static_range(stages):
            _copy_rows(x_ring.index(i), x_tile_ptr + i * k_block, mask=present & (i < steps))
            async_copy.commit_group()
        y = gl.zeros([n_block, row_block], gl.float32, layout)
        up = gl.zeros([n_block, row_block], gl.float32, layout)
        for step in range(steps):
            slot = step % stages
            async_copy.wait_group(stages - 1)
            mbarrier.wait(ready.index(slot), (step // stages) & 1)
            fence_async_shared()
            barrier()  # all warps' rows are there
            weights, x = w_ring.index(slot), x_ring.index(slot).permute((1, 0))
            y = warpgroup_mma(weights.slice(0, n_block, 0), x, y, is_async=True)
            if silu:
                up = warpgroup_mma(weights.slice(n_block, n_block, 0), x, up, is_async=True)
                y, up = warpgroup_mma_wait(num_outstanding=0, deps=(y, up))
            else:
                y = warpgroup_mma_wait(num_outstanding=0, deps=(y,))
            barrier()  # all warps have read the slot
            following = step + stages
            _fetch_weights(
                w_desc, row, outputs, following * k_block, ready.index(slot), weights, following < steps,
                silu, n_block, k_block,
            )  # fmt: skip
            _copy_rows(x_ring.index(slot), x_tile_ptr + following * k_block, mask=present & (following < steps))
            async_copy.commit_group()
        if silu:
            y = y / (1.0 + gl.exp(-y)) * up
        result = gl.convert_layout(y.to(y_ptr.dtype.element_ty), y_layout)
        n = column + gl.arange(0, n_block, gl.SliceLayout(1, y_layout))
        inside = (y_rows < rows)[None, :] & (n < outputs)[:, None]
        gl.store(y_ptr + y_row.to(gl.int64)[None, :] * outputs + n[:, None], result, mask=inside)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Results of a program, columns of weights a step, steps in flight, and warps."""

    n_block: int
    k_block: int
    stages: int
    num_warps: int


_K_BLOCK = 128
GATE_UP = Tuning(128, _K_BLOCK, 3, 8)
DOWN = Tuning(128, _K_BLOCK, 2, 8)
MAX_ROW_BLOCK = 32  # beyond, `moe_grouped` is as fast


def can_stream(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `stream_product` takes these: whole steps of 16-bit numbers, rows of x at multiples of 16 of them."""
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and weight.shape[2] % _K_BLOCK == 0
        and x.stride(1) == 1
        and x.stride(0) % 16 == 0
        and all(t.data_ptr() % 16 == 0 for t in (x, weight))
    )


def stream_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    lists: Lists,
    num_choices: int,
    choices: int,
    row_block: int,
    *,
    silu: bool,
) -> torch.Tensor:
    """`moe_grouped.stream_product` for what `can_stream` takes."""
    num_experts, rows, inputs = weight.shape
    outputs = rows // (2 if silu else 1)
    tuning = GATE_UP if silu else DOWN
    y = torch.empty((num_choices, outputs), dtype=x.dtype, device=weight.device)
    launch(
        _stream_kernel, (cdiv(outputs, tuning.n_block), min(num_experts, num_choices) + num_choices // row_block),
        tiles_of(weight, [tuning.n_block, tuning.k_block]),
        x, y, lists.counts, lists.choices, lists.choices.shape[1], x.stride(0), num_experts, inputs, outputs,
        silu=silu, choices=choices, row_block=row_block, n_block=tuning.n_block, k_block=tuning.k_block,
        stages=tuning.stages, experts_block=max(next_power_of_2(num_experts), 32), num_warps=tuning.num_warps,
        launch_pdl=True,
    )  # fmt: skip
    return y
