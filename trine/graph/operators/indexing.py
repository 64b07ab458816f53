"""Reading and writing by index: gather, scatter, one-hot, non-zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trine.graph.operators.elementwise import add, maximum, minimum, mul
from trine.graph.operators.registry import operator
from trine.graph.operators.room import room_for
from trine.graph.operators.structure import ints


def _wrap(indices: Tensor, length: int) -> Tensor:
    """Negative indices count from the end; one out of range is an IndexError, never a wrong read."""
    indices = indices.long()
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < -length or high >= length:
            raise IndexError(f"index {low if low < -length else high} is out of range for {length} elements")
        if low < 0:
            indices = torch.where(indices < 0, indices + length, indices)
    return indices


@operator("Gather")
def gather(x: Any, indices: Tensor, *, axis: int = 0) -> Any:
    axis = axis % x.ndim
    wrapped = _wrap(indices, x.shape[axis])
    if isinstance(x, np.ndarray):
        return np.take(x, wrapped.numpy(), axis)
    flat = x.index_select(axis, wrapped.reshape(-1))
    return flat.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@operator("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _wrap(indices, x.shape[axis]))


@operator("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    depth = indices.shape[-1]
    batch = x.shape[:batch_dims]
    index = [_wrap(indices[..., i], x.shape[batch_dims + i]) for i in range(depth)]
    for i, size in enumerate(batch):
        shape = [1] * (indices.dim() - 1)
        shape[i] = size
        index.insert(i, torch.arange(size).reshape(shape))
    return x[tuple(index)] if index else x.clone()


_REDUCTIONS = {"add": add, "mul": mul, "max": maximum, "min": minimum}


@operator("ScatterElements")
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    wrapped = _wrap(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, wrapped, updates)
    kind = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return x.scatter_reduce(axis, wrapped, updates, kind)


@operator("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    depth = indices.shape[-1]
    places = indices.reshape(-1, depth)
    index = tuple(_wrap(places[:, i], x.shape[i]) for i in range(depth))
    values = updates.reshape(places.shape[0], *x.shape[depth:])
    y = x.clone()
    if reduction == "none":
        y[index] = values
        return y
    combine = _REDUCTIONS[reduction]
    for row in range(places.shape[0]):  # equal places meet one after the other
        place = tuple(int(part[row]) for part in index)
        y[place] = combine(y[place], values[row])
    return y


@operator("TensorScatter")
def tensor_scatter(
    past: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """`update` written along `axis` from write_indices[b] on for row b; "circular" wraps round the end."""
    axis = axis % past.dim()
    count, length = update.shape[axis], past.shape[axis]
    y = past.clone().movedim(axis, 1)
    source = update.movedim(axis, 1)
    starts = [0] * past.shape[0] if write_indices is None else ints(write_indices)
    for row, start in enumerate(starts):
        places = torch.arange(start, start + count)
        y[row, places % length if mode == "circular" else _wrap(places, length)] = source[row]
    return y.movedim(1, axis)


@operator("OneHot")
def one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """values = [off, on]; an index outside [-depth, depth) gives a row of `off`."""
    count = int(depth.reshape(-1)[0])
    room_for([*indices.shape, count], values.dtype)
    whole = indices.long()
    whole = torch.where(whole < 0, whole + count, whole)
    place = axis % (indices.dim() + 1)
    shape = [1] * (indices.dim() + 1)
    shape[place] = count
    hit = whole.unsqueeze(place) == torch.arange(count).reshape(shape)
    return torch.where(hit, values[1], values[0])


@operator("NonZero")
def non_zero(x: Tensor) -> Tensor:
    """[rank, count]; a scalar counts as one element of a vector without dimensions."""
    if x.dim() == 0:
        return torch.zeros(0, int(x != 0), dtype=torch.int64)
    return torch.nonzero(x).T.contiguous()


@operator("Compress")
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    if axis is None:
        x, axis = x.reshape(-1), 0
    places = torch.nonzero(condition).reshape(-1)
    return x.index_select(axis, _wrap(places, x.shape[axis]))
