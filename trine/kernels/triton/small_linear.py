"""Matrix products of one to four rows, at the speed that weights stream from memory.

Roofline: N * K weights are read once, N * K * rows multiplications are far below what the card can do; everything else
is small. So a program's whole job is to have many bytes in flight: it asks for a tile of `row_block` weight rows by
`k_block` columns at once, and with programmatic dependent launch it asks before the kernel in front of it has finished
(weights don't depend on it), which hides the launch and the tail of one product behind the next.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl

from trine.kernels.fp8 import Fp8Rows, Fp8Weight, Rows, RowToNorm
from trine.kernels.triton.device import cdiv, early_launch, hopper_kernels, next_power_of_2, wait_for_inputs
from trine.kernels.triton.launch import launch

MAX_ROWS = 4
STREAMED_ROWS = 32
STREAMED_BYTES = 16 << 20  # smaller weights are latency, not bandwidth
LARGE_BYTES = 512 << 20  # an output projection's: there is no end to wait for
_TILE_BYTES = 16384  # of weights that a program has in flight
_WIDEST = 4096  # columns of a tile


@triton.jit
def _accumulate(
    acc, weight, x_ptr, x_stride, columns, inputs, num_rows: tl.constexpr, rows_block: tl.constexpr
):  # fmt: skip
    """acc [rows_block, n] plus the dot products of weight's rows [n, k] with columns `columns` of x's rows."""
    numbers = tl.arange(0, rows_block)
    weight = weight.to(tl.float32)
    for row in tl.static_range(num_rows):
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < inputs, other=0.0).to(tl.float32)
        products = tl.sum(weight * x[None, :], 1)
        acc += tl.where((numbers == row)[:, None], products[None, :], 0.0)
    return acc


@triton.jit
def _first_tile(weight_ptr, weight_rows, present, inputs, weight_stride, k_block: tl.constexpr):
    """The first columns of the weight's rows `weight_rows` [n]: asked for before the kernel in front is done."""
    columns = tl.arange(0, k_block)
    row_ptr = weight_ptr + weight_rows.to(tl.int64)[:, None] * weight_stride
    return tl.load(row_ptr + columns[None, :], mask=present[:, None] & (columns < inputs)[None, :], other=0.0)


@triton.jit
def _products(
    x_ptr, weight_ptr, weight, weight_rows, present, inputs, x_stride, weight_stride,
    num_rows: tl.constexpr, rows_block: tl.constexpr, row_block: tl.constexpr, k_block: tl.constexpr,
):  # fmt: skip
    """Dot products of the weight's rows `weight_rows` [n], of which `weight` are the first columns, with every row of
    x: [rows_block, n] float32.
    """
    weight_row_ptr = weight_ptr + weight_rows.to(tl.int64)[:, None] * weight_stride
    columns = tl.arange(0, k_block)
    acc = tl.zeros([rows_block, row_block], tl.float32)
    acc = _accumulate(acc, weight, x_ptr, x_stride, columns, inputs, num_rows, rows_block)
    for start in range(k_block, inputs, k_block):
        columns = start + tl.arange(0, k_block)
        weight = tl.load(
            weight_row_ptr + columns[None, :], mask=present[:, None] & (columns < inputs)[None, :], other=0.0
        )
        acc = _accumulate(acc, weight, x_ptr, x_stride, columns, inputs, num_rows, rows_block)
    return acc


