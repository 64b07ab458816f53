"""A graph for inputs of known shapes: what follows from them is known, too, and what computed it is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trine.graph.ir import Graph, Node, Value
from trine.graph.passes.cleanup import remove_dead_nodes
from trine.graph.passes.constants import fold_constants
from trine.graph.passes.simplify import simplify
from trine.graph.shapes import infer_shapes


def specialise(graph: Graph, shapes: Sequence[tuple[int, ...] | None]) -> tuple[Graph, dict[Node, Node]]:
    """A copy of `graph` whose inputs have these shapes (None: as declared), and the node that each of its nodes copies.

    Constants are shared. Nodes that the passes made new are in no mapping.
    """
    copy, origins = clone(graph)
    for value, shape in zip(copy.inputs, shapes, strict=True):
        value.shape = value.shape if shape is None else shape
    for run in (infer_shapes, fold_constants, simplify, remove_dead_nodes, infer_shapes):
        run(copy)
    return copy, origins


def clone(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A copy of `graph`, and the node that each of its nodes copies. Constants are shared."""
    return _clone(graph, {})


def _clone(graph: Graph, values: dict[Value, Value]) -> tuple[Graph, dict[Node, Node]]:
    """Values from around a subgraph are in `values` already."""
    values, origins = dict(values), {}

    def of(value: Value) -> Value:
        if value.is_constant:
            return value
        if value not in values:
            values[value] = Value(value.name, value.dtype, value.shape)
        return values[value]

    def attribute(item: Any) -> Any:
        if not isinstance(item, Graph):
            return item
        body, inner = _clone(item, values)
        origins.update(inner)
        return body

    clone = Graph(graph.name, [of(value) for value in graph.inputs], output_names=list(graph.output_names))
    for node in graph.nodes:
        inputs = [None if value is None else of(value) for value in node.inputs]
        attributes = {key: attribute(item) for key, item in node.attributes.items()}
        made = Node(node.op, inputs, [of(value) for value in node.outputs], attributes, node.name, node.origins)
        clone.nodes.append(made)
        origins[made] = node
    clone.outputs = [of(value) for value in graph.outputs]
    return clone, origins
