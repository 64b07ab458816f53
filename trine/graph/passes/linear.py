"""Matrix products by a constant as one operator, with bias, residual and activation."""

from __future__ import annotations

import torch

from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.passes.convolution import absorb_followers
from trine.graph.passes.pattern import Match, any_, op, replace_node, rewrite
from trine.graph.passes.pattern import constant as constant_


def _is_matrix(data: torch.Tensor) -> bool:
    return data.dim() == 2 and data.dtype is torch.float32


def fuse_linear(graph: Graph) -> Graph:
    """MatMul and Gemm by a constant matrix become Linear, and take the bias, sum and activation that follow."""
    transposed: dict[Value, Value] = {}

    def weight(value: Value, turn: bool) -> Value:
        """[N, K]: the constant itself, or turned (a view of the same memory), once however many read it."""
        if not turn:
            return value
        if value not in transposed:
            transposed[value] = constant(f"{value.name}.T", value.data.T)
        return transposed[value]

    def from_gemm(found: Match) -> Node | None:
        gemm = found.nodes[0]
        bias = gemm.input(2)
        plain = gemm.attributes.get("alpha", 1.0) == 1 and gemm.attributes.get("beta", 1.0) == 1
        if not plain or gemm.attributes.get("transA", 0):
            return None
        w = weight(found["w"], not gemm.attributes.get("transB", 0))
        if bias is not None and (not bias.is_constant or bias.static_shape != (w.data.shape[0],)):
            return None
        return Node("Linear", [found["x"], w, bias], [], {"activation": ""}, gemm.name)

    def from_matmul(found: Match) -> Node | None:
        if (found["x"].rank or 2) < 2 or found["x"].dtype is not DType.FLOAT32:
            return None
        return Node("Linear", [found["x"], weight(found["w"], True), None], [], {"activation": ""}, found.nodes[0].name)

    rewrite(graph, [op("Gemm", any_("x"), constant_("w", _is_matrix))], from_gemm)
    rewrite(graph, [op("MatMul", any_("x"), constant_("w", _is_matrix))], from_matmul)
    _add_bias(graph)
    absorb_followers(graph, "Linear", 3)
    return graph


def _add_bias(graph: Graph) -> None:
    """A constant row added to a Linear's only reader is its bias."""
    users, outputs = graph.users(), set(graph.outputs)
    for node in list(graph.nodes):
        if node.op != "Add":
            continue
        for made, other in (node.inputs, node.inputs[::-1]):
            linear = None if made is None else made.producer
            if (
                linear is not None
                and linear.op == "Linear"
                and linear.inputs[2] is None
                and other is not None
                and other.is_constant
                and made is not None
                and made not in outputs
                and len(users[made]) == 1
                and linear.inputs[1] is not None
                and linear.inputs[1].shape is not None
                and other.shape == linear.inputs[1].shape[:1]
            ):
                fused = Node("Linear", [linear.inputs[0], linear.inputs[1], other], [], {"activation": ""}, linear.name)
                replace_node(graph, node, fused)
                users = graph.users()
                break
