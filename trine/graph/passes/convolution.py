"""Convolution with what follows it: the sum with a residual, and the activation."""

from __future__ import annotations

from typing import Any

import torch

from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.passes.pattern import insert_before, remove_unread, replace_node

_SIMPLE = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "HardSwish": "hardswish"}


def activation_of(node: Node) -> str:
    """The name that fused operators have for what the node does to its first input; "" if none."""
    if node.op in _SIMPLE:
        return _SIMPLE[node.op]
    if node.op == "Clip":
        bounds = [node.input(1), node.input(2)]
        numbers = [float(b.data) if b is not None and b.is_constant and b.data.numel() == 1 else None for b in bounds]
        return "relu6" if numbers == [0.0, 6.0] else ""
    if node.op == "Gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(node.attributes.get("approximate", "none"), "")
    return "silu" if node.op == "Swish" and node.attributes.get("alpha", 1.0) == 1 else ""


def lift_convolution(graph: Graph) -> Graph:
    """A convolution over one dimension, in float32 with a constant weight, as one over images of one row."""
    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            lift_convolution(subgraph)
        x, weight, a = node.input(0), node.input(1), node.attributes
        if node.op != "Conv" or x is None or x.rank != 3 or x.dtype is not DType.FLOAT32:
            continue
        if weight is None or not weight.is_constant or a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        kernel = constant(f"{weight.name}.row", weight.data[:, :, None])
        height = constant(f"{node.output.name}.axis", torch.tensor([2]))
        assert x.shape is not None
        image = insert_before(graph, node, Node("Unsqueeze", [x, height], []))
        image.dtype, image.shape = x.dtype, (*x.shape[:2], 1, x.shape[2])
        pads = list(a.get("pads") or [0, 0])
        attributes: dict[str, Any] = {
            **{key: a[key] for key in ("auto_pad", "group") if key in a},
            "strides": [1, *(a.get("strides") or [1])],
            "dilations": [1, *(a.get("dilations") or [1])],
            "pads": [0, pads[0], 0, pads[1]],
        }
        row = insert_before(graph, node, Node("Conv", [image, kernel, *node.inputs[2:]], [], attributes))
        if node.output.shape is not None:
            row.dtype, row.shape = x.dtype, (*node.output.shape[:2], 1, node.output.shape[2])
        replace_node(graph, node, Node("Squeeze", [row, height], []))
    return graph


def fuse_convolution(graph: Graph) -> Graph:
    """Conv with its residual and activation as one FusedConv: in float32, over two spatial dimensions."""
    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            fuse_convolution(subgraph)
        attributes = _attributes(node)
        if attributes is not None:
            fused = Node("FusedConv", list(node.inputs), [], {**attributes, "activation": ""}, node.name)
            replace_node(graph, node, fused)
    absorb_followers(graph, "FusedConv", 3)
    return graph


def _attributes(node: Node) -> dict[str, Any] | None:
    """All attributes of a Conv in full; None for one that is not fused."""
    x = node.input(0)
    if node.op != "Conv" or x is None or x.rank != 4 or x.dtype is not DType.FLOAT32:
        return None
    given = node.attributes
    if given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    valid = given.get("auto_pad") == "VALID"
    return {
        "strides": list(given.get("strides") or [1, 1]),
        "dilations": list(given.get("dilations") or [1, 1]),
        "pads": [0] * 4 if valid else list(given.get("pads") or [0] * 4),
        "group": given.get("group", 1),
    }


def absorb_followers(graph: Graph, op: str, residual_input: int) -> None:
    """Let nodes `op` do the sum and the activation that alone read their result."""
    users, outputs = graph.users(), set(graph.outputs)
    order = {node: index for index, node in enumerate(graph.nodes)}

    def only_reader(value: Value) -> Node | None:
        readers = users.get(value, [])
        return readers[0] if len(readers) == 1 and value not in outputs and readers[0] in order else None

    for node in list(graph.nodes):
        if node.op != op or node.attributes["activation"]:
            continue
        follower = only_reader(node.output)
        if follower is not None and follower.op == "Add" and len(node.inputs) <= residual_input:
            if not _take_sum(graph, node, follower, residual_input, order, users):
                continue
            follower = only_reader(node.output)
        if follower is not None:
            activation = activation_of(follower)
            if activation and follower.inputs[0] is node.output:
                node.attributes["activation"] = activation
                _take_over(graph, node, follower, order, users)
    remove_unread(graph)


def _take_sum(
    graph: Graph, node: Node, sum_: Node, place: int, order: dict[Node, int], users: dict[Value, list[Node]]
) -> bool:
    """Make the Add's other operand the node's residual, if it has the same shape. The node moves to the Add's place."""
    other = next((value for value in sum_.inputs if value is not node.output), None)
    if other is None or other.shape is None or other.shape != node.output.shape or other.dtype is not node.output.dtype:
        return False
    if other.is_constant:
        return False
    node.inputs = [*node.inputs, *[None] * (place - len(node.inputs)), other]
    users.setdefault(other, []).append(node)
    _take_over(graph, node, sum_, order, users)
    return True


def _take_over(
    graph: Graph, node: Node, follower: Node, order: dict[Node, int], users: dict[Value, list[Node]]
) -> None:
    """The node makes the follower's output, in the follower's place."""
    first, second = graph.nodes.index(node), graph.nodes.index(follower)
    output = follower.output
    for value in follower.inputs:
        if value is not None and follower in users.get(value, []):
            users[value].remove(follower)
    graph.nodes[second] = node
    del graph.nodes[first]
    node.outputs = [output]
    output.producer = node
    follower.outputs = [Value("")]
