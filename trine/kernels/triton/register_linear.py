"""Products of one row on Hopper GPUs: weights, of float8 or bfloat16, go from memory to registers to the tensor cores.

Roofline: N * K weights are read once. What keeps `small_linear` from that speed with float8 weights is instructions:
unpacking, widening to float32, multiplying and adding up over threads take five a weight. Here a pair of weights is
widened to float16 by one instruction and the tensor cores do the rest, in float32.

They multiply 16 rows by 8 columns. With rows of weights for rows, a warp would read 64 bytes of each of 8 at once, and
memory is slow at that. So a row of the operand is one of 8 segments of a weight's row, 64 of the 512 bytes that a warp
reads at once; a column of the other operand is that segment of x; and of the 8 × 8 products of a weight's row the sum
of the diagonal is wanted.

For float8 weights x becomes float16 by a power of two, its largest magnitude in a warp's columns, which is exact down
to 2**-17 of that; what is smaller is off by 2**-25 of it at most. The norm of x may be computed by every program
itself, which costs less than a kernel of its own; its factor is applied to the sums.

A thread has `depth` units of weights on their way (a unit is 512 bytes of `rows` rows for each warp), the first of
them before the kernel in front is done: weights don't depend on it. Needs Gluon, which Triton's interpreter can't run;
`bench/gpu_check.py` compares it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trine.kernels.fp8 import Fp8Weight, RowToNorm
from trine.kernels.triton.device import cdiv, next_power_of_2, num_multiprocessors
from trine.kernels.triton.launch import launch

UNIT_BYTES = 512
"""What a warp reads at once."""

MAX_BYTES = 32768  # of a row
PLAIN_BYTES = 32 << 20  # of smaller bfloat16 weights `small_linear` is the faster
MAX_OUTPUTS = 1 << 16  # an output projection has more: there is no end to wait for


@gluon.jit
def _weight_rows(tile, numbers, outputs, rows: gl.constexpr, after: gl.constexpr, head_dim: gl.constexpr):
    """The weight's rows of a tile's `numbers`, below `rows`: for "gate" and "turn" every second is the partner of the
    one before it, outputs or half a head further on.
    """
    if after == "gate":
        return gl.minimum(tile * (rows // 2) + numbers // 2, outputs - 1) + numbers % 2 * outputs
    elif after == "turn":
        half: gl.constexpr = head_dim // 2
        pairs = gl.minimum(tile * (rows // 2) + numbers // 2, outputs // 2 - 1)
        return pairs // half * head_dim + pairs % half + numbers % 2 * half
    else:
        return gl.minimum(tile * rows + numbers, outputs - 1)


@gluon.jit
def _load(ptr, columns, inputs, ragged: gl.constexpr, evict: gl.constexpr):
    if ragged:
        return gl.load(ptr + columns, mask=columns < inputs, other=0.0, eviction_policy=evict)
    else:
        return gl.load(ptr + columns, eviction_policy=evict)


@gluon.jit
def _none():
    """The beginning of a tuple of tensors."""
    return ()


@gluon.jit
def _load_weights(
    w_ptr, w_stride, inputs, outputs, tile, unit,
    rows: gl.constexpr, segment: gl.constexpr, own: gl.constexpr, ragged: gl.constexpr, after: gl.constexpr,
    head_dim: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """A unit of a tile [warps, rows * 8, segment]: of each row 8 segments, side by side in memory."""
    number = gl.arange(0, rows * 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    k = gl.arange(0, segment, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    warp = gl.arange(0, gl.num_warps(), gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    row = _weight_rows(tile, number // 8, outputs, rows, after, head_dim)
    columns = gl.expand_dims(warp[:, None] * own + (number % 8 * segment)[None, :], 2) + gl.expand_dims(k[None, :], 1)
    row_ptr = w_ptr + gl.expand_dims(row[None, :], 2).to(gl.int64) * w_stride
    return _load(
        row_ptr, columns + unit * (8 * segment), inputs, ragged, "evict_first"
    )  # x stays in the first-level cache


@gluon.jit
def _load_row(
    ptr, inputs,
    units: gl.constexpr, segment: gl.constexpr, own: gl.constexpr, ragged: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """A row's units [warps, segment, 8]: a column is a segment."""
    k = gl.arange(0, segment, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    number = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    warp = gl.arange(0, gl.num_warps(), gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    columns = gl.expand_dims(warp[:, None] * own + k[None, :], 2) + gl.expand_dims((number * segment)[None, :], 1)
    row = _none()
    for unit in gl.static_range(units):
        row += (_load(ptr, columns + unit * (8 * segment), inputs, ragged, ""),)
    return row


@gluon.jit
def _weigh(x, norm, units: gl.constexpr):
    """The units of x times those of a norm's weight, and sums of x's squares [warps]."""
    warps: gl.constexpr = x[0].shape[0]
    squares = x[0].to(gl.float32) * x[0].to(gl.float32)
    weighed = _none()
    for unit in gl.static_range(units):
        wide = x[unit].to(gl.float32)
        if unit > 0:
            squares += wide * wide
        weighed += (wide * norm[unit].to(gl.float32),)
    return weighed, gl.sum(squares.reshape([warps, 8 * x[0].shape[1]]), 1)


@gluon.jit
def _powers_of_two(x, units: gl.constexpr):
    """Of each warp's part of x the power of two that its largest magnitude is not below: [warps] float32."""
    warps: gl.constexpr = x[0].shape[0]
    largest = gl.abs(x[0].to(gl.float32))
    for unit in gl.static_range(1, units):
        largest = gl.maximum(largest, gl.abs(x[unit].to(gl.float32)))
    largest = gl.max(largest.reshape([warps, 8 * x[0].shape[1]]), 1)
    return (largest.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)


@gluon.jit
def _narrow(x, scales, units: gl.constexpr):
    """The units of x, divided by the warps' scales, powers of two, as float16."""
    inverse = (0x7F000000 - scales.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, gl.SliceLayout(2, x[0].type.layout)))
    inverse = gl.expand_dims(inverse[:, None], 2)
    narrow = _none()
    for unit in gl.static_range(units):
        narrow += ((x[unit].to(gl.float32) * inverse).to(gl.float16),)
    return narrow


@gluon.jit
def _store_turned(
    first, second, pair, present, q_ptr, k_cache_ptr, v_cache_ptr, position, slot, cos_sin_ptr,
    cache_block_stride, cache_head_stride, cache_token_stride, num_heads, num_kv_heads,
    block_size: gl.constexpr, head_dim: gl.constexpr,
):  # fmt: skip
    """Rotate elements and those they turn with. Queries go to q, keys and values to the cache."""
    half: gl.constexpr = head_dim // 2
    kind: gl.constexpr = q_ptr.dtype.element_ty
    first = first.to(kind).to(gl.float32)  # rounded as if it were two kernels
    second = second.to(kind).to(gl.float32)
    head = pair // half
    dims = pair % half
    turned = present & (head < num_heads + num_kv_heads)
    cos = gl.load(cos_sin_ptr + position * head_dim + dims, mask=turned, other=1.0)
    sin = gl.load(cos_sin_ptr + position * head_dim + half + dims, mask=turned, other=0.0)
    own = (first * cos - second * sin).to(kind)
    partner = (second * cos + first * sin).to(kind)
    is_query = present & (head < num_heads)
    q_at = head * head_dim + dims
    gl.store(q_ptr + q_at, own, mask=is_query)
    gl.store(q_ptr + q_at + half, partner, mask=is_query)
    place = slot // block_size * cache_block_stride + slot % block_size * cache_token_stride + dims
    k_at = place + (head - num_heads) * cache_head_stride
    is_key = turned & (head >= num_heads)
    gl.store(k_cache_ptr + k_at, own, mask=is_key)
    gl.store(k_cache_ptr + k_at + half, partner, mask=is_key)
    v_at = place + (head - num_heads - num_kv_heads) * cache_head_stride
    is_value = present & (head >= num_heads + num_kv_heads)
    gl.store(v_cache_ptr + v_at, own, mask=is_value)
    gl.store(v_cache_ptr + v_at + half, partner, mask=is_value)


@gluon.jit
def _row_sums(acc, scales, scaled: gl.constexpr):
    """[rows] of acc [warps, rows * 8, 8], whose diagonals of 8 × 8, times the warps' scales, add up to a row's sum. A
    thread has both of a pair of rows.
    """
    warps: gl.constexpr = acc.shape[0]
    rows: gl.constexpr = acc.shape[1] // 8
    mma: gl.constexpr = acc.type.layout
    segment = gl.arange(0, rows * 8, gl.SliceLayout(0, gl.SliceLayout(2, mma))) % 8
    other = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, mma)))
    diagonal = gl.expand_dims(segment[None, :], 2) == other[None, None, :]
    if scaled:
        scales = gl.convert_layout(scales, gl.SliceLayout(1, gl.SliceLayout(2, mma)))
        acc *= gl.expand_dims(scales[:, None], 2)
    kept = gl.where(diagonal, acc, 0.0)
    parts = gl.sum(kept.reshape([warps, rows * 8, 4, 2]), 3).reshape([warps, rows, 32])
    layout: gl.constexpr = gl.BlockedLayout([1, 2, 4], [1, 4, 8], [1, warps, 1], [2, 1, 0])
    return gl.sum(gl.sum(gl.convert_layout(parts, layout), 0), 1)


