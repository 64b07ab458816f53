"""Matrix products of few rows on Hopper GPUs, near the speed that weights stream from memory, in 16 or 8 bits.

Roofline: N * K weights are read once; everything else is small. One program a multiprocessor takes an equal share of
all steps (a step is `N_BLOCK` weight rows by some columns), whatever the tiles: a tile that programs share is added up
by the one that has its beginning, in the order of the programs (Osama et al. 2023, Stream-K), or by the kernel behind.
A ring of shared memory is kept full by the copy engine (TMA), and filled with weights before the kernel in front has
finished: they don't depend on it.

The weights are the first operand of the tensor core's product, which takes 64 rows at least: the few rows of x would be
mostly padding there. Needs Gluon, which Triton's interpreter can't run; `bench/gpu_check.py` compares it.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.fp8 import Fp8Rows, Fp8Weight, StoredRows
from trine.kernels.triton.descriptors import tiles_of
from trine.kernels.triton.device import cdiv, next_power_of_2, num_multiprocessors
from trine.kernels.triton.hopper_attention import async_load, barrier
from trine.kernels.triton.launch import launch

MAX_ROWS = 64
MAX_PLAIN_ROWS = 32
N_BLOCK = 64
_MAX_TILES = 1 << 16


@gluon.jit
def _first_row(tile, tiles_a_jump, jump, n_block: gl.constexpr, paired: gl.constexpr):
    """The weight row that a tile starts at; if `paired`, of its first half."""
    if paired:
        return tile // tiles_a_jump * jump + tile % tiles_a_jump * (n_block // 2)
    else:
        return tile * n_block


@gluon.jit
def _fetch_weights(
    w_desc, step, k_steps, tiles_a_jump, jump, pair_distance, ready, ring, wanted,
    n_block: gl.constexpr, k_block: gl.constexpr, paired: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(ready, n_block * k_block * w_desc.dtype.primitive_bitwidth // 8, pred=wanted)
    row = _first_row(step // k_steps, tiles_a_jump, jump, n_block, paired)
    column = step % k_steps * k_block
    if paired:
        half: gl.constexpr = n_block // 2
        async_load(w_desc, [row, column], ready, ring.slice(0, half, 0), pred=wanted)
        second = ring.slice(half, half, 0)
        async_load(w_desc, [row + pair_distance, column], ready, second, pred=wanted)
    else:
        async_load(w_desc, [row, column], ready, ring, pred=wanted)


@gluon.jit
def _fetch_x(x_desc, step, k_steps, ready, ring, wanted, k_block: gl.constexpr):
    mbarrier.expect(ready, x_desc.block_type.nbytes, pred=wanted)
    async_load(x_desc, [0, step % k_steps * k_block], ready, ring, pred=wanted)


@gluon.jit
def _add_up(
    acc, parts_ptr, arrivals_ptr, place, tile, begin, end, total,
    n_block: gl.constexpr, rows_block: gl.constexpr,
):  # fmt: skip
    """A tile of steps [begin, end) that several programs share: the one that has its beginning, which is the last of
    that program's work, waits for the others, whose first work this was, and returns the sum and True.

    All programs of a launch are on the card together: none has to wait for one that finds no place.
    """
    size: gl.constexpr = n_block * rows_block
    program, programs = gl.program_id(0), gl.num_programs(0)
    adds = program * total // programs <= begin
    if adds:
        last_program = (end * programs - 1) // total
        while gl.atomic_add(arrivals_ptr + tile, 0, sem="acquire") < last_program - program:
            pass
        for other in range(program + 1, last_program + 1):
            acc += gl.load(parts_ptr + other * size + place, cache_modifier=".cg")
        gl.store(arrivals_ptr + tile, 0)  # ready for the next launch
    else:
        gl.store(parts_ptr + program * size + place, acc)
        barrier()  # all of this program's stores come before its arrival
        gl.atomic_add(arrivals_ptr + tile, 1, sem="release")
    return acc, adds


@gluon.jit
def _row_scales(scales_ptr, row, pair_distance, outputs, n_in_tile, wanted, paired: gl.constexpr):
    """Scales of a tile's weight rows, of which there are `outputs` if they are not paired."""
    if paired:
        half: gl.constexpr = n_in_tile.shape[0] // 2
        own = gl.where(n_in_tile < half, n_in_tile, n_in_tile - half + pair_distance)
        return gl.load(scales_ptr + row + own, mask=(n_in_tile >= 0) & wanted, other=0.0)
    else:
        return gl.load(scales_ptr + row + n_in_tile, mask=(row + n_in_tile < outputs) & wanted, other=0.0)


