"""Pooling windows, on any number of spatial dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.graph.operators.convolution import pad_spatial, window_pads
from trine.graph.operators.registry import operator
from trine.graph.operators.room import room_for
from trine.graph.operators.structure import ints


def _windows(
    x: Tensor, kernel: list[int], strides: list[int], dilations: list[int], pads: list[int], ceil_mode: int, fill: float
) -> Tensor:
    """x [N, C, …] as [N, C, out…, kernel…] (a view of x padded with `fill`)."""
    rank = len(kernel)
    ends = list(pads[rank:])
    counts = []
    for i in range(rank):
        reach = (kernel[i] - 1) * dilations[i] + 1
        space = x.shape[2 + i] + pads[i] + pads[rank + i] - reach
        count = (-(-space // strides[i]) if ceil_mode else space // strides[i]) + 1
        if ceil_mode and (count - 1) * strides[i] >= x.shape[2 + i] + pads[i]:
            count -= 1  # a window must not begin in the padding after the end
        counts.append(count)
        ends[i] = max(ends[i], (count - 1) * strides[i] + reach - x.shape[2 + i] - pads[i])
    padded = pad_spatial(x, list(pads[:rank]) + ends, fill)
    if min(counts) <= 0:
        raise ValueError(f"a pooling window {kernel} is larger than its padded input {list(x.shape[2:])}")
    step = padded.stride()
    return padded.as_strided(
        (*x.shape[:2], *counts, *kernel),
        (
            *step[:2],
            *(step[2 + i] * strides[i] for i in range(rank)),
            *(step[2 + i] * dilations[i] for i in range(rank)),
        ),
    )


def _arguments(
    x: Tensor,
    kernel: list[int],
    strides: list[int] | None,
    dilations: list[int] | None,
    pads: list[int] | None,
    auto: str,
) -> tuple[list[int], list[int], list[int]]:
    rank = len(kernel)
    if x.dim() != rank + 2:
        raise ValueError(f"a kernel {kernel} does not fit an input {list(x.shape)}")
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    return strides, dilations, window_pads(list(x.shape[2:]), kernel, strides, dilations, pads, auto)


@operator("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Padding counts in the divisor only with count_include_pad, and what ceil_mode adds never does."""
    strides, dilations, pads = _arguments(x, kernel_shape, strides, dilations, pads, auto_pad)
    rank = len(kernel_shape)
    over = list(range(-rank, 0))
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    if count_include_pad:
        ones = pad_spatial(ones, pads, 1)
        weights = _windows_after_padding(ones, x, kernel_shape, strides, dilations, pads, ceil_mode)
    else:
        weights = _windows(ones, kernel_shape, strides, dilations, pads, ceil_mode, 0)
    sums = _windows(x, kernel_shape, strides, dilations, pads, ceil_mode, 0).sum(over)
    return sums / weights.sum(over)


