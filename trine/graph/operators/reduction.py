"""Reductions over axes, running sums, arg-reductions, sorting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trine.graph.operators.registry import operator


def _axes(x: Tensor, axes: Tensor | None, noop: int) -> list[int] | None:
    """The axes to reduce; None for none of them (an empty list of axes with noop)."""
    if axes is None or axes.numel() == 0:
        return None if noop else list(range(x.dim()))
    return sorted({int(axis) % x.dim() for axis in axes.tolist()})


def _reduction(
    name: str, reduce: Callable[[Tensor, list[int], bool], Tensor], before: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Register a reduction; `before` is what it does to each element even where no axis is reduced."""

    def apply(data: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        chosen = _axes(data, axes, noop_with_empty_axes)
        if chosen is None:
            return data if before is None else before(data)
        if not chosen:  # a scalar
            return reduce(data.reshape(1), [0], False).to(data.dtype).reshape(())
        return reduce(data, chosen, bool(keepdims)).to(data.dtype)

    apply.__doc__ = f"ONNX {name}; `axes` defaults to all."
    operator(name)(apply)


def _accumulator(x: Tensor) -> Tensor:
    """Half floats are summed in float32; integers in int64."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x if x.is_floating_point() or x.is_complex() else x.long()


def _extreme(largest: bool) -> Callable[[Tensor, list[int], bool], Tensor]:
    def reduce(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
        if any(x.shape[axis] == 0 for axis in axes):
            kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
            full = torch.full(kept, _bound(x.dtype, not largest), dtype=x.dtype)
            return full if keepdims else full.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])
        if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
            array = (np.amax if largest else np.amin)(x.numpy(), axis=tuple(axes), keepdims=keepdims)
            return torch.from_numpy(np.asarray(array))
        return torch.amax(x, axes, keepdims) if largest else torch.amin(x, axes, keepdims)

    return reduce


def _bound(dtype: torch.dtype, largest: bool) -> Any:
    if dtype is torch.bool:
        return largest
    if dtype.is_floating_point:
        return float("inf") if largest else float("-inf")
    info = torch.iinfo(dtype)
    return info.max if largest else info.min


def _prod(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    x = _accumulator(x)
    for axis in reversed(axes):
        x = torch.prod(x, axis, keepdim=keepdims)
    return x


def _sum(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    return torch.sum(_accumulator(x), axes, keepdim=keepdims)


def _mean(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(_accumulator(x), axes, keepdim=keepdims)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(_sum(x, axes, keepdims), max(count, 1), rounding_mode="trunc")


def _in_double(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Integers pass through double precision and are cut back."""
    return lambda x: function(_accumulator(x) if x.is_floating_point() else x.double())


def _log_sum_exp(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    return torch.logsumexp(_accumulator(x) if x.is_floating_point() else x.double(), axes, keepdim=keepdims)


def _l2(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    return torch.sqrt(_in_double(torch.square)(x).sum(axes, keepdim=keepdims))


_reduction("ReduceSum", _sum)
_reduction("ReduceMean", _mean)
_reduction("ReduceProd", _prod)
_reduction("ReduceMax", _extreme(True))
_reduction("ReduceMin", _extreme(False))
_reduction("ReduceSumSquare", lambda x, axes, keep: _sum(torch.square(_accumulator(x)), axes, keep), torch.square)
_reduction("ReduceL1", lambda x, axes, keep: _sum(torch.abs(_accumulator(x)), axes, keep), torch.abs)
_reduction("ReduceL2", _l2, torch.abs)
_reduction("ReduceLogSum", lambda x, axes, keep: _in_double(torch.log)(_sum(x, axes, keep)), torch.log)
_reduction("ReduceLogSumExp", _log_sum_exp)


@operator("CumSum")
def cum_sum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _running(x, axis, exclusive, reverse, torch.cumsum, 0)


@operator("CumProd")
def cum_prod(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    return _running(x, axis, exclusive, reverse, torch.cumprod, 1)


def _running(
    x: Tensor, axis: Tensor, exclusive: int, reverse: int, function: Callable[[Tensor, int], Tensor], start: int
) -> Tensor:
    dim = int(axis) % x.dim()
    y = x.flip(dim) if reverse else x
    if exclusive and x.shape[dim]:
        first = torch.full_like(y.narrow(dim, 0, 1), start)
        y = torch.cat([first, y.narrow(dim, 0, y.shape[dim] - 1)], dim)
    y = function(y, dim).to(x.dtype)
    return y.flip(dim) if reverse else y


@operator("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, axis, keepdims, select_last_index, np.argmax)


@operator("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, axis, keepdims, select_last_index, np.argmin)


def _arg(x: Tensor, axis: int, keepdims: int, last: int, function: Callable[..., Any]) -> Tensor:
    """NumPy takes the first of equal elements, which torch does not promise."""
    array = x.float().numpy() if x.dtype is torch.bfloat16 else x.numpy()
    found = function(np.flip(array, axis) if last else array, axis=axis)
    found = array.shape[axis] - 1 - found if last else found
    indices = np.asarray(found, dtype=np.int64)
    return torch.from_numpy(np.expand_dims(indices, axis) if keepdims else indices)


@operator("TopK")
def top_k(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """Of equal elements the one with the smaller index comes first. The result is sorted even if that was not asked."""
    count = int(k)
    if not 0 <= count <= x.shape[axis]:
        raise ValueError(f"TopK wants {count} of the {x.shape[axis]} elements along axis {axis}")
    if x.dtype in (torch.uint16, torch.uint32, torch.uint64):
        wide = x.to(torch.int64) ^ (torch.iinfo(torch.int64).min if x.dtype is torch.uint64 else 0)  # keeps the order
    else:
        wide = x
    indices = torch.sort(wide, dim=axis, descending=bool(largest), stable=True).indices.narrow(axis, 0, count)
    if wide is not x:
        return torch.from_numpy(np.take_along_axis(x.numpy(), indices.numpy(), axis)), indices
    return torch.gather(x, axis, indices), indices


@operator("Unique")
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1, _outputs: int = 1) -> Any:
    """Distinct elements (or slices), index of the first of each, index of each element's own, counts."""
    array = x.numpy().ravel() if axis is None else x.numpy()
    values, first, inverse, counts = np.unique(
        array, return_index=True, return_inverse=True, return_counts=True, axis=0 if axis is None else axis
    )
    inverse = inverse.ravel()
    if not sorted:
        order = np.argsort(first)
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        values = np.take(values, order, axis=0 if axis is None else axis)
        first, inverse, counts = first[order], position[inverse], counts[order]
    results = (values, first.astype(np.int64), inverse.astype(np.int64), counts.astype(np.int64))
    return tuple(torch.from_numpy(np.ascontiguousarray(result)) for result in results[:_outputs])
