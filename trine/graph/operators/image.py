"""Images and boxes: resize, sample on a grid, regions of interest, non-maximum suppression."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from trine.graph.operators.registry import operator
from trine.graph.operators.room import room_for
from trine.graph.operators.structure import ints


@operator("Resize")
def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """One axis after the other: each output is a weighted sum along the axis, the weights as a matrix."""
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    y = x
    outside: list[tuple[int, Tensor]] = []
    for part in resize_axes(
        tuple(x.shape), roi, scales, sizes, axes, coordinate_transformation_mode, keep_aspect_ratio_policy
    ):
        if crop:
            outside.append((part.axis, (part.places < 0) | (part.places > part.length - 1)))
        if mode == "nearest":
            y = y.index_select(part.axis, part.nearest(nearest_mode))
        else:
            weights = part.weights(mode, cubic_coeff_a, bool(exclude_outside), bool(antialias))
            moved = y.movedim(part.axis, -1)
            y = torch.matmul(moved.to(torch.float64), weights.T).movedim(-1, part.axis)
    y = _saturate(y, x.dtype)
    for axis, mask in outside:
        shape = [1] * x.dim()
        shape[axis] = -1
        y = torch.where(mask.reshape(shape), torch.tensor(extrapolation_value, dtype=y.dtype), y)
    return y


@dataclass(frozen=True)
class ResizedAxis:
    """One axis of a Resize: where in the input, `length` long, each output element lies."""

    axis: int
    length: int
    factor: float
    places: Tensor

    def nearest(self, mode: str) -> Tensor:
        """The input element for each output element, int64."""
        return _nearest(self.places, mode).clamp(0, self.length - 1)

    def weights(self, mode: str, cubic_a: float, exclude_outside: bool, antialias: bool) -> Tensor:
        """[outputs, length] in float64: what each input element gives to each output element."""
        return _weights(self.places, self.length, self.factor, mode, cubic_a, exclude_outside, antialias)


def resize_axes(
    shape: tuple[int, ...],
    roi: Tensor | None,
    scales: Tensor | None,
    sizes: Tensor | None,
    axes: list[int] | None,
    coordinates: str,
    policy: str,
) -> list[ResizedAxis]:
    """The axes that a Resize of an input of this shape changes."""
    along = list(range(len(shape))) if axes is None else [axis % len(shape) for axis in axes]
    lengths = [shape[axis] for axis in along]
    if sizes is not None and sizes.numel():
        wanted, factors = _from_sizes(lengths, ints(sizes), policy)
    elif scales is not None and scales.numel():
        factors = [float(scale) for scale in scales.double()]
        wanted = [int(np.floor(np.float64(length) * factor)) for length, factor in zip(lengths, factors, strict=True)]
    else:
        raise ValueError("Resize needs scales or sizes")
    final = dict(zip(along, wanted, strict=True))
    room_for([final.get(axis, size) for axis, size in enumerate(shape)])
    window = [0.0] * len(along) + [1.0] * len(along) if roi is None or not roi.numel() else roi.tolist()
    result = []
    for i, axis in enumerate(along):
        if wanted[i] == lengths[i] and factors[i] == 1 and coordinates != "tf_crop_and_resize":
            continue
        span = (window[i], window[i + len(along)])
        places = _source_places(coordinates, lengths[i], wanted[i], factors[i], span)
        result.append(ResizedAxis(axis, lengths[i], factors[i], places))
    return result


def _saturate(y: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point or y.dtype == dtype:
        return y.to(dtype)
    info = torch.iinfo(dtype)
    return torch.round(y).clamp(info.min, info.max).to(dtype)


def _from_sizes(lengths: list[int], sizes: list[int], policy: str) -> tuple[list[int], list[float]]:
    factors = [size / length for size, length in zip(sizes, lengths, strict=True)]
    if policy == "stretch":
        return sizes, factors
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [int(factor * length + 0.5) for length in lengths], [factor] * len(lengths)


def _source_places(mode: str, length: int, wanted: int, scale: float, span: tuple[float, float]) -> Tensor:
    """Where in the input each output element lies."""
    i = torch.arange(wanted, dtype=torch.float64)
    if mode == "asymmetric":
        return i / scale
    if mode == "align_corners":
        span_out = length * scale - 1  # of the length before it is cut to a whole number
        return i * (length - 1) / span_out if wanted > 1 else torch.zeros(wanted, dtype=torch.float64)
    if mode == "pytorch_half_pixel":
        return (i + 0.5) / scale - 0.5 if wanted > 1 else torch.zeros(wanted, dtype=torch.float64)
    if mode == "half_pixel_symmetric":
        adjustment = wanted / (scale * length)
        offset = length / 2 * (1 - adjustment)
        return offset + (i + 0.5) / scale - 0.5
    if mode == "tf_crop_and_resize":
        start, end = span
        if wanted > 1:
            return start * (length - 1) + i * (end - start) * (length - 1) / (wanted - 1)
        return torch.full((wanted,), 0.5 * (start + end) * (length - 1), dtype=torch.float64)
    if mode == "half_pixel":
        return (i + 0.5) / scale - 0.5
    if mode == "tf_half_pixel_for_nn":
        return (i + 0.5) / scale
    raise ValueError(f"Resize has no coordinate_transformation_mode {mode!r}")


def _nearest(places: Tensor, mode: str) -> Tensor:
    functions = {
        "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
        "floor": torch.floor,
        "ceil": torch.ceil,
    }
    if mode not in functions:
        raise ValueError(f"Resize has no nearest_mode {mode!r}")
    return functions[mode](places).long()


def _weights(
    places: Tensor, length: int, scale: float, mode: str, a: float, exclude_outside: bool, antialias: bool
) -> Tensor:
    """[outputs, length]: what each input element gives to each output element."""
    stretch = max(1.0, 1 / scale) if antialias else 1.0
    reach = (1 if mode == "linear" else 2) * stretch
    start = torch.floor(places - reach).long()
    count = int(np.ceil(2 * reach)) + 2
    index = start[:, None] + torch.arange(count)[None, :]
    distance = (index - places[:, None]).abs() / stretch
    if mode == "linear":
        weights = (1 - distance).clamp(min=0)
    elif mode == "cubic":
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
    else:
        raise ValueError(f"Resize has no mode {mode!r}: nearest, linear, cubic")
    inside = (index >= 0) & (index < length)
    if exclude_outside:
        weights = torch.where(inside, weights, torch.zeros_like(weights))
    if exclude_outside or antialias:
        weights = weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros(len(places), length, dtype=torch.float64)
    return matrix.scatter_add(1, index.clamp(0, length - 1), weights)


@operator("GridSample")
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """x [N, C, D1…] read at grid [N, d1…, rank], whose coordinates run from -1 to 1, the last axis first."""
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    if grid.dtype != x.dtype and grid.is_floating_point():
        grid = grid.to(torch.promote_types(grid.dtype, x.dtype))
    rank = x.dim() - 2
    sizes = list(x.shape[2:])
    places = []
    for axis, size in enumerate(sizes):
        g = grid[..., rank - 1 - axis]
        places.append((g + 1) / 2 * (size - 1) if align_corners else ((g + 1) * size - 1) / 2)
    if mode == "nearest":
        corners = [
            [(torch.round(_fold(p, s, padding_mode, align_corners)), torch.ones_like(p))]
            for p, s in zip(places, sizes, strict=True)
        ]
    elif mode == "linear":
        folded = [_fold(p, s, padding_mode, align_corners) for p, s in zip(places, sizes, strict=True)]
        corners = [
            [(torch.floor(p), 1 - (p - torch.floor(p))), (torch.floor(p) + 1, p - torch.floor(p))] for p in folded
        ]
    elif mode == "cubic":
        corners = [_cubic_corners(p) for p in places]
    else:
        raise ValueError(f"GridSample has no mode {mode!r}")
    y = torch.zeros(*x.shape[:2], *grid.shape[1:-1], dtype=torch.promote_types(x.dtype, grid.dtype))
    for corner in product(*corners):
        weight = torch.ones_like(places[0])
        flat = torch.zeros_like(places[0], dtype=torch.int64)
        for (place, part), size in zip(corner, sizes, strict=True):
            index = _fold(place, size, padding_mode, align_corners) if mode == "cubic" else place
            weight = weight * part * ((index >= 0) & (index <= size - 1))
            flat = flat * size + index.clamp(0, size - 1).round().long()
        read = torch.gather(x.flatten(2), 2, flat.reshape(x.shape[0], 1, -1).expand(-1, x.shape[1], -1))
        y += read.reshape(y.shape) * weight[:, None]
    return y.to(x.dtype)


def _fold(places: Tensor, size: int, padding_mode: str, align_corners: int) -> Tensor:
    if padding_mode == "zeros":
        return places
    if padding_mode == "border":
        return places.clamp(0, size - 1)
    if padding_mode != "reflection":
        raise ValueError(f"GridSample has no padding_mode {padding_mode!r}")
    low, high = (0.0, size - 1.0) if align_corners else (-0.5, size - 0.5)
    width = high - low
    if width == 0:
        return torch.zeros_like(places)
    offset = (places - low).abs() % (2 * width)
    return (low + torch.where(offset > width, 2 * width - offset, offset)).clamp(0, size - 1)


def _cubic_corners(places: Tensor) -> list[tuple[Tensor, Tensor]]:
    a = -0.75
    base = torch.floor(places)
    corners = []
    for step in (-1, 0, 1, 2):
        d = (places - (base + step)).abs()
        near = ((a + 2) * d - (a + 3)) * d**2 + 1
        far = a * (((d - 5) * d + 8) * d - 4)
        corners.append((base + step, torch.where(d <= 1, near, far)))
    return corners


@operator("AffineGrid")
def affine_grid(theta: Tensor, size: Tensor, *, align_corners: int = 0) -> Tensor:
    """theta [N, rank, rank + 1] applied to the coordinates of an image of `size` [N, C, …]."""
    spatial = ints(size)[2:]
    room_for([*spatial, len(spatial) + 1], torch.float64)
    axes = []
    for length in spatial:
        if align_corners:
            axes.append(
                torch.linspace(-1, 1, length, dtype=theta.dtype) if length > 1 else torch.zeros(1, dtype=theta.dtype)
            )
        else:
            axes.append((2 * torch.arange(length, dtype=theta.dtype) + 1) / length - 1)
    mesh = torch.meshgrid(*axes, indexing="ij")
    points = torch.stack([*reversed(mesh), torch.ones_like(mesh[0])], -1)
    return torch.einsum("...k,nrk->n...r", points, theta)


@operator("RoiAlign")
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Each region cut into bins; each bin the mean (or maximum) of bilinear samples in it."""
    half = coordinate_transformation_mode == "half_pixel"
    results = [
        _align_one(
            x[int(image)],
            roi * spatial_scale - (0.5 if half else 0),
            half,
            mode,
            output_height,
            output_width,
            sampling_ratio,
        )
        for roi, image in zip(rois, batch_indices, strict=True)
    ]
    return torch.stack(results) if results else x.new_zeros(0, x.shape[1], output_height, output_width)


