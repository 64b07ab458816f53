"""Products and dense convolutions as one implicit matrix product, with all that follows them in its epilogue.

Rows are output pixels (channels innermost, so a pixel's channels lie side by side), columns are filters, and the inner
dimension is the taps of the kernel times the channels. A linear layer is a convolution with one tap, a transposed one
whose steps equal its kernel a linear layer whose columns are spread over the output's pixels.

Roofline: 2 M N K operations against (M K / taps + N K + M N) numbers read or written; for images of early layers the
latter bounds, so what counts is that bias, residual and activation cost no pass of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from trine.graph.gpu.kernels.epilogue import activate, place, rounded
from trine.kernels import fp8
from trine.kernels.triton.device import early_launch, wait_for_inputs


@dataclass(frozen=True, slots=True)
class Tile:
    """The free choices of the kernel: rows, columns and inner numbers of a step, warps, steps in flight, and into how
    many programs the inner dimension is split, where there are fewer tiles than multiprocessors.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1

    def __str__(self) -> str:
        split = f"k{self.splits}" if self.splits > 1 else ""
        return f"{self.rows}x{self.columns}x{self.inner}w{self.num_warps}s{self.num_stages}{split}"

    def arrivals(self, rows: int, columns: int, device: torch.device) -> torch.Tensor | None:
        """A counter a tile, for one node alone; each launch leaves them at 0. None where nothing is split."""
        if self.splits == 1:
            return None
        tiles = triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)
        return torch.zeros(tiles, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class Window:
    """Where a convolution reads; each pair is vertical, horizontal."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    dilations: tuple[int, int] = (1, 1)


@triton.jit
def _write(
    acc, scales_ptr, bias_ptr, residual_ptr, y_ptr, m, n, rows, filters, out_width, pitch, x_scale, inverse_scale,
    spread: tl.constexpr, has_scales: tl.constexpr, has_bias: tl.constexpr, has_residual: tl.constexpr,
    has_rounded: tl.constexpr, activation: tl.constexpr,
):  # fmt: skip
    """All that follows a tile's sums, and its results to rows m and columns n."""
    row_there, column_there = m < rows, n < filters
    if has_scales:
        acc *= (tl.load(scales_ptr + n, mask=column_there, other=0.0) * x_scale)[None, :]
    there = row_there[:, None] & column_there[None, :]
    if spread > 1:
        outputs = filters // (spread * spread)
        part = n // outputs
        if has_bias:
            acc += tl.load(bias_ptr + n % outputs, mask=column_there, other=0.0).to(tl.float32)[None, :]
        line = m // out_width * spread
        at = (line.to(tl.int64)[:, None] + (part // spread)[None, :]) * out_width * spread
        at = (at + (m % out_width * spread)[:, None] + (part % spread)[None, :]) * pitch + (n % outputs)[None, :]
    else:
        if has_bias:
            acc += tl.load(bias_ptr + n, mask=column_there, other=0.0).to(tl.float32)[None, :]
        at = m.to(tl.int64)[:, None] * filters + n[None, :]
    if has_residual:
        acc += tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
    acc = activate(acc, activation)
    if has_rounded:
        acc = rounded(acc, inverse_scale)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, scales_ptr, bias_ptr, residual_ptr, y_ptr, parts_ptr, arrivals_ptr,
    rows, filters, channels, inner_size, height, width, out_height, out_width, pitch, x_scale, inverse_scale,
    kernel_h: tl.constexpr, kernel_w: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    pad_h: tl.constexpr, pad_w: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    plain: tl.constexpr, flat: tl.constexpr, even: tl.constexpr, spread: tl.constexpr,
    has_scales: tl.constexpr, has_bias: tl.constexpr, has_residual: tl.constexpr, has_rounded: tl.constexpr,
    activation: tl.constexpr, row_block: tl.constexpr, column_block: tl.constexpr, inner_block: tl.constexpr,
    together: tl.constexpr, splits: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program (i, j): part j of the inner dimension of tile i. The last part of a tile to arrive adds up all of them,
    in order. `together` tiles of rows run side by side, to share columns in the cache.

    plain   one tap, step 1: rows of x are rows of the product
    flat    few channels: the inner dimension runs over taps and channels at once
    even    the inner block divides the channels
    spread  columns are (vertical, horizontal, filter) of the `spread`² output pixels that a row makes, whose channels
            lie `pitch` apart from the next pixel's
    """
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, row_block)
    column_tiles = tl.cdiv(filters, column_block)
    strip = program // (together * column_tiles)
    depth = tl.minimum(row_tiles - strip * together, together)
    inside_strip = program % (together * column_tiles)
    row_tile = strip * together + inside_strip % depth
    column_tile = inside_strip // depth
    m = row_tile * row_block + tl.arange(0, row_block)
    n = column_tile * column_block + tl.arange(0, column_block)
    row_there, column_there = m < rows, n < filters
    k = tl.arange(0, inner_block)
    w_at = w_ptr + tl.where(column_there, n, 0).to(tl.int64)[None, :] * inner_size
    wait_for_inputs(early)
    acc = tl.zeros([row_block, column_block], tl.float32)
    if plain:
        x_at = x_ptr + tl.where(row_there, m, 0).to(tl.int64)[:, None] * channels
        each = tl.cdiv(tl.cdiv(channels, inner_block), splits) * inner_block
        first = tl.program_id(1) * each
        for start in range(first, tl.minimum(first + each, channels), inner_block):
            if even:
                x = tl.load(x_at + (start + k)[None, :])
                w = tl.load(w_at + (start + k)[:, None])
            else:
                there = start + k < channels
                x = tl.load(x_at + (start + k)[None, :], mask=there[None, :], other=0.0)
                w = tl.load(w_at + (start + k)[:, None], mask=there[:, None], other=0.0)
            acc = tl.dot(x, w, acc)
    else:
        place = m % (out_height * out_width)
        image = (m // (out_height * out_width)).to(tl.int64) * height * width
        top = place // out_width * stride_h - pad_h
        left = place % out_width * stride_w - pad_w
        if flat:
            for start in range(0, kernel_h * kernel_w * channels, inner_block):
                number = start + k
                tap = number // channels
                y_in = top[:, None] + (tap // kernel_w * dilation_h)[None, :]
                x_in = left[:, None] + (tap % kernel_w * dilation_w)[None, :]
                there = (y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width) & row_there[:, None]
                there &= (number < inner_size)[None, :]
                at = (image[:, None] + y_in * width + x_in) * channels + (number % channels)[None, :]
                x = tl.load(x_ptr + at, mask=there, other=0.0)
                w = tl.load(w_at + number[:, None], mask=(number < inner_size)[:, None], other=0.0)
                acc = tl.dot(x, w, acc)
        else:
            blocks = tl.cdiv(channels, inner_block)
            each = tl.cdiv(kernel_h * kernel_w * blocks, splits)
            first = tl.program_id(1) * each
            for step in range(first, tl.minimum(first + each, kernel_h * kernel_w * blocks)):
                tap = step // blocks
                c = step % blocks * inner_block + k
                y_in = top + tap // kernel_w * dilation_h
                x_in = left + tap % kernel_w * dilation_w
                there = (y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width) & row_there
                at = x_ptr + (image + y_in * width + x_in)[:, None] * channels + c[None, :]
                if even:
                    x = tl.load(at, mask=there[:, None], other=0.0)
                    w = tl.load(w_at + (tap * channels + c)[:, None])
                else:
                    x = tl.load(at, mask=there[:, None] & (c < channels)[None, :], other=0.0)
                    w = tl.load(w_at + (tap * channels + c)[:, None], mask=(c < channels)[:, None], other=0.0)
                acc = tl.dot(x, w, acc)
    if splits == 1:
        _write(
            acc, scales_ptr, bias_ptr, residual_ptr, y_ptr, m, n, rows, filters, out_width, pitch, x_scale,
            inverse_scale, spread, has_scales, has_bias, has_residual, has_rounded, activation,
        )  # fmt: skip
    else:
        inside = tl.arange(0, row_block)[:, None] * column_block + tl.arange(0, column_block)[None, :]
        parts = parts_ptr + program * (splits * row_block * column_block) + inside
        tl.store(parts + tl.program_id(1) * (row_block * column_block), acc)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        if tl.atomic_add(arrivals_ptr + program, 1, sem="acq_rel") == splits - 1:
            acc = tl.zeros([row_block, column_block], tl.float32)
            for part in range(splits):
                acc += tl.load(parts + part * (row_block * column_block), cache_modifier=".cg")
            tl.store(arrivals_ptr + program, 0)
            _write(
                acc, scales_ptr, bias_ptr, residual_ptr, y_ptr, m, n, rows, filters, out_width, pitch, x_scale,
                inverse_scale, spread, has_scales, has_bias, has_residual, has_rounded, activation,
            )  # fmt: skip


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, y: torch.Tensor,
    rows: int, channels: int, sizes: tuple[int, int, int, int], window: Window, activation: str, tile: Tile,
    scales: torch.Tensor | None = None, x_scale: float = 1.0, out_scale: float = 0.0, spread: int = 1,
    arrivals: torch.Tensor | None = None,
) -> None:  # fmt: skip
    filters, inner_size = weight.shape
    plain = window == Window()
    flat = not plain and channels < 16
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(filters, tile.columns)
    splits = 1 if arrivals is None or flat else tile.splits
    parts = None
    if splits > 1:
        parts = torch.empty(tiles * splits * tile.rows * tile.columns, dtype=torch.float32, device=x.device)
    grid = (tiles, splits)
    _product_kernel[grid](
        x, weight, scales, bias, residual, y, parts, arrivals, rows, filters, channels, inner_size, *sizes,
        y.stride(-1) if spread > 1 else filters, x_scale,
        1.0 / out_scale if out_scale else 0.0,
        *window.kernel, *window.strides, *window.pads, *window.dilations,
        plain=plain, flat=flat, even=channels % tile.inner == 0, spread=spread,
        has_scales=scales is not None, has_bias=bias is not None, has_residual=residual is not None,
        has_rounded=bool(out_scale), activation=place(activation, x.is_cuda),
        row_block=tile.rows, column_block=tile.columns, inner_block=tile.inner, together=8,
        splits=splits,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **early_launch(x.device),
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    tile: Tile,
    scales: torch.Tensor | None = None,
    x_scale: float = 1.0,
    out_scale: float = 0.0,
    out_dtype: torch.dtype | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x [..., K] weightᵀ [N, K] + bias [N] + residual [..., N]), all contiguous.

    A tile that splits the inner dimension needs its `Tile.arrivals`, which no other launch uses at the same time.

    float8 x and weight have scales: `x_scale`, and `scales` [N]; the result is then `out_dtype`, or float8 over
    `out_scale`.
    """
    dtype = fp8.DTYPE if out_scale else out_dtype or x.dtype
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=dtype, device=x.device)
    rows = x.numel() // x.shape[-1]
    if y.numel():
        _launch(
            x, weight, bias, residual, y, rows, x.shape[-1], (1, 1, 1, 1), Window(), activation, tile,
            scales, x_scale, out_scale, arrivals=arrivals,
        )  # fmt: skip
    return y


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    window: Window,
    out_size: tuple[int, int],
    activation: str,
    tile: Tile,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [N, C, H, W] by weight [F, taps * C] (see `pack`) to [N, F, *out_size]; images have channels innermost."""
    n, channels, height, width = x.shape
    filters = weight.shape[0]
    y = torch.empty((n, *out_size, filters), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    if y.numel():
        sizes = (height, width, *out_size)
        rows = n * out_size[0] * out_size[1]
        _launch(
            x, weight, bias, residual, y, rows, channels, sizes, window, activation, tile, arrivals=arrivals
        )  # fmt: skip
    return y


def spread_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, spread: int, tile: Tile,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Transposed convolution whose steps equal its kernel, `spread`: weight [spread² F, C], by place, then filter.

    `out` may be some channels of a larger image [N, G, H spread, W spread], channels innermost.
    """
    n, channels, height, width = x.shape
    filters = weight.shape[0] // spread**2
    y = out
    if y is None:
        y = torch.empty((n, height * spread, width * spread, filters), dtype=x.dtype, device=x.device)
        y = y.permute(0, 3, 1, 2)
    if y.numel():
        sizes = (height, width, height, width)
        _launch(
            x, weight, bias, None, y, n * height * width, channels, sizes, Window(), "", tile, spread=spread
        )  # fmt: skip
    return y


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A convolution's weight [F, C, h, w] as [F, h * w * C], the order in which the kernel reads images."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).contiguous()
