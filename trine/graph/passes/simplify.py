"""Algebra that leaves out what changes nothing."""

from __future__ import annotations

from trine.graph.dtypes import from_onnx
from trine.graph.ir import Graph, Node, Value


def simplify(graph: Graph) -> Graph:
    """Remove what gives back its input: Identity, x * 1, a Cast to its own type, a Reshape to its own shape."""
    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            simplify(subgraph)
        kept = _same_as(node)
        if kept is not None and kept is not node.output:
            graph.nodes.remove(node)
            graph.replace(node.output, kept)
    return graph


def _same_as(node: Node) -> Value | None:
    """The input that the node's only result equals, if there is one."""
    x = node.input(0)
    if x is None or sum(bool(value.name) for value in node.outputs) != 1 or not node.output.name:
        return None
    if node.op == "Identity":
        return x
    if node.op == "Dropout" and node.input(2) is None:
        return x
    if node.op == "Cast":
        return x if x.dtype is not None and from_onnx(node.attributes["to"]) is x.dtype else None
    if node.op == "Transpose":
        perm = node.attributes.get("perm")
        return x if perm is not None and perm == sorted(perm) else None
    if node.op == "Concat":
        return x if len(node.inputs) == 1 else None
    same_shape = x.static_shape is not None and x.static_shape == node.output.static_shape
    if node.op in ("Reshape", "Expand", "Flatten", "Slice", "Tile", "Squeeze", "Unsqueeze") and same_shape:
        return x if node.op != "Slice" or _whole(node) else None
    if node.op == "Pad":
        pads = node.input(1)
        return x if pads is not None and pads.is_constant and not pads.data.any() else None
    return _neutral_operand(node)


def _whole(node: Node) -> bool:
    """A slice of the same shape may still run backwards."""
    steps = node.input(4)
    return steps is None or (steps.is_constant and bool((steps.data > 0).all()))


def _neutral_operand(node: Node) -> Value | None:
    """x of x + 0, x - 0, x * 1, x / 1 and x ** 1, where the number does not widen x's shape."""
    neutral = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1}.get(node.op)
    if neutral is None or len(node.inputs) != 2:
        return None
    a, b = node.inputs
    pairs = [(a, b), (b, a)] if node.op in ("Add", "Mul") else [(a, b)]
    for x, number in pairs:
        if x is None or number is None or not number.is_constant or number.data.numel() != 1:
            continue
        if x.rank is None or number.data.dim() > x.rank or x.is_constant:
            continue
        # -0.0 + 0 is 0: no test can tell them apart but the sign bit
        if float(number.data.reshape(())) == neutral:
            return x
    return None
