"""`ai.onnx.preview.training.Gradient`: the derivative of a value by others, as a node whose body computes the value."""

from __future__ import annotations

from trine.graph.errors import UnsupportedOperatorError
from trine.graph.ir import Graph, Node, Value


def gradient_node(
    name: str, xs: list[Value], given: list[Value | None], y: Value, count: int, nodes: list[Node]
) -> Node:
    """The node that gives dy/dx for each of `xs`, at the values `given`; `nodes` are those before it."""
    inner = {x: Value(f"{name}/{x.name}", x.dtype, x.shape) for x in xs}
    body = Graph(name, inputs=[inner[x] for x in xs], output_names=["y"])
    needed = _between(xs, y, nodes)
    for node in nodes:
        if node not in needed:
            continue
        if node.subgraphs:
            raise UnsupportedOperatorError(
                "Gradient", name, f"can't pass through node {node.name!r}, which has a subgraph"
            )
        outputs = []
        for value in node.outputs:
            inner[value] = Value(f"{name}/{value.name}" if value.name else "", value.dtype, value.shape)
            outputs.append(inner[value])
        inputs = [None if value is None else inner.get(value, value) for value in node.inputs]
        body.nodes.append(Node(node.op, inputs, outputs, dict(node.attributes), f"{name}/{node.name}"))
    body.outputs = [inner.get(y, y)]
    return Node("Gradient", given, [Value("") for _ in range(count)], {"body": body}, name)


def _between(xs: list[Value], y: Value, nodes: list[Node]) -> set[Node]:
    """The nodes on the way from `xs` to `y`."""
    reached, wanted = set(xs), {y}
    forward = set()
    for node in nodes:
        if any(value in reached for value in node.reads()):
            forward.add(node)
            reached.update(node.outputs)
    needed = set()
    for node in reversed(nodes):
        if node in forward and any(value in wanted for value in node.outputs):
            needed.add(node)
            wanted.update(value for value in node.inputs if value is not None and value not in xs)
    return needed
