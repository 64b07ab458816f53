"""QLinearConv and QLinearMatMul as what they stand for: dequantised operands, a float product, a quantised result.

Models in ONNX's operator format become ones in its QDQ format, and take the same way from there on: bias, activation,
sum and what follows join the product (`passes/quantized.py`).
"""

from __future__ import annotations

import torch

from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.passes.pattern import replace_node


def spread_integer_operators(graph: Graph) -> Graph:
    """Where scales, zero points and weights are constants, and the activations have one scale."""
    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            spread_integer_operators(subgraph)
        if node.op in ("QLinearConv", "QLinearMatMul"):
            _spread(graph, node)
    return graph


def _spread(graph: Graph, node: Node) -> None:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = node.inputs[:8]
    bias, is_conv = node.input(8), node.op == "QLinearConv"
    known = (x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero)
    if x is None or any(value is None or not value.is_constant for value in known):
        return
    assert w is not None
    singles = [value for value in (x_scale, x_zero, y_scale, y_zero) if value is not None and value.data.numel() != 1]
    columns = 1 if w.rank is None else w.data.shape[0 if is_conv else -1]
    sizes = {value.data.numel() for value in (w_scale, w_zero) if value is not None} - {1}
    if singles or sizes - {columns} or (not is_conv and w.rank != 2) or (bias is not None and not bias.is_constant):
        return
    assert x_scale is not None
    assert w_scale is not None
    assert w_zero is not None
    scales = w_scale.data.reshape(-1).expand(columns).contiguous()
    zeros = w_zero.data.reshape(-1).expand(columns).contiguous()
    name = node.output.name
    left = _dequantized(graph, node, x, _scalar(x_scale), _scalar(x_zero), f"{name}.x", {})
    weights = (constant(f"{name}.w_scale", scales), constant(f"{name}.w_zero", zeros))
    right = _dequantized(graph, node, w, *weights, f"{name}.w", {"axis": 0 if is_conv else 1})
    inputs: list[Value | None] = [left, right]
    if bias is not None:
        real = bias.data.double() * x_scale.data.double().reshape(()) * scales.double()
        inputs.append(constant(f"{name}.bias", real.float()))
    made = Value(f"{name}.real", DType.FLOAT32, node.output.shape)
    product = Node("Conv" if is_conv else "MatMul", inputs, [made], dict(node.attributes), node.name)
    graph.nodes.insert(graph.nodes.index(node), product)
    replace_node(graph, node, Node("QuantizeLinear", [made, _scalar(y_scale), _scalar(y_zero)], [], {}, node.name))


def _scalar(value: Value | None) -> Value:
    assert value is not None
    data: torch.Tensor = value.data
    return value if data.dim() == 0 else constant(f"{value.name}.scalar", data.reshape(()))


def _dequantized(
    graph: Graph, node: Node, x: Value, scale: Value, zero: Value, name: str, attributes: dict[str, int]
) -> Value:
    made = Value(name, DType.FLOAT32, x.shape)
    graph.nodes.insert(graph.nodes.index(node), Node("DequantizeLinear", [x, scale, zero], [made], attributes, name))
    return made