def _windows_after_padding(
    ones: Tensor,
    x: Tensor,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    pads: list[int],
    ceil_mode: int,
) -> Tensor:
    """The windows over `ones`, which has the padding already, as many as over x."""
    windows = _windows(x[:1, :1], kernel, strides, dilations, pads, ceil_mode, 0)
    rank = len(kernel)
    counts = windows.shape[2 : 2 + rank]
    needed = [(counts[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 for i in range(rank)]
    ends = [max(needed[i] - ones.shape[2 + i], 0) for i in range(rank)]
    padded = pad_spatial(ones, [0] * rank + ends)
    step = padded.stride()
    spatial = [step[2 + i] * strides[i] for i in range(rank)] + [step[2 + i] * dilations[i] for i in range(rank)]
    return padded.as_strided((1, 1, *counts, *kernel), (*step[:2], *spatial))


@operator("MaxPool")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
    _outputs: int = 1,
) -> Any:
    """Second output: the place of each maximum in the whole input, flattened by rows (or columns: storage_order=1)."""
    strides, dilations, pads = _arguments(x, kernel_shape, strides, dilations, pads, auto_pad)
    rank = len(kernel_shape)
    wide = x if x.is_floating_point() else x.double()
    windows = _windows(wide, kernel_shape, strides, dilations, pads, ceil_mode, float("-inf"))
    flat = windows.reshape(*windows.shape[: 2 + rank], -1)
    if _outputs == 1:
        return flat.amax(-1).to(x.dtype)
    values, inside = flat.max(-1)
    return values.to(x.dtype), _places(inside, x, kernel_shape, strides, dilations, pads, storage_order)


def _places(
    inside: Tensor, x: Tensor, kernel: list[int], strides: list[int], dilations: list[int], pads: list[int], order: int
) -> Tensor:
    """Index in flattened x of the element `inside` each window."""
    rank = len(kernel)
    sizes = list(x.shape[2:])
    coordinates: list[Tensor] = []
    rest = inside
    for i in reversed(range(rank)):
        offset = rest % kernel[i]
        rest = rest // kernel[i]
        start = torch.arange(inside.shape[2 + i]) * strides[i] - pads[i]
        coordinates.insert(0, offset * dilations[i] + start.reshape(-1, *[1] * (rank - 1 - i)))
    flat = torch.zeros_like(inside)
    axes = range(rank) if order == 0 else reversed(range(rank))
    for i in axes:
        flat = flat * sizes[i] + coordinates[i]
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * rank)
    total = 1
    for size in sizes:
        total *= size
    return flat + planes * total


@operator("LpPool")
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    p: float = 2,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    strides, dilations, pads = _arguments(x, kernel_shape, strides, dilations, pads, auto_pad)
    windows = _windows(x, kernel_shape, strides, dilations, pads, ceil_mode, 0)
    return (windows.abs() ** p).sum(list(range(-len(kernel_shape), 0))) ** (1 / p)


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: float = 2) -> Tensor:
    return (x.abs() ** p).sum(list(range(2, x.dim())), keepdim=True) ** (1 / p)


@operator("MaxUnpool")
def max_unpool(
    x: Tensor,
    places: Tensor,
    output_shape: Tensor | None = None,
    *,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """`places` count in the shape that pooling started from: the natural one, which output_shape may enlarge."""
    rank = len(kernel_shape)
    strides, pads = strides or [1] * rank, pads or [0] * 2 * rank
    sizes = [(x.shape[2 + i] - 1) * strides[i] + kernel_shape[i] - pads[i] - pads[rank + i] for i in range(rank)]
    room_for([*x.shape[:2], *sizes], x.dtype)
    flat = torch.zeros(x.shape[0] * x.shape[1] * int(torch.tensor(sizes).prod()), dtype=x.dtype)
    flat[places.reshape(-1)] = x.reshape(-1)
    y = flat.reshape(*x.shape[:2], *sizes)
    if output_shape is None:
        return y
    return pad_spatial(y, [0] * rank + [ints(output_shape)[2 + i] - sizes[i] for i in range(rank)])


@operator("MaxRoiPool")
def max_roi_pool(x: Tensor, rois: Tensor, *, pooled_shape: list[int], spatial_scale: float = 1.0) -> Tensor:
    """Each region [image, x1, y1, x2, y2] cut into pooled_shape bins, the largest of each; an empty bin gives 0."""
    height, width = x.shape[2:]
    results = []
    for roi in rois:
        image, (x1, y1, x2, y2) = int(roi[0]), [round(float(c) * spatial_scale) for c in roi[1:]]
        bins = torch.zeros(x.shape[1], *pooled_shape, dtype=x.dtype)
        bh, bw = max(y2 - y1 + 1, 1) / pooled_shape[0], max(x2 - x1 + 1, 1) / pooled_shape[1]
        for i in range(pooled_shape[0]):
            top, bottom = int(i * bh // 1) + y1, -int(-(i + 1) * bh // 1) + y1
            for j in range(pooled_shape[1]):
                left, right = int(j * bw // 1) + x1, -int(-(j + 1) * bw // 1) + x1
                part = x[image, :, max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
                if part.numel():
                    bins[:, i, j] = part.amax((1, 2))
        results.append(bins)
    return torch.stack(results) if results else torch.zeros(0, x.shape[1], *pooled_shape, dtype=x.dtype)