@gluon.jit
def _store_plain(acc, bias_ptr, y_ptr, y_stride, row, num_rows, outputs, has_bias: gl.constexpr, layout: gl.constexpr):
    n = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    rows = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    if has_bias:
        acc += gl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(gl.float32)[:, None]
    inside = (rows < num_rows)[None, :] & (n < outputs)[:, None]
    gl.store(y_ptr + rows[None, :] * y_stride + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=inside)


@gluon.constexpr_function
def _side_by_side(num_warps):
    """The layout of [N / 2, rows, 2] in which a thread has what is N / 2 apart in a tile."""
    return gl.BlockedLayout([1, 1, 2], [32, 1, 1], [1, num_warps, 1], [2, 0, 1])


@gluon.jit
def _halves(acc):
    """The first and the second half of acc [N, rows], element by element side by side in each thread."""
    lanes: gl.constexpr = _side_by_side(gl.num_warps())
    half: gl.constexpr = acc.shape[0] // 2
    first, second = gl.split(gl.convert_layout(acc.reshape([2, half, acc.shape[1]]).permute((1, 2, 0)), lanes))
    return first, second


@gluon.jit
def _store_gated(acc, y_ptr, y_stride, row, num_rows, outputs):
    """y is silu(gate) * up of a tile, whose first half are the gates."""
    gate, up = _halves(acc)
    n = row + gl.arange(0, gate.shape[0], gl.SliceLayout(1, gate.type.layout))
    rows = gl.arange(0, gate.shape[1], gl.SliceLayout(0, gate.type.layout))
    inside = (rows < num_rows)[None, :] & (n < outputs)[:, None]
    y = gate / (1.0 + gl.exp(-gate)) * up
    gl.store(y_ptr + rows[None, :] * y_stride + n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _store_turned(
    acc, bias_ptr, q_ptr, k_cache_ptr, v_cache_ptr, position, slot, cos_sin_ptr,
    cache_block_stride, cache_head_stride, cache_token_stride, tile, tiles_a_head, num_rows, num_heads, num_kv_heads,
    has_bias: gl.constexpr, block_size: gl.constexpr, head_dim: gl.constexpr,
):  # fmt: skip
    """Rotate a tile: dimensions of one head and those they turn with. Queries go to q, the rest to the cache."""
    half: gl.constexpr = head_dim // 2
    first, second = _halves(acc)
    d = tile % tiles_a_head * first.shape[0] + gl.arange(0, first.shape[0], gl.SliceLayout(1, first.type.layout))
    rows = gl.arange(0, first.shape[1], gl.SliceLayout(0, first.type.layout))
    inside = (rows < num_rows)[None, :] & (d < half)[:, None]
    head = tile // tiles_a_head
    if has_bias:
        first += gl.load(bias_ptr + head * head_dim + d).to(gl.float32)[:, None]
        second += gl.load(bias_ptr + head * head_dim + half + d).to(gl.float32)[:, None]
    kind: gl.constexpr = q_ptr.dtype.element_ty
    first = first.to(kind)  # as if it were two kernels
    second = second.to(kind)
    if head < num_heads + num_kv_heads:
        cos_sin_row = cos_sin_ptr + position[None, :] * head_dim + d[:, None]
        cos = gl.load(cos_sin_row, mask=inside, other=0.0)
        sin = gl.load(cos_sin_row + half, mask=inside, other=0.0)
        a = first.to(gl.float32)
        b = second.to(gl.float32)
        first = (a * cos - b * sin).to(kind)
        second = (b * cos + a * sin).to(kind)
    if head < num_heads:
        q_at = (rows[None, :] * num_heads + head) * head_dim + d[:, None]
        gl.store(q_ptr + q_at, first, mask=inside)
        gl.store(q_ptr + q_at + half, second, mask=inside)
    else:
        place = slot // block_size * cache_block_stride + slot % block_size * cache_token_stride
        own = (head - num_heads) % num_kv_heads
        at = place[None, :] + own * cache_head_stride + d[:, None]
        if head < num_heads + num_kv_heads:
            gl.store(k_cache_ptr + at, first, mask=inside)
            gl.store(k_cache_ptr + at + half, second, mask=inside)
        else:
            gl.store(v_cache_ptr + at, first, mask=inside)
            gl.store(v_cache_ptr + at + half, second, mask=inside)


@gluon.jit(do_not_specialize=["num_rows"])
def _stream_kernel(
    w_desc, x_desc, w_scales_ptr, x_scales_ptr, bias_ptr, y_ptr, parts_ptr, arrivals_ptr,
    num_rows, outputs, k_steps, total, groups, y_stride, tiles_a_jump, jump, pair_distance,
    k_cache_ptr, v_cache_ptr, positions_ptr, slots_ptr, cos_sin_ptr,
    cache_block_stride, cache_head_stride, cache_token_stride, num_heads, num_kv_heads,
    n_block: gl.constexpr, k_block: gl.constexpr, rows_block: gl.constexpr, stages: gl.constexpr,
    has_bias: gl.constexpr, after: gl.constexpr, scales_a_step: gl.constexpr, block_size: gl.constexpr,
    head_dim: gl.constexpr,
):  # fmt: skip
    """Program i of P takes steps i * total // P to (i + 1) * total // P; tile t is steps t * k_steps and on.

    `after` says what becomes of a tile.
    """
    paired: gl.constexpr = (after == "gate") | (after == "turn")
    bits: gl.constexpr = w_desc.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, rows_block, 256 // bits])
    first = gl.program_id(0) * total // gl.num_programs(0)
    count = (gl.program_id(0) + 1) * total // gl.num_programs(0) - first
    w_ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    x_ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [stages, n_block, k_block], w_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [stages, rows_block, k_block], x_desc.layout)
    for i in gl.static_range(stages):
        mbarrier.init(w_ready.index(i), count=1)
        mbarrier.init(x_ready.index(i), count=1)
    if after == "turn":
        of_turned = gl.arange(0, rows_block, gl.SliceLayout(0, gl.SliceLayout(2, _side_by_side(gl.num_warps()))))
        position = gl.load(positions_ptr + of_turned, mask=of_turned < num_rows, other=0)
        cache_slot = gl.load(slots_ptr + of_turned, mask=of_turned < num_rows, other=0)
    for i in gl.static_range(stages):
        if i > 0:  # step by step: what the kernels in front still load would queue behind more than that
            mbarrier.wait(w_ready.index(i - 1), 0, pred=i < count)
        _fetch_weights(
            w_desc, first + i, k_steps, tiles_a_jump, jump, pair_distance, w_ready.index(i), w_ring.index(i),
            i < count, n_block, k_block, paired,
        )  # fmt: skip
    gdc_wait()
    gdc_launch_dependents()  # not before: a norm behind reads the residual stream while this kernel runs
    for i in gl.static_range(stages):
        _fetch_x(x_desc, first + i, k_steps, x_ready.index(i), x_ring.index(i), i < count, k_block)

    rows = gl.arange(0, rows_block, gl.SliceLayout(0, layout))
    n_in_tile = gl.arange(0, n_block, gl.SliceLayout(1, layout))
    place = n_in_tile[:, None] * rows_block + rows[None, :]
    acc = gl.zeros([n_block, rows_block], gl.float32, layout)
    zeros = gl.zeros([n_block, rows_block], gl.float32, layout)
    for i in range(count):
        step, slot = first + i, i % stages
        row = _first_row(step // k_steps, tiles_a_jump, jump, n_block, paired)
        ends = ((step + 1) % k_steps == 0) | (i + 1 == count)
        if bits == 8:
            # before the wait for the tile's last weights, which hides the one for these
            w_scales = _row_scales(w_scales_ptr, row, pair_distance, outputs, n_in_tile, ends, paired)
            size: gl.constexpr = k_block // scales_a_step
            for part in gl.static_range(scales_a_step):
                group = (step % k_steps * scales_a_step + part) * groups // (k_steps * scales_a_step)
                known = (rows < num_rows) & (group < groups)
                scales = gl.load(x_scales_ptr + rows * groups + group, mask=known, other=0.0)
                if part == 0:
                    mbarrier.wait(x_ready.index(slot), (i // stages) & 1)
                    mbarrier.wait(w_ready.index(slot), (i // stages) & 1)
                w = w_ring.index(slot).slice(part * size, size, 1)
                x = x_ring.index(slot).slice(part * size, size, 1).permute((1, 0))
                product = warpgroup_mma(w, x, zeros, use_acc=False, is_async=True)
                product = warpgroup_mma_wait(num_outstanding=0, deps=(product,))
                acc += product * scales[None, :]
        else:
            mbarrier.wait(x_ready.index(slot), (i // stages) & 1)
            mbarrier.wait(w_ready.index(slot), (i // stages) & 1)
            acc = warpgroup_mma(w_ring.index(slot), x_ring.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        barrier()  # all warps have read the slot
        more = i + stages < count
        _fetch_weights(
            w_desc, step + stages, k_steps, tiles_a_jump, jump, pair_distance, w_ready.index(slot),
            w_ring.index(slot), more, n_block, k_block, paired,
        )  # fmt: skip
        _fetch_x(x_desc, step + stages, k_steps, x_ready.index(slot), x_ring.index(slot), more, k_block)
        if ends:
            tile = step // k_steps
            begin = tile * k_steps
            y, whole = acc, True
            if after == "part":
                y_ptr += (first - begin) // count * num_rows * outputs
            elif (first > begin) | (step + 1 < begin + k_steps):
                y, whole = _add_up(
                    acc, parts_ptr, arrivals_ptr, place, tile, begin, begin + k_steps, total, n_block, rows_block
                )  # fmt: skip
            if whole:
                if bits == 8:
                    y *= w_scales[:, None]
                if after == "gate":
                    _store_gated(y, y_ptr, y_stride, row, num_rows, outputs)
                elif after == "turn":
                    _store_turned(
                        y, bias_ptr, y_ptr, k_cache_ptr, v_cache_ptr, position, cache_slot, cos_sin_ptr,
                        cache_block_stride, cache_head_stride, cache_token_stride, tile, tiles_a_jump, num_rows,
                        num_heads, num_kv_heads, has_bias, block_size, head_dim,
                    )  # fmt: skip
                else:
                    _store_plain(y, bias_ptr, y_ptr, y_stride, row, num_rows, outputs, has_bias, layout)
            acc = gl.zeros([n_block, rows_block], gl.float32, layout)


def _ring(itemsize: int, num_rows: int) -> tuple[int, int]:
    """Columns of a step, a kilobyte of a weight row where there is room, and the steps that are in flight.

    A ring must take more than half of a multiprocessor's memory: where two fit, programs of one product meet there.
    """
    if itemsize == 1:
        return (1024, 2) if num_rows <= 16 else (512, 3)
    return 512, 2


@cache
def _scratch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of tiles, and zeroed counters, which every launch leaves at zero: kernels run in one stream at a time."""
    parts = torch.empty(num_multiprocessors(device) * N_BLOCK * MAX_ROWS, dtype=torch.float32, device=device)
    return parts, torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def can_stream(x: StoredRows, weight: torch.Tensor | Fp8Weight) -> bool:
    """Whether `stream_linear` takes these: the copy engine wants addresses and strides in multiples of 16 bytes, and
    steps must not straddle groups of x's columns that share a scale.
    """
    num_rows, inputs = x.shape
    values, rows = _values(weight), _values(x)
    if not 1 <= num_rows <= MAX_ROWS or values.dtype != rows.dtype or weight.shape[0] > _MAX_TILES * N_BLOCK:
        return False
    if isinstance(x, Fp8Rows):
        groups, k_block = x.scales.shape[1], _ring(1, num_rows)[0]
        size = inputs // groups
        fits = size % k_block == 0 or (k_block % size == 0 and inputs % k_block == 0)
        whole = groups == 1 or (inputs % groups == 0 and fits)
    else:
        whole = num_rows <= MAX_PLAIN_ROWS and x.dtype in (torch.bfloat16, torch.float16)
    return whole and all(
        t.stride(1) == 1 and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 for t in (rows, values)
    )


def _values(x: StoredRows | Fp8Weight) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else x.values


def can_stream_pairs(weight: torch.Tensor | Fp8Weight, half: int) -> bool:
    """Whether tiles of pairs fit: of gate and up (half is I), or of dimensions that turn together (half of a head)."""
    return half % (N_BLOCK // 2) == 0 and weight.shape[0] % N_BLOCK == 0


def stream_linear(
    x: StoredRows,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, or `out_dtype`.

    T is 1 to MAX_PLAIN_ROWS, with float8 rows and weights to MAX_ROWS. Nothing may write to the weights in the kernels
    just before: they are read while those run.
    """
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=out_dtype or x.dtype, device=x.device)
    _launch(x, weight, bias, y)
    return y


def parts_of(num_rows: int, weight: torch.Tensor | Fp8Weight) -> int:
    """Programs that share a tile where each has one share of one, and they fill the card; else 0."""
    values = _values(weight)
    k_block, _ = _ring(values.itemsize, num_rows)
    most = num_multiprocessors(values.device)
    tiles, steps = cdiv(weight.shape[0], N_BLOCK), cdiv(weight.shape[1], k_block)
    parts = most // tiles
    return parts if 0.9 * most <= tiles * parts and steps % parts == 0 else 0


def stream_parts(x: StoredRows, weight: torch.Tensor | Fp8Weight) -> torch.Tensor:
    """Parts [P, T, N] of `stream_linear`'s product, which add up to it: the kernel behind it does that while it reads
    them, and nobody waits for a tile's other parts. P is `parts_of` these, at least 1. Parts are of x's dtype if that
    is bfloat16, which rounds no more than one rounding of the sum would, else float32.
    """
    parts = parts_of(x.shape[0], weight)
    dtype = x.dtype if x.dtype == torch.bfloat16 else torch.float32
    y = torch.empty((parts, x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    _launch(x, weight, None, y, after="part", parts=parts)
    return y


def stream_gated_linear(x: StoredRows, weight: torch.Tensor | Fp8Weight) -> torch.Tensor:
    """silu(gate) * up of x [T, K] times the transpose of weight [2I, K], whose first half is the gate: [T, I].

    See `stream_linear` and `can_stream_pairs`.
    """
    outputs = weight.shape[0] // 2
    y = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    _launch(x, weight, None, y, after="gate", jump=outputs, pair_distance=outputs)
    return y


def stream_qkv_linear(
    x: StoredRows,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """`prepare_qkv(linear(x, weight, bias), ...)` without head norms, rotating whole heads; see `can_stream_pairs`."""
    q = torch.empty((x.shape[0], num_heads, head_dim), dtype=x.dtype, device=x.device)
    _launch(
        x, weight, bias, q, after="turn", jump=head_dim, pair_distance=head_dim // 2,
        places=(k_cache, v_cache, positions, slots, cos_sin), heads=(num_heads, num_kv_heads, head_dim),
    )  # fmt: skip
    return q


def _launch(
    x: StoredRows,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    after: str = "store",
    jump: int = 0,
    pair_distance: int = 0,
    places: tuple[torch.Tensor, ...] = (),
    heads: tuple[int, int, int] = (0, 0, 0),
    parts: int = 0,
) -> None:
    (num_rows, inputs), outputs = x.shape, weight.shape[0]
    values, rows = _values(weight), _values(x)
    scales = (weight.scales, x.scales) if isinstance(weight, Fp8Weight) and isinstance(x, Fp8Rows) else (None, None)
    k_block, stages = _ring(values.itemsize, num_rows)
    rows_block = max(next_power_of_2(num_rows), 8)
    tile_rows = N_BLOCK // 2 if after in ("gate", "turn") else N_BLOCK  # side by side in the weight
    w_block, x_block = [tile_rows, k_block], [rows_block, k_block]
    shared, arrivals = _scratch(y.device)
    k_steps = cdiv(inputs, k_block)
    total = cdiv(outputs, N_BLOCK) * k_steps
    k_cache, v_cache, positions, slots, cos_sin = places or (None,) * 5
    groups = 1 if scales[1] is None else scales[1].shape[1]
    launch(
        _stream_kernel, (total // k_steps * parts or min(num_multiprocessors(y.device), total),),
        tiles_of(values, w_block), tiles_of(rows, x_block),
        *scales, bias, y, shared, arrivals,
        num_rows, y.shape[-1], k_steps, total, groups, y.stride(-2),
        pair_distance // tile_rows, jump, pair_distance,  # paired tiles side by side, and from one jump to the next
        k_cache, v_cache, positions, slots, cos_sin, *(places[0].stride()[:3] if places else (0, 0, 0)), *heads[:2],
        n_block=N_BLOCK,
        k_block=k_block,
        rows_block=rows_block,
        stages=stages,
        has_bias=bias is not None,
        after=after,
        scales_a_step=1 if groups == 1 else max(1, groups * k_block // inputs),
        block_size=1 if k_cache is None else k_cache.shape[2],
        head_dim=heads[2],
        num_warps=4,
        launch_pdl=True,
    )  # fmt: skip
