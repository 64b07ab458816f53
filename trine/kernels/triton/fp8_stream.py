"""Matrix products of 1 to 64 rows with float8 weights on Hopper GPUs, near the speed that weights stream from memory.

Roofline: N * K bytes of weights are read once; at 64 rows the tensor cores need a tenth of that time. One program a
multiprocessor takes an equal share of all steps (a step is `n_block` weight rows by `k_block` columns), whatever the
tiles: a tile that several programs share is added up by the one that is done last, in the order of the programs, so
that the result does not depend on which that is (Osama et al. 2023, Stream-K).

A ring of shared memory is kept full by the copy engine (TMA), and filled with weights before the kernel in front has
finished: they don't depend on it.

Needs Gluon, which Triton's interpreter can't run; `bench/prefill.py` compares it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.fp8 import Fp8Rows, Fp8Weight
from trine.kernels.triton.device import cdiv, num_multiprocessors
from trine.kernels.triton.hopper_attention import async_load, barrier
from trine.kernels.triton.stream_linear import add_up, fetch_x

MAX_ROWS = 64
_MAX_TILES = 1 << 15


@dataclass(frozen=True, slots=True)
class StreamTuning:
    """The free choices of the kernel: a step's weight rows and columns, and the steps that are in flight.

    A ring must take more than half of a multiprocessor's memory: where two fit, two programs of one product meet on a
    multiprocessor (89 to 99 us a layer of Llama-3.1-8B at one row, in place of 77).
    """

    n_block: int = 64
    k_block: int = 1024
    stages: int = 2


def _tuning(num_rows: int) -> StreamTuning:
    return StreamTuning() if num_rows <= 16 else StreamTuning(k_block=512, stages=3)


@gluon.jit
def _fetch_weights(w_desc, x_desc, step, k_steps, ready, ring, wanted, n_block: gl.constexpr, k_block: gl.constexpr):
    """Ask for the weights of a step; `ready` will count their bytes and x's."""
    mbarrier.expect(ready, w_desc.block_type.nbytes + x_desc.block_type.nbytes, pred=wanted)
    async_load(w_desc, [step // k_steps * n_block, step % k_steps * k_block], ready, ring, pred=wanted)


@gluon.jit
def _fp8_stream_kernel(
    w_desc, x_desc, x_scales_ptr, w_scales_ptr, bias_ptr, y_ptr, parts_ptr, arrivals_ptr,
    num_rows, outputs, k_steps, total, groups, y_stride,
    n_block: gl.constexpr, k_block: gl.constexpr, rows_block: gl.constexpr, stages: gl.constexpr,
    has_bias: gl.constexpr,
):  # fmt: skip
    """Program i of P takes steps i * total // P to (i + 1) * total // P; tile t is steps t * k_steps and on."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, rows_block, 32])
    first = gl.program_id(0) * total // gl.num_programs(0)
    count = (gl.program_id(0) + 1) * total // gl.num_programs(0) - first
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [stages, n_block, k_block], w_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [stages, rows_block, k_block], x_desc.layout)
    for i in gl.static_range(stages):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(stages):
        _fetch_weights(
            w_desc, x_desc, first + i, k_steps, ready.index(i), w_ring.index(i), i < count, n_block, k_block
        )  # fmt: skip
    gdc_launch_dependents()
    gdc_wait()
    for i in gl.static_range(stages):
        fetch_x(x_desc, first + i, k_steps, ready.index(i), x_ring.index(i), i < count, k_block)

    rows = gl.arange(0, rows_block, gl.SliceLayout(0, layout))
    there = rows < num_rows
    n_in_tile = gl.arange(0, n_block, gl.SliceLayout(1, layout))
    place = n_in_tile[:, None] * rows_block + rows[None, :]
    acc = gl.zeros([n_block, rows_block], gl.float32, layout)
    zeros = gl.zeros([n_block, rows_block], gl.float32, layout)
    for i in range(count):
        step, slot = first + i, i % stages
        k_step = step % k_steps
        scales = gl.load(x_scales_ptr + rows * groups + k_step * groups // k_steps, mask=there, other=0.0)
        mbarrier.wait(ready.index(slot), (i // stages) & 1)
        x = x_ring.index(slot).permute((1, 0))
        product = warpgroup_mma(w_ring.index(slot), x, zeros, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(num_outstanding=0, deps=(product,))
        barrier()  # all warps have read the slot
        more = i + stages < count
        _fetch_weights(
            w_desc, x_desc, step + stages, k_steps, ready.index(slot), w_ring.index(slot), more, n_block, k_block
        )  # fmt: skip
        fetch_x(x_desc, step + stages, k_steps, ready.index(slot), x_ring.index(slot), more, k_block)
        acc += product * scales[None, :]
        if (k_step + 1 == k_steps) | (i + 1 == count):
            tile = step // k_steps
            begin = tile * k_steps
            y, whole = acc, True
            if (first > begin) | (step + 1 < begin + k_steps):
                y, whole = add_up(
                    acc, parts_ptr, arrivals_ptr, place, tile, begin, begin + k_steps, total,
                    n_block, rows_block, layout,
                )  # fmt: skip
            if whole:
                n = tile * n_block + n_in_tile
                y *= gl.load(w_scales_ptr + n, mask=n < outputs, other=0.0)[:, None]
                if has_bias:
                    y += gl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(gl.float32)[:, None]
                inside = there[None, :] & (n < outputs)[:, None]
                gl.store(y_ptr + rows[None, :] * y_stride + n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)
            acc = gl.zeros([n_block, rows_block], gl.float32, layout)


@cache
def _scratch(device: torch.device, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of tiles, and zeroed counters, which every launch leaves at zero: kernels run in one stream at a time."""
    parts = torch.empty(num_multiprocessors(device) * 2 * tile, dtype=torch.float32, device=device)
    return parts, torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def can_stream(x: Fp8Rows, weight: Fp8Weight) -> bool:
    """Whether `fp8_stream` takes these: the copy engine wants addresses and strides in multiples of 16 bytes, and
    steps must not straddle x's groups.
    """
    groups, inputs = x.scales.shape[1], x.shape[1]
    return (
        1 <= x.shape[0] <= MAX_ROWS
        and all(
            t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x.values, weight.values)
        )
        and (groups == 1 or inputs % (groups * _tuning(x.shape[0]).k_block) == 0)
        and weight.shape[0] <= _MAX_TILES * 64
    )


def fp8_stream(
    x: Fp8Rows,
    weight: Fp8Weight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tuning: StreamTuning | None = None,
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of the dtype x had, or `out_dtype`.

    T is 1 to MAX_ROWS. Nothing may write to the weights in the kernels just before: they are read while those run.
    """
    (num_rows, inputs), outputs = x.shape, weight.shape[0]
    tuning = tuning or _tuning(num_rows)
    rows_block = max(triton.next_power_of_2(num_rows), 8)
    values = x.values
    y = torch.empty((num_rows, outputs), dtype=out_dtype or x.dtype, device=values.device)
    w_block, x_block = [tuning.n_block, tuning.k_block], [rows_block, tuning.k_block]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    parts, arrivals = _scratch(values.device, tuning.n_block * MAX_ROWS)
    k_steps = cdiv(inputs, tuning.k_block)
    total = cdiv(outputs, tuning.n_block) * k_steps
    _fp8_stream_kernel[(min(num_multiprocessors(values.device), total),)](
        TensorDescriptor(weight.values, list(weight.shape), list(weight.values.stride()), w_block, layout),
        TensorDescriptor(values, list(x.shape), list(values.stride()), x_block, layout),
        x.scales,
        weight.scales,
        bias,
        y,
        parts,
        arrivals,
        num_rows,
        outputs,
        k_steps,
        total,
        x.scales.shape[1],
        y.stride(0),
        n_block=tuning.n_block,
        k_block=tuning.k_block,
        rows_block=rows_block,
        stages=tuning.stages,
        has_bias=bias is not None,
        num_warps=4,
        launch_pdl=True,
    )
    return y