@gluon.jit
def _finish(
    y, tile, scales_ptr, bias_ptr, y_ptr, outputs, k_cache_ptr, v_cache_ptr, position, slot, cos_sin_ptr,
    cache_block_stride, cache_head_stride, cache_token_stride, num_heads, num_kv_heads,
    has_scales: gl.constexpr, has_bias: gl.constexpr, after: gl.constexpr, block_size: gl.constexpr,
    head_dim: gl.constexpr,
):  # fmt: skip
    """Do with a tile's results y [rows] what `after` says."""
    rows: gl.constexpr = y.shape[0]
    numbers = gl.arange(0, rows, y.type.layout)
    n = _weight_rows(tile, numbers, outputs, rows, after, head_dim)
    if has_scales:
        y *= gl.load(scales_ptr + n)
    if has_bias:
        y += gl.load(bias_ptr + n).to(gl.float32)
    if after == "gate" or after == "turn":
        first, second = gl.split(y.reshape([rows // 2, 2]))
        pair = tile * (rows // 2) + gl.arange(0, rows // 2, first.type.layout)
        if after == "gate":
            y = first / (1.0 + gl.exp(-first)) * second
            gl.store(y_ptr + pair, y.to(y_ptr.dtype.element_ty), mask=pair < outputs)
        else:
            _store_turned(
                first, second, pair, pair < outputs // 2, y_ptr, k_cache_ptr, v_cache_ptr, position, slot, cos_sin_ptr,
                cache_block_stride, cache_head_stride, cache_token_stride, num_heads, num_kv_heads,
                block_size, head_dim,
            )  # fmt: skip
    else:
        present = tile * rows + numbers < outputs
        if after == "add":
            y += gl.load(y_ptr + n, mask=present, other=0.0).to(gl.float32)
        gl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=present)


@gluon.jit
def _register_linear_kernel(
    x_ptr, norm_ptr, w_ptr, scales_ptr, bias_ptr, y_ptr, inputs, outputs, w_stride, eps,
    k_cache_ptr, v_cache_ptr, positions_ptr, slots_ptr, cos_sin_ptr,
    cache_block_stride, cache_head_stride, cache_token_stride, num_heads, num_kv_heads,
    rows: gl.constexpr, units: gl.constexpr, tiles: gl.constexpr, depth: gl.constexpr,
    ragged: gl.constexpr, has_norm: gl.constexpr, has_bias: gl.constexpr, after: gl.constexpr,
    block_size: gl.constexpr, head_dim: gl.constexpr,
):  # fmt: skip
    """Program i of P: tiles i, i + P and so on, `tiles` of them, of `units` units. `after` says what becomes of one."""
    warps: gl.constexpr = gl.num_warps()
    bits: gl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth
    segment: gl.constexpr = 512 // bits
    own: gl.constexpr = units * segment * 8
    kind: gl.constexpr = gl.float16 if bits == 8 else w_ptr.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])
    w_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 128 // bits)  # a thread has 16 bytes
    x_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 128 // bits)
    program, programs = gl.program_id(0), gl.num_programs(0)
    ahead = _none()
    for step in gl.static_range(depth):
        w = _load_weights(
            w_ptr, w_stride, inputs, outputs, program + step // units * programs, step % units,
            rows, segment, own, ragged, after, head_dim, w_layout,
        )  # fmt: skip
        ahead += (w,)
    if has_norm:
        norm = _load_row(norm_ptr, inputs, units, segment, own, ragged, x_layout)
    position, slot = 0, 0
    if after == "turn":
        position = gl.load(positions_ptr)
        slot = gl.load(slots_ptr)
    gdc_launch_dependents()
    gdc_wait()
    x = _load_row(x_ptr, inputs, units, segment, own, ragged, x_layout)
    if has_norm:
        x, squares = _weigh(x, norm, units)
    scales = 1.0
    if bits == 8:
        scales = _powers_of_two(x, units)
        x = _narrow(x, scales, units)
    staged: gl.constexpr = units * segment > 128  # more than registers hold
    if staged:
        shared = gl.allocate_shared_memory(
            kind, [units, warps, segment, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0])
        )  # fmt: skip
        for unit in gl.static_range(units):
            shared.index(unit).store(x[unit].to(kind))
    for t in gl.static_range(tiles):
        tile = program + t * programs
        acc = gl.zeros([warps, rows * 8, 8], gl.float32, mma)
        for unit in gl.static_range(units):
            own_x = shared.index(unit).load(x_layout) if staged else x[unit].to(kind)
            acc = mma_v2(ahead[0].to(kind), own_x, acc)
            ahead = ahead[1:]
            if t * units + unit + depth < tiles * units:
                w = _load_weights(
                    w_ptr, w_stride, inputs, outputs, tile + (unit + depth) // units * programs, (unit + depth) % units,
                    rows, segment, own, ragged, after, head_dim, w_layout,
                )  # fmt: skip
                ahead += (w,)
        y = _row_sums(acc, scales, bits == 8)
        if has_norm:
            if t == 0:  # not before: weights go first
                factor = 1.0 / gl.sqrt(gl.sum(squares, 0) / inputs + eps)
            y *= factor
        _finish(
            y, tile, scales_ptr, bias_ptr, y_ptr, outputs, k_cache_ptr, v_cache_ptr, position, slot, cos_sin_ptr,
            cache_block_stride, cache_head_stride, cache_token_stride, num_heads, num_kv_heads,
            bits == 8, has_bias, after, block_size, head_dim,
        )  # fmt: skip


