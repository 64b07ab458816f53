"""Depthwise convolution and pooling on images whose channels lie innermost. Bound by memory: reads of a window's pixels
that overlap come from the cache, bias and activation cost no pass of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.graph.gpu.kernels.convolution import Window
from trine.graph.gpu.kernels.epilogue import activate, place
from trine.kernels.triton.device import early_launch, wait_for_inputs


@triton.jit
def _window_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, count, channels, height, width, out_height, out_width,
    kernel_h: tl.constexpr, kernel_w: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    pad_h: tl.constexpr, pad_w: tl.constexpr, dilation_h: tl.constexpr, dilation_w: tl.constexpr,
    depthwise: tl.constexpr, has_bias: tl.constexpr, has_residual: tl.constexpr, activation: tl.constexpr,
    pixel_block: tl.constexpr, channel_block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program (i, j): output pixels i * pixel_block on, channels j * channel_block on; the sum, or else the maximum."""
    c = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    channel_there = c < channels
    pixels = tl.program_id(0) * pixel_block + tl.arange(0, pixel_block)
    pixel_there = pixels < count
    place = pixels % (out_height * out_width)
    image = (pixels // (out_height * out_width)).to(tl.int64) * height * width
    top = place // out_width * stride_h - pad_h
    left = place % out_width * stride_w - pad_w
    wait_for_inputs(early)
    if depthwise:
        acc = tl.zeros([pixel_block, channel_block], tl.float32)
    else:
        acc = tl.full([pixel_block, channel_block], float("-inf"), tl.float32)
    for i in tl.static_range(kernel_h):
        for j in tl.static_range(kernel_w):
            y_in = top + i * dilation_h
            x_in = left + j * dilation_w
            there = pixel_there & (y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width)
            at = x_ptr + (image + y_in * width + x_in)[:, None] * channels + c[None, :]
            if depthwise:
                x = tl.load(at, mask=there[:, None] & channel_there[None, :], other=0.0).to(tl.float32)
                w = tl.load(w_ptr + (i * kernel_w + j) * channels + c, mask=channel_there, other=0.0)
                acc += x * w.to(tl.float32)[None, :]
            else:
                x = tl.load(at, mask=there[:, None] & channel_there[None, :], other=float("-inf"))
                acc = tl.maximum(acc, x.to(tl.float32))
    at = pixels.to(tl.int64)[:, None] * channels + c[None, :]
    there = pixel_there[:, None] & channel_there[None, :]
    if has_bias:
        acc += tl.load(bias_ptr + c, mask=channel_there, other=0.0).to(tl.float32)[None, :]
    if has_residual:
        acc += tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
    acc = activate(acc, activation)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=there)


def _launch(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, residual: torch.Tensor | None,
    window: Window, out_size: tuple[int, int], activation: str, block: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    n, channels, height, width = x.shape
    y = torch.empty((n, *out_size, channels), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    count = n * out_size[0] * out_size[1]
    pixels, across = block[0], min(block[1], max(triton.next_power_of_2(channels), 8))
    if y.numel():
        _window_kernel[(triton.cdiv(count, pixels), triton.cdiv(channels, across))](
            x, weight, bias, residual, y, count, channels, height, width, *out_size,
            *window.kernel, *window.strides, *window.pads, *window.dilations,
            depthwise=weight is not None, has_bias=bias is not None, has_residual=residual is not None,
            activation=place(activation, x.is_cuda), pixel_block=pixels, channel_block=across,
            num_warps=4, **early_launch(x.device),
        )  # fmt: skip
    return y


def depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    window: Window,
    out_size: tuple[int, int],
    activation: str,
    block: tuple[int, int] = (32, 64),
) -> torch.Tensor:
    """x [N, C, H, W] by weight [taps, C], each channel by its own filter: [N, C, *out_size], channels innermost."""
    return _launch(x, weight, bias, residual, window, out_size, activation, block)


def max_pool(
    x: torch.Tensor, window: Window, out_size: tuple[int, int], block: tuple[int, int] = (32, 64)
) -> torch.Tensor:
    """The largest of each window of x [N, C, H, W]: [N, C, *out_size], channels innermost."""
    return _launch(x, None, None, None, window, out_size, "", block)


@triton.jit
def _mean_kernel(x_ptr, y_ptr, pixels, channels, pixel_block: tl.constexpr, channel_block: tl.constexpr,
                 early: tl.constexpr):  # fmt: skip
    """Program (i, j): image i, channels j * channel_block on."""
    wait_for_inputs(early)
    c = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    there = c < channels
    base = tl.program_id(0).to(tl.int64) * pixels
    acc = tl.zeros([pixel_block, channel_block], tl.float32)
    for start in range(0, pixels, pixel_block):
        p = start + tl.arange(0, pixel_block)
        at = x_ptr + (base + p)[:, None] * channels + c[None, :]
        acc += tl.load(at, mask=(p < pixels)[:, None] & there[None, :], other=0.0).to(tl.float32)
    y = tl.sum(acc, 0) / pixels
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * channels + c, y.to(y_ptr.dtype.element_ty), mask=there)


def mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over the pixels of x [N, C, H, W], channels innermost: [N, C, 1, 1]."""
    n, channels, height, width = x.shape
    y = torch.empty((n, channels, 1, 1), dtype=x.dtype, device=x.device)
    if y.numel():
        _mean_kernel[(n, triton.cdiv(channels, 64))](
            x, y, height * width, channels, pixel_block=64, channel_block=64, num_warps=4, **early_launch(x.device)
        )
    return y


@triton.jit
def _finish_kernel(
    y_ptr, bias_ptr, residual_ptr, count, channels, has_bias: tl.constexpr, has_residual: tl.constexpr,
    activation: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(early)
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        y += tl.load(bias_ptr + at % channels, mask=inside, other=0.0).to(tl.float32)
    if has_residual:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, activate(y, activation).to(y_ptr.dtype.element_ty), mask=inside)


def finish_image(
    y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """activation(y + bias [C] + residual) in place of y [N, C, H, W]; both images have channels innermost."""
    if y.numel():
        _finish_kernel[(triton.cdiv(y.numel(), 1024),)](
            y, bias, residual, y.numel(), y.shape[1], has_bias=bias is not None, has_residual=residual is not None,
            activation=place(activation, y.is_cuda), block=1024, num_warps=4, **early_launch(y.device),
        )  # fmt: skip
    return y


@triton.jit
def _copy_kernel(
    x_ptr, y_ptr, pixels, channels, pitch, pixel_block: tl.constexpr, channel_block: tl.constexpr, early: tl.constexpr
):
    wait_for_inputs(early)
    p = tl.program_id(0).to(tl.int64) * pixel_block + tl.arange(0, pixel_block)[:, None]
    for start in range(0, channels, channel_block):
        c = start + tl.arange(0, channel_block)[None, :]
        there = (p < pixels) & (c < channels)
        tl.store(y_ptr + p * pitch + c, tl.load(x_ptr + p * channels + c, mask=there), mask=there)


def copy_image(x: torch.Tensor, y: torch.Tensor) -> None:
    """x [N, C, H, W] to y, which may be some channels of a larger image; channels of both are innermost."""
    n, channels, height, width = x.shape
    pixels, block = n * height * width, min(triton.next_power_of_2(channels), 128)
    if x.numel():
        pixel_block = 4096 // block
        _copy_kernel[(triton.cdiv(pixels, pixel_block),)](
            x, y, pixels, channels, y.stride(-1), pixel_block=pixel_block, channel_block=block, num_warps=4,
            **early_launch(x.device),
        )  # fmt: skip
