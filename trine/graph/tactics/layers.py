"""Attention, normalisation and pooling by torch's own kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.graph.dtypes import DType
from trine.graph.ir import Node
from trine.graph.tactics.registry import Kernel, tactic

_FLOATS = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)


@tactic("ScaledDotProductAttention", "flash")
def flash(node: Node) -> Kernel | None:
    """Blocks of keys at a time: the scores are never whole in memory."""
    scale, turned = node.attributes["scale"], node.attributes.get("k_transposed", 0)
    attend = torch.nn.functional.scaled_dot_product_attention

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and mask.dim() < 2:
            mask = mask.reshape(1, -1)
        return attend(q, k.transpose(-1, -2) if turned else k, v, mask, scale=scale)

    return run


@tactic("LayerNormalization", "torch")
def layer_norm(node: Node) -> Kernel | None:
    """Over trailing axes, in float32, without the statistics as outputs."""
    x, scale = node.inputs[0], node.inputs[1]
    if x is None or scale is None or x.dtype not in _FLOATS or x.rank is None or scale.static_shape is None:
        return None
    axis = node.attributes.get("axis", -1) % x.rank
    if len(scale.static_shape) != x.rank - axis or sum(bool(value.name) for value in node.outputs) > 1:
        return None
    if x.shape is None or x.shape[axis:] != scale.shape:
        return None
    shape, epsilon = list(scale.static_shape), node.attributes.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.layer_norm(x, shape, scale, bias, epsilon)

    return run


@tactic("BatchNormalization", "torch")
def batch_norm(node: Node) -> Kernel | None:
    if node.attributes.get("training_mode", 0) or node.inputs[0] is None or node.inputs[0].dtype is not DType.FLOAT32:
        return None
    if any(value is None or value.dtype is not DType.FLOAT32 for value in node.inputs):
        return None
    epsilon = node.attributes.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return torch.batch_norm(x, scale, bias, mean, variance, False, 0.0, epsilon, False)

    return run


def _window(node: Node) -> dict[str, Any] | None:
    """Arguments of a plain pooling over two dimensions; None for what torch computes otherwise."""
    a, x = node.attributes, node.inputs[0]
    if x is None or x.rank != 4 or x.dtype is not DType.FLOAT32 or len([v for v in node.outputs if v.name]) != 1:
        return None
    pads, kernel = a.get("pads") or [0] * 4, a["kernel_shape"]
    plain = a.get("auto_pad", "NOTSET") in ("NOTSET",) and not a.get("ceil_mode", 0) and pads[:2] == pads[2:]
    if not plain or any(2 * pads[i] > kernel[i] for i in range(2)) or min(pads) < 0:
        return None
    return {"kernel": list(kernel), "strides": list(a.get("strides") or [1, 1]), "pads": pads[:2]}


@tactic("MaxPool", "torch")
def max_pool(node: Node) -> Kernel | None:
    window = _window(node)
    if window is None:
        return None
    dilations = list(node.attributes.get("dilations") or [1, 1])
    kernel, strides, pads = window["kernel"], window["strides"], window["pads"]
    return lambda x: torch.max_pool2d(x, kernel, strides, pads, dilations)


@tactic("AveragePool", "torch")
def average_pool(node: Node) -> Kernel | None:
    window = _window(node)
    if window is None or list(node.attributes.get("dilations") or [1, 1]) != [1, 1]:
        return None
    kernel, strides, pads = window["kernel"], window["strides"], window["pads"]
    include = bool(node.attributes.get("count_include_pad", 0))
    pool = torch.nn.functional.avg_pool2d
    return lambda x: pool(x, kernel, strides, pads, False, include)
