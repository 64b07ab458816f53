"""Copies of graphs, to try an assignment of precisions on."""

from __future__ import annotations

from typing import Any

from trine.graph.ir import Graph, Node, Value


def clone(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A copy with its own nodes and values over the same constants; and each node's copy (subgraphs' aside)."""
    values: dict[Value, Value] = {}
    nodes: dict[Node, Node] = {}
    return _copy(graph, values, nodes), nodes


def _copy(graph: Graph, values: dict[Value, Value], nodes: dict[Node, Node]) -> Graph:
    def value(old: Value) -> Value:
        if old.is_constant:
            return old
        if old not in values:
            values[old] = Value(old.name, old.dtype, old.shape)
        return values[old]

    def attribute(old: Any) -> Any:
        return _copy(old, values, {}) if isinstance(old, Graph) else old

    copy = Graph(graph.name, [value(given) for given in graph.inputs], output_names=list(graph.output_names))
    for node in graph.nodes:
        inputs = [None if given is None else value(given) for given in node.inputs]
        attributes = {key: attribute(item) for key, item in node.attributes.items()}
        nodes[node] = Node(node.op, inputs, [value(made) for made in node.outputs], attributes, node.name, node.origins)
        copy.nodes.append(nodes[node])
    copy.outputs = [value(given) for given in graph.outputs]
    return copy
