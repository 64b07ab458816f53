"""Convolutions by oneDNN, on tensors whose channels lie innermost, with what follows fused in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.graph.ir import Node
from trine.graph.operators.algebra import activate
from trine.graph.operators.convolution import pad_spatial
from trine.graph.tactics.registry import Kernel, tactic

_POST_OPS: dict[str, tuple[str, list[float], str | None]] = {
    "": ("none", [], None),
    "relu": ("relu", [], None),
    "relu6": ("hardtanh", [0.0, 6.0], None),
    "sigmoid": ("sigmoid", [], None),
    "tanh": ("tanh", [], None),
    "silu": ("swish", [], None),
    "hardswish": ("hardswish", [], None),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}
"""What oneDNN calls each activation, with its numbers and its variant."""


@tactic("FusedConv", "onednn", channels_last=True)
def onednn(node: Node) -> Kernel | None:
    """Weights in the library's own layout; sum and activation done on each block while it is in the cache."""
    if not torch.backends.mkldnn.is_available():
        return None
    _, weight, *optional = node.inputs
    bias = optional[0] if optional else None
    if weight is None or not weight.is_constant or (bias is not None and not bias.is_constant):
        return None
    attributes = node.attributes
    strides, dilations, group = attributes["strides"], attributes["dilations"], attributes["group"]
    pads, outer = list(attributes["pads"]), None
    if pads[:2] != pads[2:] or min(pads) < 0:
        pads, outer = [0] * 4, pads
    shape = None if node.inputs[0] is None else node.inputs[0].static_shape
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed = reorder(weight.data.to_mkldnn(), pads[:2], strides, dilations, group, None if outer else shape)
    bias_data = None if bias is None else bias.data
    name, scalars, algorithm = _POST_OPS[attributes["activation"]]
    after_sum = "relu" if name == "relu" else None  # the only one that torch lets follow a sum
    fused = torch.ops.mkldnn._convolution_pointwise
    summed = fused.binary
    alone = fused.default
    last = torch.channels_last

    def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
        if outer is not None:
            x = pad_spatial(x, outer)
        x = x.contiguous(memory_format=last)
        if residual is None:
            y: Tensor = alone(x, packed, bias_data, pads[:2], strides, dilations, group, name, scalars, algorithm)
            return y
        residual = residual.contiguous(memory_format=last)
        y = summed(x, residual, packed, bias_data, pads[:2], strides, dilations, group, "add", 1.0, after_sum, [], None)
        return y if after_sum else activate(y, attributes["activation"])

    return run


@tactic("FusedConv", "torch", channels_last=True)
def torch_convolution(node: Node) -> Kernel | None:
    """torch's convolution, the activation after it: for a torch without oneDNN."""
    weight = node.inputs[1]
    if weight is None or not weight.is_constant or torch.backends.mkldnn.is_available():
        return None
    attributes = node.attributes
    pads = list(attributes["pads"])
    outer = pads if pads[:2] != pads[2:] or min(pads) < 0 else None
    inner = [0, 0] if outer else pads[:2]
    data = weight.data.contiguous(memory_format=torch.channels_last)
    last = torch.channels_last

    def run(x: Tensor, w: Any = None, b: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        x = (x if outer is None else pad_spatial(x, outer)).contiguous(memory_format=last)
        y = torch.conv2d(x, data, b, attributes["strides"], inner, attributes["dilations"], attributes["group"])
        return activate(y if residual is None else y.add_(residual), attributes["activation"])

    return run


@tactic("ConvTranspose", "torch", channels_last=True)
def transposed(node: Node) -> Kernel | None:
    """torch's, with its own padding and bias, where the node is of the plain kind."""
    a, weight = node.attributes, node.inputs[1]
    pads = a.get("pads") or [0, 0, 0, 0]
    plain = a.get("auto_pad", "NOTSET") == "NOTSET" and not a.get("output_shape") and pads[:2] == pads[2:]
    if weight is None or weight.rank != 4 or not weight.is_constant or not plain or min(pads) < 0:
        return None
    strides, dilations = a.get("strides") or [1, 1], a.get("dilations") or [1, 1]
    extra, group = a.get("output_padding") or [0, 0], a.get("group", 1)
    if any(extra[i] >= max(strides[i], dilations[i]) for i in range(2)):
        return None
    data = weight.data.contiguous(memory_format=torch.channels_last)
    last = torch.channels_last

    def run(x: Tensor, w: Any = None, b: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=last)
        return torch.conv_transpose2d(x, data, b, strides, pads[:2], extra, group, dilations)

    return run