def _align_one(x: Tensor, roi: Tensor, half: bool, mode: str, rows: int, columns: int, ratio: int) -> Tensor:
    x1, y1, x2, y2 = (float(corner) for corner in roi)
    width, height = x2 - x1, y2 - y1
    if not half:
        width, height = max(width, 1.0), max(height, 1.0)
    counts = [ratio or int(np.ceil(height / rows)), ratio or int(np.ceil(width / columns))]
    ys = y1 + (torch.arange(rows * counts[0], dtype=x.dtype) + 0.5) * (height / rows / max(counts[0], 1))
    xs = x1 + (torch.arange(columns * counts[1], dtype=x.dtype) + 0.5) * (width / columns / max(counts[1], 1))
    (top, bottom, wt, wb), (left, right, wl, wr) = _neighbours(ys, x.shape[1]), _neighbours(xs, x.shape[2])
    corners = [
        (top, left, wt[:, None] * wl),
        (top, right, wt[:, None] * wr),
        (bottom, left, wb[:, None] * wl),
        (bottom, right, wb[:, None] * wr),
    ]
    parts = [x[:, row][:, :, column] * weight for row, column, weight in corners]
    # The maximum is taken over the weighted corners, as the operator's first implementation had it.
    samples = torch.stack(parts).amax(0) if mode == "max" else sum(parts)
    assert isinstance(samples, Tensor)
    bins = samples.reshape(x.shape[0], rows, counts[0], columns, counts[1])
    return bins.amax((2, 4)) if mode == "max" else bins.sum((2, 4)) / max(counts[0] * counts[1], 1)