@triton.jit
def _small_linear_kernel(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, y_ptr, inputs, outputs, x_stride, weight_stride, y_stride,
    num_rows: tl.constexpr, rows_block: tl.constexpr, has_scales: tl.constexpr, has_bias: tl.constexpr,
    early: tl.constexpr, row_block: tl.constexpr, k_block: tl.constexpr,
):  # fmt: skip
    """Program i: outputs i * row_block to (i + 1) * row_block of every row of x."""
    weight_rows = tl.program_id(0) * row_block + tl.arange(0, row_block)
    present = weight_rows < outputs
    weight = _first_tile(weight_ptr, weight_rows, present, inputs, weight_stride, k_block)
    wait_for_inputs(early)
    acc = _products(
        x_ptr, weight_ptr, weight, weight_rows, present, inputs, x_stride, weight_stride,
        num_rows, rows_block, row_block, k_block,
    )  # fmt: skip
    if has_scales:
        acc *= tl.load(scales_ptr + weight_rows, mask=present, other=0.0).to(tl.float32)[None, :]
    if has_bias:
        acc += tl.load(bias_ptr + weight_rows, mask=present, other=0.0).to(tl.float32)[None, :]
    numbers = tl.arange(0, rows_block)
    y_mask = (numbers < num_rows)[:, None] & present[None, :]
    tl.store(y_ptr + numbers[:, None] * y_stride + weight_rows[None, :], acc.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
def _small_gated_kernel(
    x_ptr, weight_ptr, scales_ptr, y_ptr, inputs, outputs, weight_stride,
    has_scales: tl.constexpr, early: tl.constexpr, row_block: tl.constexpr, k_block: tl.constexpr,
):  # fmt: skip
    """Program i: outputs i * row_block / 2 and on of one row of x, each from a row of the gate and a row of up."""
    pairs: tl.constexpr = row_block // 2
    numbers = tl.arange(0, row_block)
    weight_rows = tl.program_id(0) * pairs + numbers // 2
    present = weight_rows < outputs
    weight_rows += numbers % 2 * outputs
    weight = _first_tile(weight_ptr, weight_rows, present, inputs, weight_stride, k_block)
    wait_for_inputs(early)
    acc = _products(
        x_ptr, weight_ptr, weight, weight_rows, present, inputs, 0, weight_stride, 1, 1, row_block, k_block
    )  # fmt: skip
    if has_scales:
        acc *= tl.load(scales_ptr + weight_rows, mask=present, other=0.0).to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(acc, [pairs, 2]))
    columns = tl.program_id(0) * pairs + tl.arange(0, pairs)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=columns < outputs)


