"""Shapes and dtypes of the quantised operators: those of what they stand for, in the type that they say."""

from __future__ import annotations

from trine.graph.dtypes import DType
from trine.graph.ir import Node
from trine.graph.shape_rules.common import RULES, Context, Facts, rule


def _as(op: str, node: Node, context: Context, inputs: int) -> Facts:
    """The facts of operator `op` on the node's first inputs, in the node's own type."""
    plain = Node(op, list(node.inputs[:inputs]), [], node.attributes, node.name)
    (_, shape), *_ = RULES[op](plain, context)
    return [(DType(node.attributes.get("y_dtype", DType.FLOAT32)), shape)]


@rule("QuantizedConv ReducedConv")
def _conv(node: Node, context: Context) -> Facts:
    return _as("ConvInteger", node, context, 2)


@rule("QuantizedLinear ReducedLinear")
def _linear(node: Node, context: Context) -> Facts:
    return _as("Linear", node, context, 2)


@rule("QuantizedAdd")
def _add(node: Node, context: Context) -> Facts:
    return _as("Pow", node, context, 2)  # which broadcasts, and takes operands of two types


@rule("QuantizedGlobalAveragePool")
def _global_average_pool(node: Node, context: Context) -> Facts:
    return _as("GlobalAveragePool", node, context, 1)
