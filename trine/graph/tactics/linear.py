"""Matrix products by a constant: oneDNN and MKL with packed weights, the native kernels, torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trine.graph.ir import Node
from trine.graph.operators.algebra import activate
from trine.graph.tactics.convolution import _POST_OPS
from trine.graph.tactics.registry import Kernel, tactic
from trine.kernels import ops


def _constants(node: Node) -> tuple[Tensor, Tensor | None] | None:
    weight, bias = node.inputs[1], node.input(2)
    if weight is None or not weight.is_constant or (bias is not None and not bias.is_constant):
        return None
    return weight.data, None if bias is None else bias.data


def _finish(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """Sum and activation on y, which nobody else has, in place."""
    if residual is not None:
        y.add_(residual)
    return y.relu_() if activation == "relu" else activate(y, activation)


def _rows(node: Node) -> int | None:
    """Rows of x when the plan says them."""
    x = node.inputs[0]
    shape = None if x is None else x.static_shape
    if shape is None:
        return None
    rows = 1
    for dim in shape[:-1]:
        rows *= dim
    return rows


@tactic("Linear", "onednn")
def onednn(node: Node) -> Kernel | None:
    found = _constants(node)
    if found is None or not torch.backends.mkldnn.is_available():
        return None
    weight, bias = found
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _rows(node))
    activation = node.attributes["activation"]
    name, scalars, algorithm = _POST_OPS[activation]
    alone, summed = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary

    def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            y: Tensor = alone(x, packed, bias, name, scalars, algorithm)
            return y
        return activate(summed(x, residual, packed, bias, "add"), activation)

    return run


@tactic("Linear", "mkl")
def mkl(node: Node) -> Kernel | None:
    """MKL packs for a number of rows: only where that is known."""
    found, rows = _constants(node), _rows(node)
    if found is None or rows is None or not torch.backends.mkl.is_available():
        return None
    weight, bias = found[0].contiguous(), found[1]
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    activation = node.attributes["activation"]
    product = torch.ops.mkl._mkl_linear.default

    def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
        return _finish(product(x, packed, weight, bias, rows), residual, activation)

    return run


@tactic("Linear", "native")
def native(node: Node) -> Kernel | None:
    """Trine's own kernels, with the weight in panels."""
    found = _constants(node)
    if found is None or not ops.cpu_kernels().startswith("native"):
        return None
    weight, bias = found
    packed = ops.pack_weight(weight.contiguous())
    activation = node.attributes["activation"]
    columns = weight.shape[0]

    def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
        y = ops.linear(x.reshape(-1, x.shape[-1]), packed, bias)
        return _finish(y.view(*x.shape[:-1], columns), residual, activation)

    return run


@tactic("Linear", "torch")
def plain(node: Node) -> Kernel | None:
    found = _constants(node)
    if found is None:
        return None
    weight, bias = found
    activation = node.attributes["activation"]

    def run(x: Tensor, w: Any = None, b: Any = None, residual: Tensor | None = None) -> Tensor:
        return _finish(torch.nn.functional.linear(x, weight, bias), residual, activation)

    return run
