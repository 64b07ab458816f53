"""Convolutions by oneDNN, on tensors whose channels lie innermost, with what follows fused in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trine.graph.ir import Node
from trine.graph.operators.algebra import activate
from trine.graph.operators.convolution import pad_spatial
from trine.graph.tactics.registry import Kernel, tactic
from trine.kernels import ops

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


def _is_pointwise(node: Node) -> bool:
    """A kernel of one element in steps of one: with the channels innermost, a product of rows by a matrix."""
    a, weight = node.attributes, node.inputs[1]
    if weight is None or not weight.is_constant or a["group"] != 1 or any(a["pads"]) or a["strides"] != [1, 1]:
        return False
    return weight.static_shape is not None and weight.static_shape[2:] == (1, 1)


def _by_rows(product: Callable[[Tensor], Tensor], filters: int, activation: str) -> Kernel:
    """A convolution from `product`, which takes rows of pixels [T, C] to new rows [T, filters]."""

    def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
        n, channels, height, width = x.shape
        rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, channels)
        y = product(rows).view(n, height, width, filters).permute(0, 3, 1, 2)
        if residual is not None:
            y.add_(residual)
        if activation == "relu":
            return y.relu_()
        return y.clamp_(0, 6) if activation == "relu6" else activate(y, activation)

    return run


@tactic("FusedConv", "rows", channels_last=True)
def rows(node: Node) -> Kernel | None:
    """One matrix product by torch: it starts in a tenth of the time that a convolution takes to set up."""
    bias = node.input(2)
    if not _is_pointwise(node) or (bias is not None and not bias.is_constant):
        return None
    weight: Any = node.inputs[1]
    matrix = weight.data.flatten(1).T.contiguous()
    shift = None if bias is None else bias.data
    activation, filters = node.attributes["activation"], matrix.shape[1]
    if shift is None:
        return _by_rows(lambda x: torch.mm(x, matrix), filters, activation)
    return _by_rows(lambda x: torch.addmm(shift, x, matrix), filters, activation)


@tactic("FusedConv", "native_rows", channels_last=True)
def native_rows(node: Node) -> Kernel | None:
    """One matrix product by Trine's own kernels."""
    bias = node.input(2)
    if not _is_pointwise(node) or (bias is not None and not bias.is_constant):
        return None
    if not ops.cpu_kernels().startswith("native"):
        return None
    weight: Any = node.inputs[1]
    packed = ops.pack_weight(weight.data.flatten(1).contiguous())
    shift = None if bias is None else bias.data
    return _by_rows(lambda x: ops.linear(x, packed, shift), weight.data.shape[0], node.attributes["activation"])


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
