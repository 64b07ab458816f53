"""Matrix products of 2 to 32 rows on Hopper GPUs, near the speed that weights stream from memory.

Roofline: N * K weights are read once, in 16 bits; everything else is small. One program a multiprocessor takes an equal
share of all steps (a step is `N_BLOCK` weight rows by `K_BLOCK` columns), whatever the tiles: a tile that two programs
share is added up by the one that is done last, in the order of the programs, so that the result does not depend on
which that is (Osama et al. 2023, Stream-K). A ring of shared memory is kept full by the copy engine (TMA), and filled
with weights before the kernel in front has finished: they don't depend on it.

The weights are the first operand of the tensor core's product, which takes 64 rows at least: the few rows of x would
be mostly padding there. Needs Gluon, which Triton's interpreter can't run; `bench/gpu_check.py` compares it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.triton.device import num_multiprocessors

MAX_ROWS = 32
N_BLOCK = 64
K_BLOCK = 512
STAGES = 2
_MAX_TILES = 1 << 16


@gluon.jit
def _fetch_weights(
    w_desc, x_desc, step, k_steps, outputs, ready, ring, wanted,
    n_block: gl.constexpr, k_block: gl.constexpr, gated: gl.constexpr,
):  # fmt: skip
    """Ask for the weights of a step, if `gated` half of them the gate's; `ready` will count their bytes and x's."""
    size: gl.constexpr = n_block * k_block * w_desc.dtype.primitive_bitwidth // 8
    mbarrier.expect(ready, size + x_desc.block_type.nbytes, pred=wanted)
    tile = step // k_steps
    column = step % k_steps * k_block
    if gated:
        half: gl.constexpr = n_block // 2
        tma.async_copy_global_to_shared(w_desc, [tile * half, column], ready, ring.slice(0, half, 0), pred=wanted)
        up = ring.slice(half, half, 0)
        tma.async_copy_global_to_shared(w_desc, [outputs + tile * half, column], ready, up, pred=wanted)
    else:
        tma.async_copy_global_to_shared(w_desc, [tile * n_block, column], ready, ring, pred=wanted)


@gluon.jit
def _fetch_x(x_desc, step, k_steps, ready, ring, wanted, k_block: gl.constexpr):
    tma.async_copy_global_to_shared(x_desc, [0, step % k_steps * k_block], ready, ring, pred=wanted)


@gluon.jit
def _add_up(
    acc, parts_ptr, arrivals_ptr, place, tile, begin, end, total,
    n_block: gl.constexpr, rows_block: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Keep this program's part of a tile whose steps are [begin, end). The program that comes last returns the sum of
    all parts and True.
    """
    size: gl.constexpr = n_block * rows_block
    program, programs = gl.program_id(0), gl.num_programs(0)
    own = program * 2 + (program * total // programs <= begin).to(gl.int32)  # a program has two parts at most
    gl.store(parts_ptr + own.to(gl.int64) * size + place, acc)
    gl.thread_barrier()
    first_program = ((begin + 1) * programs - 1) // total
    last_program = (end * programs - 1) // total
    is_last = gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == last_program - first_program
    if is_last:
        acc = gl.zeros([n_block, rows_block], gl.float32, layout)
        for other in range(first_program, last_program + 1):
            part = other * 2 + (other * total // programs <= begin).to(gl.int32)
            acc += gl.load(parts_ptr + part.to(gl.int64) * size + place, cache_modifier=".cg")
        gl.store(arrivals_ptr + tile, 0)  # ready for the next launch
    return acc, is_last


@gluon.jit
def _store_gated(
    acc, y_ptr, y_stride, tile, num_rows, outputs, n_block: gl.constexpr, rows_block: gl.constexpr
):  # fmt: skip
    """Write silu(gate) * up of a tile: the gates are the first half of acc [n_block, rows_block]."""
    half: gl.constexpr = n_block // 2
    lanes: gl.constexpr = gl.BlockedLayout([1, 1, 2], [32, 1, 1], [1, gl.num_warps(), 1], [2, 0, 1])
    gate, up = gl.split(gl.convert_layout(acc.reshape([2, half, rows_block]).permute((1, 2, 0)), lanes))
    y = gate / (1.0 + gl.exp(-gate)) * up
    layout: gl.constexpr = gl.SliceLayout(2, lanes)
    n = tile * half + gl.arange(0, half, gl.SliceLayout(1, layout))
    rows = gl.arange(0, rows_block, gl.SliceLayout(0, layout))
    inside = (rows < num_rows)[None, :] & (n < outputs)[:, None]
    gl.store(y_ptr + rows[None, :] * y_stride + n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _stream_kernel(
    w_desc, x_desc, bias_ptr, y_ptr, parts_ptr, arrivals_ptr, num_rows, outputs, k_steps, total, y_stride,
    n_block: gl.constexpr, k_block: gl.constexpr, rows_block: gl.constexpr, stages: gl.constexpr,
    has_bias: gl.constexpr, gated: gl.constexpr,
):  # fmt: skip
    """Program i of P takes steps i * total // P to (i + 1) * total // P; tile t is steps t * k_steps and on.

    If `gated`, a tile is half as many outputs, of a gate row and an up row each: y is silu(gate) * up.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, rows_block, 16])
    first = gl.program_id(0) * total // gl.num_programs(0)
    count = (gl.program_id(0) + 1) * total // gl.num_programs(0) - first
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [stages, n_block, k_block], w_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [stages, rows_block, k_block], x_desc.layout)
    for i in gl.static_range(stages):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(stages):
        _fetch_weights(
            w_desc, x_desc, first + i, k_steps, outputs, ready.index(i), w_ring.index(i), i < count,
            n_block, k_block, gated,
        )  # fmt: skip
    gdc_launch_dependents()
    gdc_wait()
    for i in gl.static_range(stages):
        _fetch_x(x_desc, first + i, k_steps, ready.index(i), x_ring.index(i), i < count, k_block)

    rows = gl.arange(0, rows_block, gl.SliceLayout(0, layout))
    n_in_tile = gl.arange(0, n_block, gl.SliceLayout(1, layout))
    place = n_in_tile[:, None] * rows_block + rows[None, :]
    acc = gl.zeros([n_block, rows_block], gl.float32, layout)
    for i in range(count):
        step, slot = first + i, i % stages
        mbarrier.wait(ready.index(slot), (i // stages) & 1)
        acc = warpgroup_mma(w_ring.index(slot), x_ring.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        gl.thread_barrier()  # all warps have read the slot
        more = i + stages < count
        _fetch_weights(
            w_desc, x_desc, step + stages, k_steps, outputs, ready.index(slot), w_ring.index(slot), more,
            n_block, k_block, gated,
        )  # fmt: skip
        _fetch_x(x_desc, step + stages, k_steps, ready.index(slot), x_ring.index(slot), more, k_block)
        if ((step + 1) % k_steps == 0) | (i + 1 == count):
            tile = step // k_steps
            begin = tile * k_steps
            y, whole = acc, True
            if (first > begin) | (step + 1 < begin + k_steps):
                y, whole = _add_up(
                    acc, parts_ptr, arrivals_ptr, place, tile, begin, begin + k_steps, total,
                    n_block, rows_block, layout,
                )  # fmt: skip
            if whole and gated:
                _store_gated(y, y_ptr, y_stride, tile, num_rows, outputs, n_block, rows_block)
            elif whole:
                n = tile * n_block + n_in_tile
                if has_bias:
                    y += gl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(gl.float32)[:, None]
                inside = (rows < num_rows)[None, :] & (n < outputs)[:, None]
                gl.store(y_ptr + rows[None, :] * y_stride + n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)
            acc = gl.zeros([n_block, rows_block], gl.float32, layout)


@cache
def _scratch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of tiles, and zeroed counters, which every launch leaves at zero: kernels run in one stream at a time."""
    parts = torch.empty(num_multiprocessors(device) * 2 * N_BLOCK * MAX_ROWS, dtype=torch.float32, device=device)
    return parts, torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def can_stream(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `stream_linear` takes these: the copy engine wants addresses and strides in multiples of 16 bytes."""
    return (
        1 <= x.shape[0] <= MAX_ROWS
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (x, weight))
        and weight.shape[0] <= _MAX_TILES * N_BLOCK
    )


def can_stream_gated(weight: torch.Tensor) -> bool:
    """Whether `stream_gated_linear` takes it, given that `can_stream`: tiles are half gate, half up."""
    return weight.shape[0] % N_BLOCK == 0


def stream_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, or `out_dtype`.

    T is 1 to MAX_ROWS. Nothing may write to the weights in the kernels just before: they are read while those run.
    """
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=out_dtype or x.dtype, device=x.device)
    _launch(x, weight, bias, y, gated=False)
    return y


def stream_gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [T, K] times the transpose of weight [2I, K], whose first half is the gate: [T, I].

    I is a multiple of N_BLOCK / 2; see `stream_linear`.
    """
    y = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, None, y, gated=True)
    return y


def _launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, *, gated: bool) -> None:
    (num_rows, inputs), outputs = x.shape, weight.shape[0]
    rows_block = max(triton.next_power_of_2(num_rows), 16)
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    w_block, x_block = [N_BLOCK // 2 if gated else N_BLOCK, K_BLOCK], [rows_block, K_BLOCK]
    w_layout = gl.NVMMASharedLayout.get_default_for(w_block, dtype)
    x_layout = gl.NVMMASharedLayout.get_default_for(x_block, dtype)
    parts, arrivals = _scratch(x.device)
    k_steps = triton.cdiv(inputs, K_BLOCK)
    total = triton.cdiv(outputs, N_BLOCK) * k_steps
    _stream_kernel[(min(num_multiprocessors(x.device), total),)](
        TensorDescriptor(weight, list(weight.shape), list(weight.stride()), w_block, w_layout),
        TensorDescriptor(x, list(x.shape), list(x.stride()), x_block, x_layout),
        bias,
        y,
        parts,
        arrivals,
        num_rows,
        y.shape[1],
        k_steps,
        total,
        y.stride(0),
        n_block=N_BLOCK,
        k_block=K_BLOCK,
        rows_block=rows_block,
        stages=STAGES,
        has_bias=bias is not None,
        gated=gated,
        num_warps=4,
        launch_pdl=True,
    )
