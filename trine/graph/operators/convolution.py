"""Convolutions, on any number of spatial dimensions."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trine.graph.operators.algebra import activate
from trine.graph.operators.registry import operator
from trine.graph.operators.room import room_for


def window_pads(
    sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int], pads: list[int] | None, auto_pad: str
) -> list[int]:
    """Padding [begins…, ends…] of a window over `sizes`: `pads`, or what `auto_pad` makes of them."""
    rank = len(sizes)
    if auto_pad in ("NOTSET", ""):
        return [0] * (2 * rank) if pads is None else list(pads)
    if auto_pad == "VALID":
        return [0] * (2 * rank)
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"auto_pad {auto_pad!r}: NOTSET, SAME_UPPER, SAME_LOWER or VALID")
    begins, ends = [], []
    for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        reach = (length - 1) * dilation + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        less = total // 2
        begins.append(less if auto_pad == "SAME_UPPER" else total - less)
        ends.append(total - begins[-1])
    return begins + ends


def pad_spatial(x: Tensor, pads: list[int], value: float = 0) -> Tensor:
    """x [N, C, …] padded with [begins…, ends…]; negative pads cut."""
    if not any(pads):
        return x
    rank = len(pads) // 2
    flat = [amount for axis in reversed(range(rank)) for amount in (pads[axis], pads[axis + rank])]
    return torch.nn.functional.pad(x, flat, value=value)


def convolve(
    x: Tensor, w: Tensor, b: Tensor | None, strides: list[int], pads: list[int], dilations: list[int], group: int
) -> Tensor:
    """torch's convolution where it has one, else a sum over the kernel's places."""
    rank = w.dim() - 2
    if pads[:rank] != pads[rank:] or min(pads, default=0) < 0:
        x, pads = pad_spatial(x, pads), [0] * (2 * rank)
    function = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}.get(rank)
    if function is not None and x.is_floating_point():
        return function(x, w, b, strides, pads[:rank], dilations, group)
    return _convolve_by_places(pad_spatial(x, pads), w, b, strides, dilations, group)


def _convolve_by_places(
    x: Tensor, w: Tensor, b: Tensor | None, strides: list[int], dilations: list[int], group: int
) -> Tensor:
    rank = w.dim() - 2
    sizes = [(x.shape[2 + i] - (w.shape[2 + i] - 1) * dilations[i] - 1) // strides[i] + 1 for i in range(rank)]
    n, filters = x.shape[0], w.shape[0]
    parts = x.reshape(n, group, x.shape[1] // group, *x.shape[2:])
    weights = w.reshape(group, filters // group, *w.shape[1:])
    y = torch.zeros(n, group, filters // group, *sizes, dtype=x.dtype)
    for place in product(*(range(size) for size in w.shape[2:])):
        index = tuple(
            slice(place[i] * dilations[i], place[i] * dilations[i] + (sizes[i] - 1) * strides[i] + 1, strides[i])
            for i in range(rank)
        )
        window: Any = (Ellipsis, *index)
        corner: Any = (Ellipsis, *place)
        y += torch.einsum("ngc...,gfc->ngf...", parts[window], weights[corner])
    y = y.reshape(n, filters, *sizes)
    return y if b is None else y + b.reshape(1, -1, *[1] * rank)


def conv_arguments(
    x: Tensor, w: Tensor, auto_pad: str, dilations: list[int] | None, kernel_shape: list[int] | None,
    pads: list[int] | None, strides: list[int] | None, group: int,
) -> tuple[list[int], list[int], list[int]]:  # fmt: skip
    """Strides, pads and dilations in full; ValueError where shapes do not fit."""
    rank = x.dim() - 2
    kernel = list(w.shape[2:])
    if kernel_shape is not None and list(kernel_shape) != kernel:
        raise ValueError(f"kernel_shape {list(kernel_shape)} is not the weight's {kernel}")
    if w.dim() != x.dim() or x.shape[1] != w.shape[1] * group:
        raise ValueError(f"a weight {list(w.shape)} in {group} groups does not fit an input {list(x.shape)}")
    strides = list(strides or [1] * rank)
    dilations = list(dilations or [1] * rank)
    return strides, window_pads(list(x.shape[2:]), kernel, strides, dilations, pads, auto_pad), dilations


@operator("Conv")
def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    strides, pads, dilations = conv_arguments(x, w, auto_pad, dilations, kernel_shape, pads, strides, group)
    return convolve(x, w, b, strides, pads, dilations, group)


@operator("FusedConv")
def fused_conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "",
    dilations: list[int],
    group: int,
    pads: list[int],
    strides: list[int],
) -> Tensor:
    """Trine's own: activation(conv(x, w, b) + residual)."""
    y = convolve(x, w, b, strides, pads, dilations, group)
    return activate(y if residual is None else y + residual, activation)


