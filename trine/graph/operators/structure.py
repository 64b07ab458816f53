"""Shapes and the places of elements: reshape, transpose, slice, join, pad, repeat."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trine.graph.dtypes import from_onnx
from trine.graph.operators.registry import operator
from trine.graph.operators.room import room_for


def ints(x: Tensor) -> list[int]:
    """A 1-d integer tensor's (or a scalar's) numbers."""
    return [int(number) for number in x.reshape(-1).tolist()]


@operator("Shape")
def shape(x: Any, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(
        list(x.shape)[slice(_clamp(start, x.ndim), _clamp(x.ndim if end is None else end, x.ndim))], dtype=torch.int64
    )


def _clamp(position: int, rank: int) -> int:
    return min(max(position + rank if position < 0 else position, 0), rank)


@operator("Size")
def size(x: Any) -> Tensor:
    return torch.tensor(int(np.prod(x.shape, dtype=np.int64)), dtype=torch.int64)


@operator("Reshape")
def reshape(x: Any, shape: Tensor, *, allowzero: int = 0) -> Any:
    """0 keeps the dimension (unless allowzero), -1 stands for what is left."""
    wanted = ints(shape)
    if not allowzero:
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    if -1 in wanted and 0 in wanted:
        rest = int(np.prod([size for size in wanted if size != -1], dtype=np.int64))
        raise ValueError(f"Reshape to {wanted}: with {rest} other elements -1 could be anything")
    return x.reshape(wanted)


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    rows = int(np.prod(x.shape[:axis], dtype=np.int64))
    columns = int(np.prod(x.shape[axis:], dtype=np.int64))
    return x.reshape(rows, columns)


@operator("Squeeze")
def squeeze(x: Any, axes: Tensor | None = None) -> Any:
    if axes is None:
        return x.reshape([size for size in x.shape if size != 1])
    gone = {axis % x.ndim for axis in ints(axes)}
    wrong = [axis for axis in gone if x.shape[axis] != 1]
    if wrong:
        raise ValueError(f"Squeeze of axis {wrong[0]}, which has {x.shape[wrong[0]]} elements")
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone])


@operator("Unsqueeze")
def unsqueeze(x: Any, axes: Tensor) -> Any:
    rank = x.ndim + axes.numel()
    new = {axis + rank if axis < 0 else axis for axis in ints(axes)}
    if len(new) != axes.numel() or not all(0 <= axis < rank for axis in new):
        raise ValueError(f"Unsqueeze of axes {ints(axes)} to rank {rank}")
    old = iter(x.shape)
    return x.reshape([1 if axis in new else next(old) for axis in range(rank)])


@operator("Transpose")
def transpose(x: Any, *, perm: list[int] | None = None) -> Any:
    order = list(reversed(range(x.ndim))) if perm is None else perm
    return x.transpose(order) if isinstance(x, np.ndarray) else x.permute(order)


@operator("Concat")
def concat(*inputs: Any, axis: int) -> Any:
    if isinstance(inputs[0], np.ndarray):
        return np.concatenate(inputs, axis)
    rank = inputs[0].dim()
    for x in inputs[1:]:
        if x.dim() != rank:  # torch lets empty vectors pass
            raise ValueError(f"Concat of tensors with {rank} and {x.dim()} dimensions")
    return torch.cat(inputs, axis)


@operator("Split")
def split(
    x: Tensor, split: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None, _outputs: int = 1
) -> tuple[Tensor, ...]:
    """Without sizes, parts are equal but the last, which may be smaller."""
    length = x.shape[axis]
    if split is not None:
        sizes = ints(split)
    else:
        count = num_outputs or _outputs
        part = -(-length // count)
        sizes = [max(min(part, length - i * part), 0) for i in range(count)]
    return torch.split(x, sizes, axis)


@operator("Slice")
def slice_(x: Any, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Any:
    first, last = ints(starts), ints(ends)
    along = list(range(len(first))) if axes is None else [axis % x.ndim for axis in ints(axes)]
    stride = [1] * len(first) if steps is None else ints(steps)
    index: list[slice] = [slice(None)] * x.ndim
    flips: list[int] = []
    for axis, start, end, step in zip(along, first, last, stride, strict=True):
        if step == 0:
            raise ValueError("Slice with a step of 0")
        start, end, step = slice(start, end, step).indices(x.shape[axis])
        if step < 0 and not isinstance(x, np.ndarray):  # torch has no negative steps: take it forwards, then turn it
            count = max(0, -(-(start - end) // -step))
            start, end, step = start + (count - 1) * step, start + 1, -step
            if count == 0:
                start, end = 0, 0
            flips.append(axis)
        index[axis] = slice(start, None if end < 0 else end, step)
    result = x[tuple(index)]
    return result.flip(flips) if flips else result


@operator("Expand")
def expand(x: Tensor, shape: Tensor) -> Tensor:
    """Both ways: a 1 in `shape` keeps the tensor's own dimension."""
    wanted = np.broadcast_shapes(tuple(x.shape), tuple(ints(shape)))  # torch's own imports sympy: seconds
    room_for(wanted, x.dtype)
    return x.expand(wanted)