def _neighbours(places: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inside = ((places >= -1) & (places <= size)).to(places.dtype)
    held = places.clamp(min=0)
    low = held.long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    fraction = torch.where(low >= size - 1, torch.zeros_like(held), held - low)
    return low, high, (1 - fraction) * inside, fraction * inside


@operator("NonMaxSuppression")
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Tensor | None = None,
    iou_threshold: Tensor | None = None,
    score_threshold: Tensor | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Indices [selected, 3] of image, class and box: the best first, none that overlaps a better one too much."""
    limit = 0 if max_output_boxes_per_class is None else int(max_output_boxes_per_class)
    overlap = 0.0 if iou_threshold is None else float(iou_threshold)
    least = None if score_threshold is None else float(score_threshold)
    if center_point_box:
        middle, extent = boxes[..., :2], boxes[..., 2:] / 2
        corners = torch.cat([middle - extent, middle + extent], -1)
    else:
        corners = torch.cat(
            [torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])], -1
        )
    selected: list[list[int]] = []
    for image, kind in product(range(scores.shape[0]), range(scores.shape[1])):
        row = scores[image, kind]
        order = torch.sort(row, dim=0, descending=True, stable=True).indices.tolist()
        kept: list[int] = []
        for box in order:
            if len(kept) >= limit or (least is not None and float(row[box]) <= least):
                break
            if all(_iou(corners[image, box], corners[image, other]) <= overlap for other in kept):
                kept.append(box)
        selected += [[image, kind, box] for box in kept]
    return torch.tensor(selected, dtype=torch.int64).reshape(-1, 3)


def _iou(a: Tensor, b: Tensor) -> float:
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    shared = float(sides.prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - shared
    return shared / union if union > 0 else 0.0