class Blocks(NamedTuple):
    """What a program does: see `_register_linear_kernel`."""

    rows: int
    num_warps: int
    units: int
    tiles: int
    depth: int
    registers: int | None  # a thread's, at most


def _blocks(weight: torch.Tensor) -> Blocks:
    """Programs that are all on the card at once, if there is enough for that: two a multiprocessor with 16 rows, of
    which a thread holds a unit or more in 64 registers and the sums in 32, or four with 8.
    """
    outputs, row_bytes = weight.shape[0], weight.shape[1] * weight.itemsize
    num_warps = min(next_power_of_2(cdiv(row_bytes, UNIT_BYTES)), 4 if row_bytes <= 28 << 10 else 8)
    units = cdiv(row_bytes, num_warps * UNIT_BYTES)
    processors = num_multiprocessors(weight.device)
    tiles = min(cdiv(outputs, 8 * 4 * processors), 8)
    most = 2 * weight.itemsize
    if (units > most or tiles == 1) and outputs >= 16 * 3 * processors // 2:
        return Blocks(16, num_warps, units, 1, min(units, 2) if units <= most else 1, None)
    if units > most:
        return Blocks(8, num_warps, units, 1, 1, None)
    if tiles <= 2:
        return Blocks(8, num_warps, units, tiles, min(units, 2), None)
    if weight.itemsize == 2:  # there is little to be done to x
        return Blocks(8, num_warps, units, 1, min(units, 2), 128)
    return Blocks(8, num_warps, units, tiles, 1, 128)