@operator("ConvInteger")
def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Exact, in int32. Padding stands for the zero point."""
    wide, weights = x.int(), w.int()
    if x_zero is not None:
        wide = wide - x_zero.int()
    if w_zero is not None:
        weights = weights - w_zero.int().reshape(-1, *[1] * (w.dim() - 1))
    strides, pads, dilations = conv_arguments(x, w, auto_pad, dilations, kernel_shape, pads, strides, group)
    return convolve(wide, weights, None, strides, pads, dilations, group)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """The full transposed convolution, of which `pads` are cut away at both ends."""
    rank = x.dim() - 2
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(w.shape[2:], dilations, strict=True)]
    full = [(x.shape[2 + i] - 1) * strides[i] + reach[i] for i in range(rank)]
    if output_shape is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        output_shape = [x.shape[2 + i] * strides[i] for i in range(rank)]
    if output_shape is not None:
        short = [list(output_shape)[-rank:][i] - full[i] for i in range(rank)]
        extra = [max(short[i], extra[i]) for i in range(rank)]  # what is missing follows the end
        total = [extra[i] - short[i] for i in range(rank)]
        less = [amount // 2 for amount in total]
        more = [amount - half for amount, half in zip(total, less, strict=True)]
        pads = less + more if auto_pad == "SAME_UPPER" else more + less
    elif pads is None or auto_pad == "VALID":
        pads = [0] * (2 * rank)
    function = [
        torch.nn.functional.conv_transpose1d,
        torch.nn.functional.conv_transpose2d,
        torch.nn.functional.conv_transpose3d,
    ]
    if not 1 <= rank <= 3:
        raise ValueError(f"ConvTranspose over {rank} dimensions: 1 to 3 are supported")
    y = function[rank - 1](x, w, None, strides, 0, 0, group, dilations)
    y = pad_spatial(y, [0] * rank + extra)
    y = pad_spatial(y, [-amount for amount in pads])
    return y if b is None else y + b.reshape(1, -1, *[1] * rank)


@operator("DeformConv")
def deform_conv(
    x: Tensor,
    w: Tensor,
    offset: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    offset_group: int = 1,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Each place of the kernel reads, bilinearly, at its own offset (zero outside), times its mask."""
    if x.dim() != 4:
        raise ValueError("DeformConv over other than 2 dimensions is not supported")
    strides, pads, dilations = conv_arguments(x, w, "NOTSET", dilations, kernel_shape, pads, strides, group)
    n, c, height, width = x.shape
    filters, _, kh, kw = w.shape
    oh, ow = offset.shape[2:]
    offsets = offset.reshape(n, offset_group, kh * kw, 2, oh, ow)
    masks = None if mask is None else mask.reshape(n, offset_group, kh * kw, oh, ow)
    rows = (torch.arange(oh) * strides[0] - pads[0])[:, None]
    columns = (torch.arange(ow) * strides[1] - pads[1])[None, :]
    parts = x.reshape(n * offset_group, c // offset_group, height, width)
    sampled = []
    for place, (i, j) in enumerate(product(range(kh), range(kw))):
        ys = (rows + i * dilations[0] + offsets[:, :, place, 0]).reshape(n * offset_group, oh, ow)
        xs = (columns + j * dilations[1] + offsets[:, :, place, 1]).reshape(n * offset_group, oh, ow)
        value = bilinear_at(parts, ys, xs).reshape(n, offset_group, c // offset_group, oh, ow)
        if masks is not None:
            value = value * masks[:, :, place, None]
        sampled.append(value.reshape(n, c, oh, ow))
    patches = torch.stack(sampled, 2).reshape(n, group, c // group * kh * kw, oh * ow)
    weights = w.reshape(group, filters // group, -1)
    y = torch.einsum("gfk,ngkp->ngfp", weights, patches).reshape(n, filters, oh, ow)
    return y if b is None else y + b.reshape(1, -1, 1, 1)


def bilinear_at(x: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """x [N, C, H, W] read at ys, xs [N, h, w] between elements, with zeros around it: [N, C, h, w]."""
    height, width = x.shape[2:]
    top, left = torch.floor(ys), torch.floor(xs)
    result = torch.zeros(x.shape[0], x.shape[1], *ys.shape[1:], dtype=x.dtype)
    for row, column in product((top, top + 1), (left, left + 1)):
        weight = (1 - (ys - row).abs()) * (1 - (xs - column).abs())
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        flat = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
        read = torch.gather(x.flatten(2), 2, flat.reshape(x.shape[0], 1, -1).expand(-1, x.shape[1], -1))
        result += read.reshape(result.shape) * torch.where(inside, weight, torch.zeros(()))[:, None]
    return result


@operator("Col2Im")
def col2im(
    x: Tensor,
    image_shape: Tensor,
    block_shape: Tensor,
    *,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Blocks [N, C * prod(block), L] added into an image [N, C, …] at their places."""
    image, block = [int(s) for s in image_shape], [int(s) for s in block_shape]
    rank = len(image)
    dilations, strides, pads = dilations or [1] * rank, strides or [1] * rank, pads or [0] * 2 * rank
    channels = x.shape[1] // int(np.prod(block))
    padded = [image[i] + pads[i] + pads[i + rank] for i in range(rank)]
    counts = [(padded[i] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1 for i in range(rank)]
    room_for([x.shape[0], channels, *padded], x.dtype)
    blocks = x.reshape(x.shape[0], channels, *block, *counts)
    y = torch.zeros(x.shape[0], channels, *padded, dtype=x.dtype)
    for place in product(*(range(size) for size in block)):
        index = tuple(
            slice(place[i] * dilations[i], place[i] * dilations[i] + (counts[i] - 1) * strides[i] + 1, strides[i])
            for i in range(rank)
        )
        target: Any = (slice(None), slice(None), *index)
        source: Any = (slice(None), slice(None), *place)
        y[target] += blocks[source]
    return pad_spatial(y, [-amount for amount in pads])