@triton.jit
def _small_qkv_kernel(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, q_ptr, k_cache_ptr, v_cache_ptr, positions_ptr, cos_sin_ptr, slots_ptr,
    inputs, weight_stride, cache_block_stride, cache_head_stride, cache_token_stride, num_heads, num_kv_heads,
    has_scales: tl.constexpr, has_bias: tl.constexpr, block_size: tl.constexpr, head_dim: tl.constexpr,
    early: tl.constexpr, row_block: tl.constexpr, k_block: tl.constexpr,
):  # fmt: skip
    """Program i: row_block / 2 pairs of elements of one token's projection that turn together: i and i + head_dim / 2
    of a head. Queries go to q, keys and values to the cache.
    """
    pairs: tl.constexpr = row_block // 2
    half: tl.constexpr = head_dim // 2
    numbers = tl.arange(0, row_block)
    row_pairs = tl.program_id(0) * pairs + numbers // 2
    weight_rows = row_pairs // half * head_dim + row_pairs % half + numbers % 2 * half
    present = row_pairs < (num_heads + 2 * num_kv_heads) * half
    weight = _first_tile(weight_ptr, weight_rows, present, inputs, weight_stride, k_block)
    cos_sin_row = cos_sin_ptr + tl.load(positions_ptr) * head_dim
    slot = tl.load(slots_ptr)
    own = tl.program_id(0) * pairs + tl.arange(0, pairs)
    head = own // half
    dims = own % half
    turned = head < num_heads + num_kv_heads
    cos = tl.load(cos_sin_row + dims, mask=turned, other=1.0)
    sin = tl.load(cos_sin_row + half + dims, mask=turned, other=0.0)
    wait_for_inputs(early)
    acc = _products(
        x_ptr, weight_ptr, weight, weight_rows, present, inputs, 0, weight_stride, 1, 1, row_block, k_block
    )  # fmt: skip
    if has_scales:
        acc *= tl.load(scales_ptr + weight_rows, mask=present, other=0.0).to(tl.float32)[None, :]
    if has_bias:
        acc += tl.load(bias_ptr + weight_rows, mask=present, other=0.0).to(tl.float32)[None, :]
    acc = acc.to(q_ptr.dtype.element_ty).to(tl.float32)  # as if it were two kernels
    first, second = tl.split(tl.reshape(acc, [pairs, 2]))
    turned_first = (first * cos - second * sin).to(q_ptr.dtype.element_ty)
    turned_second = (second * cos + first * sin).to(q_ptr.dtype.element_ty)
    is_query = head < num_heads
    q_at = head * head_dim + dims
    tl.store(q_ptr + q_at, turned_first, mask=is_query)
    tl.store(q_ptr + q_at + half, turned_second, mask=is_query)
    place = (slot // block_size) * cache_block_stride + (slot % block_size) * cache_token_stride + dims
    k_at = place + (head - num_heads) * cache_head_stride
    is_key = turned & (head >= num_heads)
    tl.store(k_cache_ptr + k_at, turned_first, mask=is_key)
    tl.store(k_cache_ptr + k_at + half, turned_second, mask=is_key)
    v_at = place + (head - num_heads - num_kv_heads) * cache_head_stride
    is_value = (head < num_heads + 2 * num_kv_heads) & (head >= num_heads + num_kv_heads)
    tl.store(v_cache_ptr + v_at, turned_first, mask=is_value)
    tl.store(v_cache_ptr + v_at + half, turned_second, mask=is_value)


def _blocks(weight: torch.Tensor) -> dict[str, int]:
    """Weight rows and columns of a program's tile: small ones, of which a multiprocessor has a dozen in flight, each at
    another point of its work.
    """
    inputs = weight.shape[1]
    if weight.itemsize == 1:  # widening takes registers
        return {"row_block": 4, "k_block": min(next_power_of_2(inputs), 2048)}
    if inputs > 2 * _WIDEST:
        return {"row_block": 4, "k_block": 1024}
    k_block = min(next_power_of_2(inputs), _WIDEST)
    tile_bytes = 2 * _TILE_BYTES if weight.nbytes > LARGE_BYTES else _TILE_BYTES
    return {"row_block": max(min(tile_bytes // weight.itemsize // k_block, 8), 2), "k_block": k_block}


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, or `out_dtype`.

    T is 1 to MAX_ROWS. weight is of x's dtype, or float8 with `scales` [N] float32, one a row. Nothing may write to it
    in the kernels just before: with early launch it is read while they run.
    """
    num_rows, inputs = x.shape
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"{num_rows} rows: small_linear takes 1 to {MAX_ROWS}")
    outputs = weight.shape[0]
    y = torch.empty((num_rows, outputs), dtype=out_dtype or x.dtype, device=x.device)
    blocks = _blocks(weight)
    launch(
        _small_linear_kernel,
        (cdiv(outputs, blocks["row_block"]),),
        x,
        weight,
        scales,
        bias,
        y,
        inputs,
        outputs,
        x.stride(0),
        weight.stride(0),
        y.stride(0),
        num_rows=num_rows,
        rows_block=next_power_of_2(num_rows),
        has_scales=scales is not None,
        has_bias=bias is not None,
        num_warps=4,
        **blocks,
        **early_launch(x.device),
    )
    return y


def small_gated_linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up of x [1, K] times the transpose of weight [2I, K], whose first half is the gate: [1, I].

    weight is of x's dtype, or float8 with `scales` [2I] float32, one a row; see `small_linear`.
    """
    inputs, outputs = x.shape[1], weight.shape[0] // 2
    y = torch.empty((1, outputs), dtype=x.dtype, device=weight.device)
    blocks = _blocks(weight)
    launch(
        _small_gated_kernel,
        (cdiv(outputs, blocks["row_block"] // 2),),
        x,
        weight,
        scales,
        y,
        inputs=inputs,
        outputs=outputs,
        weight_stride=weight.stride(0),
        has_scales=scales is not None,
        num_warps=4,
        **blocks,
        **early_launch(weight.device),
    )
    return y


def small_qkv_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """`prepare_qkv(linear(x, weight, bias), ...)` for x [1, K] without head norms, rotating whole heads.

    weight is of x's dtype, or float8 with `scales`, one a row; see `small_linear`.
    """
    inputs = x.shape[1]
    q = torch.empty((1, num_heads, head_dim), dtype=x.dtype, device=weight.device)
    blocks = _blocks(weight)
    launch(
        _small_qkv_kernel,
        (cdiv(weight.shape[0], blocks["row_block"]),),
        x,
        weight,
        scales,
        bias,
        q,
        k_cache,
        v_cache,
        positions,
        cos_sin,
        slots,
        inputs=inputs,
        weight_stride=weight.stride(0),
        cache_block_stride=k_cache.stride(0),
        cache_head_stride=k_cache.stride(1),
        cache_token_stride=k_cache.stride(2),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        has_scales=scales is not None,
        has_bias=bias is not None,
        block_size=k_cache.shape[2],
        head_dim=head_dim,
        num_warps=4,
        **blocks,
        **early_launch(weight.device),
    )
    return q


def is_ours(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product of one row of x is ours: of a 16-bit type."""
    return weight.itemsize == 2 and weight.dtype == x.dtype and weight.stride(1) == 1


def streams(x: torch.Tensor, weight: torch.Tensor) -> ModuleType | None:
    """The module whose product is the fastest for few rows of x, None where it is not or can't be."""
    if not (is_ours(x, weight) and 1 < x.shape[0] <= STREAMED_ROWS and weight.nbytes >= STREAMED_BYTES):
        return None
    stream = hopper_kernels(weight.device, "stream_linear")
    return stream if stream is not None and stream.can_stream(x, weight) else None


def of_one_row(x: Rows, weight: torch.Tensor | Fp8Weight) -> ModuleType | None:
    """The module whose product of one row is the fastest, None where it can't be."""
    if isinstance(x, Fp8Rows) or x.shape[0] != 1:
        return None
    module = hopper_kernels(x.device, "register_linear")
    return module if module is not None and module.supports(x, weight) else None


def norms_itself(reader: torch.Tensor | Fp8Weight, x: torch.Tensor) -> bool:
    """Whether the product of x [T, H] with `reader` takes x before its norm."""
    return of_one_row(x, reader) is not None


def add(x: Rows, weight: torch.Tensor | Fp8Weight, bias: torch.Tensor | None, residual: torch.Tensor) -> bool:
    """Add `linear(x, weight, bias)` to `residual` [1, N] in place, where one kernel does both; whether it was so."""
    one = of_one_row(x, weight)
    if one is None:
        return False
    one.register_linear_add(x, weight, bias, residual)
    return True


def linear_prepare_qkv(
    x: torch.Tensor | RowToNorm,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor | None:
    """`prepare_qkv(linear(x, weight, bias), ...)` without head norms, for few rows; None where it takes two kernels."""
    if cos_sin.shape[1] != head_dim:
        return None
    own = (num_heads, num_kv_heads, head_dim, positions, cos_sin, k_cache, v_cache, slots)
    one = of_one_row(x, weight)
    if one is not None:
        turned: torch.Tensor = one.register_qkv_linear(x, weight, bias, *own)
        return turned
    assert not isinstance(x, RowToNorm), "made for a product that norms it"
    if not is_ours(x, weight):
        return None
    stream = streams(x, weight)
    if stream is None or not stream.can_stream_pairs(weight, head_dim // 2):
        return small_qkv_linear(x, weight, bias, *own) if x.shape[0] == 1 else None
    q: torch.Tensor = stream.stream_qkv_linear(x, weight, bias, *own)
    return q


def linear(
    x: torch.Tensor | RowToNorm,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, or `out_dtype`.

    Few rows of a 16-bit type are ours: the library reaches less of the memory's speed there. All else is the library's.
    """
    one = of_one_row(x, weight)
    if one is not None:
        y: torch.Tensor = one.register_linear(x, weight, bias, out_dtype)
        return y
    assert not isinstance(x, RowToNorm), "made for a product that norms it"
    stream = streams(x, weight)
    if stream is not None:
        streamed: torch.Tensor = stream.stream_linear(x, weight, bias, out_dtype)
        return streamed
    if x.shape[0] == 1 and is_ours(x, weight):
        return small_linear(x, weight, bias, out_dtype=out_dtype)
    if x.is_cuda and x.itemsize == 2 and out_dtype == torch.float32 and bias is None:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    y = F.linear(x, weight, bias)
    return y if out_dtype is None else y.to(out_dtype)


def linear_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """`linear` as parts [P, T, N] float32 that add up to it, where that is faster."""
    stream = streams(x, weight)
    if stream is None or not stream.parts_of(x.shape[0], weight):
        return None
    parts: torch.Tensor = stream.stream_parts(x, weight)
    return parts
