"""Normalisations and softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.graph.dtypes import from_onnx
from trine.graph.operators.registry import operator


def _channels(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.reshape(1, -1, *[1] * (x.dim() - 2))


@operator("BatchNormalization")
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    _outputs: int = 1,
) -> Any:
    """In training mode by the batch's own statistics, and with the running ones updated."""
    running: tuple[Tensor, ...] = ()
    if training_mode:
        axes = [0, *range(2, x.dim())]
        batch_mean, batch_variance = x.mean(axes), x.var(axes, unbiased=False)
        running = tuple(
            (old * momentum + new * (1 - momentum)).to(old.dtype)
            for old, new in ((mean, batch_mean), (variance, batch_variance))
        )
        mean, variance = batch_mean, batch_variance
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    centred = x.to(wide) - _channels(mean.to(wide), x)
    normal = centred / torch.sqrt(_channels(variance.to(wide), x) + epsilon)
    y = (normal * _channels(scale.to(wide), x) + _channels(bias.to(wide), x)).to(x.dtype)
    return y if _outputs == 1 else (y, *running)[:_outputs]


@operator("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    axes = list(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    variance = x.var(axes, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + epsilon) * _channels(scale, x) + _channels(bias, x)


@operator("GroupNormalization")
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Scale and bias count a channel, or, before opset 21, a group."""
    wide = _stash(x, stash_type)
    scale, bias = (part.repeat_interleave(x.shape[1] // part.numel()) for part in (scale, bias))
    groups = x.to(wide).reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(groups, -1, unbiased=False, keepdim=True)
    normal = ((groups - mean) / torch.sqrt(variance + epsilon)).to(x.dtype).reshape(x.shape)
    return normal * _channels(scale, x) + _channels(bias, x)


def _stash(x: Tensor, stash_type: int) -> torch.dtype:
    """What statistics are computed in: at least as wide as x."""
    kind = from_onnx(stash_type)
    if kind is None or not kind.is_float:
        raise ValueError(f"stash_type {stash_type} is not a float type")
    return torch.promote_types(kind.torch, x.dtype)


@operator("LayerNormalization")
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    _outputs: int = 1,
) -> Any:
    """Over the axes from `axis` on. Further outputs: the mean and the inverse standard deviation."""
    wide = _stash(x, stash_type)
    axes = list(range(axis % x.dim(), x.dim()))
    centred = x.to(wide)
    variance, mean = torch.var_mean(centred, axes, unbiased=False, keepdim=True)
    inverse = 1 / torch.sqrt(variance + epsilon)
    y = ((centred - mean) * inverse).to(x.dtype) * scale
    y = y if bias is None else y + bias
    return y if _outputs == 1 else (y, mean, inverse)[:_outputs]


@operator("RMSNormalization")
def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    wide = x.to(_stash(x, stash_type))
    axes = list(range(axis % x.dim(), x.dim()))
    normal = wide / torch.sqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return normal.to(x.dtype) * scale


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    chosen = [0, 2, 3] if axes is None else axes
    mean = x.mean(chosen, keepdim=True)
    deviation = torch.sqrt((x * x).mean(chosen, keepdim=True) - mean * mean)
    return (x - mean) / (deviation + 1e-9)


@operator("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """A slice of norm 0 stays 0."""
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else torch.sqrt(x.square().sum(axis, keepdim=True))
    return torch.where(norm == 0, torch.zeros((), dtype=x.dtype), x / norm)


@operator("LRN")
def lrn(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """Each element over a power of the mean square of `size` neighbouring channels."""
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    squares = torch.nn.functional.pad(x.square(), [0, 0] * (x.dim() - 2) + [before, after])
    total = sum(squares.narrow(1, i, x.shape[1]) for i in range(size))
    return x / (bias + alpha / size * total) ** beta


@operator("Softmax")
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@operator("LogSoftmax")
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


@operator("Hardmax")
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """One at the first largest element, zero elsewhere."""
    first = (x == x.amax(axis, keepdim=True)).to(torch.int8).argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, first, 1)