def supports(x: torch.Tensor | RowToNorm, weight: torch.Tensor | Fp8Weight) -> bool:
    """Whether these kernels take x and the weight."""
    values = weight.values if isinstance(weight, Fp8Weight) else weight
    row_bytes = values.shape[1] * values.itemsize
    return (
        x.shape[0] == 1
        and (
            isinstance(weight, Fp8Weight)
            or (weight.dtype == x.dtype == torch.bfloat16 and weight.nbytes >= PLAIN_BYTES)
        )
        and row_bytes % 16 == 0
        and row_bytes <= MAX_BYTES
        and values.shape[0] <= MAX_OUTPUTS
        and values.stride(1) == 1
    )


def register_linear(
    x: torch.Tensor | RowToNorm,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [1, K] times the transpose of weight [N, K], plus bias [N]: [1, N] of x's dtype, or `out_dtype`."""
    y = torch.empty((1, weight.shape[0]), dtype=out_dtype or x.dtype, device=x.device)
    _launch(x, weight, bias, y)
    return y


def register_linear_add(
    x: torch.Tensor | RowToNorm, weight: torch.Tensor | Fp8Weight, bias: torch.Tensor | None, residual: torch.Tensor
) -> None:
    """Add `register_linear` to `residual` [1, N] in place."""
    _launch(x, weight, bias, residual, after="add")


def register_gated_linear(x: torch.Tensor | RowToNorm, weight: torch.Tensor | Fp8Weight) -> torch.Tensor:
    """silu(gate) * up of x [1, K] times the transpose of weight [2I, K], whose first half is the gate: [1, I]."""
    y = torch.empty((1, weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, None, y, after="gate")
    return y


def register_qkv_linear(
    x: torch.Tensor | RowToNorm,
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
    """`prepare_qkv(linear(x, weight, bias), ...)` for x [1, K] without head norms, rotating whole heads."""
    q = torch.empty((1, num_heads, head_dim), dtype=x.dtype, device=x.device)
    places = (k_cache, v_cache, positions, slots, cos_sin)
    _launch(x, weight, bias, q, after="turn", places=places, heads=(num_heads, num_kv_heads, head_dim))
    return q


def _launch(
    x: torch.Tensor | RowToNorm,
    weight: torch.Tensor | Fp8Weight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    after: str = "store",
    places: tuple[torch.Tensor, ...] = (),
    heads: tuple[int, int, int] = (0, 0, 0),
) -> None:
    outputs, inputs = weight.shape
    values, scales = (weight.values, weight.scales) if isinstance(weight, Fp8Weight) else (weight, None)
    blocks = _blocks(values)
    hidden, norm, eps = (x.hidden, x.weight, x.eps) if isinstance(x, RowToNorm) else (x, None, 0.0)
    k_cache, v_cache, positions, slots, cos_sin = places or (None,) * 5
    launch(
        _register_linear_kernel,
        (cdiv(outputs, blocks.rows * blocks.tiles),),
        hidden,
        norm,
        values,
        scales,
        bias,
        y,
        inputs,
        outputs // 2 if after == "gate" else outputs,
        values.stride(0),
        eps,
        k_cache,
        v_cache,
        positions,
        slots,
        cos_sin,
        *((0, 0, 0) if k_cache is None else k_cache.stride()[:3]),
        *heads[:2],
        rows=blocks.rows,
        units=blocks.units,
        tiles=blocks.tiles,
        depth=blocks.depth,
        ragged=inputs * values.itemsize < blocks.units * blocks.num_warps * UNIT_BYTES,
        has_norm=norm is not None,
        has_bias=bias is not None,
        after=after,
        block_size=1 if k_cache is None else k_cache.shape[2],
        head_dim=heads[2],
        num_warps=blocks.num_warps,
        launch_pdl=True,
        **({} if blocks.registers is None else {"maxnreg": blocks.registers}),
    )