@operator("Tile")
def tile(x: Any, repeats: Tensor) -> Any:
    times = ints(repeats)
    room_for([size * count for size, count in zip(x.shape, times, strict=True)])
    return np.tile(x, times) if isinstance(x, np.ndarray) else x.repeat(times)


@operator("Pad")
def pad(
    x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *, mode: str = "constant"
) -> Tensor:
    """Negative pads cut. Modes: constant, reflect, edge, wrap."""
    amounts = ints(pads)
    along = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in ints(axes)]
    before = dict(zip(along, amounts[: len(along)], strict=True))
    after = dict(zip(along, amounts[len(along) :], strict=True))
    room_for([x.shape[axis] + max(before.get(axis, 0), 0) + max(after.get(axis, 0), 0) for axis in range(x.dim())])
    for axis in along:  # cuts first
        start, stop = max(-before[axis], 0), x.shape[axis] - max(-after[axis], 0)
        x = x.narrow(axis, min(start, x.shape[axis]), max(stop - start, 0))
    if mode == "constant":
        flat = [
            max(amount, 0) for axis in reversed(range(x.dim())) for amount in (before.get(axis, 0), after.get(axis, 0))
        ]
        fill = 0 if value is None or value.numel() == 0 else value.reshape(()).item()
        if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
            width = [(max(before.get(a, 0), 0), max(after.get(a, 0), 0)) for a in range(x.dim())]
            return torch.from_numpy(np.pad(x.numpy(), width, constant_values=fill))
        return torch.nn.functional.pad(x, flat, value=fill)
    for axis in along:
        x = x.index_select(axis, _padding_indices(x.shape[axis], max(before[axis], 0), max(after[axis], 0), mode))
    return x


def _padding_indices(length: int, before: int, after: int, mode: str) -> Tensor:
    positions = torch.arange(-before, length + after)
    if mode == "edge":
        return positions.clamp(0, length - 1)
    if mode == "wrap":
        return positions % length
    if mode != "reflect":
        raise ValueError(f"Pad has no mode {mode!r}: constant, reflect, edge, wrap")
    period = max(2 * (length - 1), 1)
    positions = positions % period
    return torch.where(positions >= length, period - positions, positions)


@operator("ConstantOfShape")
def constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    room_for(ints(shape), torch.float32 if value is None else value.dtype)
    if value is None:
        return torch.zeros(ints(shape))
    return value.reshape(()).expand(ints(shape)).clone()


@operator("Range")
def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = start.item(), limit.item(), delta.item()
    count = max(int(np.ceil((last - first) / step)), 0)
    room_for([count], torch.float64)
    if start.dtype.is_floating_point:
        return (first + torch.arange(count, dtype=torch.float64) * step).to(start.dtype)
    return (first + torch.arange(count, dtype=torch.int64) * step).to(start.dtype)


@operator("EyeLike")
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    rows, columns = x.shape
    chosen = None if dtype is None else from_onnx(dtype)
    ones = torch.arange(columns)[None, :] - torch.arange(rows)[:, None] == k
    return ones.to(x.dtype if chosen is None else chosen.torch)


@operator("Trilu")
def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@operator("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        y = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // b**2, h * b, w * b)


@operator("CenterCropPad")
def center_crop_pad(x: Tensor, shape: Tensor, *, axes: list[int] | None = None) -> Tensor:
    """Cut, or padded with zeros, around the middle to `shape` along `axes`; an odd rest goes to the end."""
    along = range(x.dim()) if axes is None else [axis % x.dim() for axis in axes]
    for axis, wanted in zip(along, ints(shape), strict=True):
        room_for([*x.shape[:axis], wanted, *x.shape[axis + 1 :]], x.dtype)
        length = x.shape[axis]
        if wanted <= length:
            x = x.narrow(axis, (length - wanted) // 2, wanted)
        else:
            front = (wanted - length) // 2
            flat = [0, 0] * (x.dim() - 1 - axis) + [front, wanted - length - front]
            x = torch.nn.functional.pad(x, flat)
    return x


@operator("ReverseSequence")
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    y = x.movedim((batch_axis, time_axis), (0, 1)).clone()
    for row, length in enumerate(ints(lengths)):
        y[row, :length] = y[row, :length].flip(0)
    return y.movedim((0, 1), (batch_axis, time_axis))
