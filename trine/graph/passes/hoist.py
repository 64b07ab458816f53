"""Activations before the views that stand between them and a product, so that the product's kernel computes them."""

from __future__ import annotations

from trine.graph.ir import Graph, Node, Value
from trine.graph.passes.convolution import activation_of

_MOVES = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
_PRODUCTS = frozenset({"Conv", "BatchNormalization", "MatMul", "Gemm", "Add"})


def hoist_activations(graph: Graph) -> Graph:
    """activation(move(product)) is move(activation(product)), if each is read by the next alone."""
    users, outputs = graph.users(), set(graph.outputs)

    def only_reader(value: Value, node: Node) -> bool:
        return users.get(value) == [node] and value not in outputs

    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            hoist_activations(subgraph)
        x = node.input(0)
        if not activation_of(node) or x is None or x.producer is None or x.producer.op not in _MOVES:
            continue
        first, value, reader = x.producer, x, node
        while value.producer is not None and value.producer.op in _MOVES and only_reader(value, reader):
            first = reader = value.producer
            source = first.inputs[0]
            if source is None:
                break
            value = source
        if value.producer is None or value.producer.op not in _PRODUCTS or not only_reader(value, first):
            continue
        _swap(graph, node, first, value)
        users = graph.users()
    return graph


def _swap(graph: Graph, activation: Node, first: Node, value: Value) -> None:
    """Let the activation read `value`, the first move what it gives, and its readers what the last move gives."""
    last, output = activation.inputs[0], activation.output
    assert last is not None
    assert last.producer is not None
    final = last.producer
    made = Value(f"{output.name}.before", value.dtype, value.shape)
    graph.nodes.remove(activation)
    activation.inputs[0] = value
    activation.outputs = [made]
    made.producer = activation
    graph.nodes.insert(graph.nodes.index(first), activation)
    first.inputs[0] = made
    final.outputs[0] = output
    output.producer = final
