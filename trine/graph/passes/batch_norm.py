"""BatchNormalization in inference is a scale and a shift a channel: the product before it can do it."""

from __future__ import annotations

import torch

from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.passes.pattern import Match, any_, insert_before, match, op, replace_node, rewrite
from trine.graph.passes.pattern import constant as constant_

_PARAMETERS = tuple(constant_(name) for name in ("scale", "bias", "mean", "variance"))
_INFERENCE = {"test": lambda node: not node.attributes.get("training_mode", 0)}


def _affine(found: Match, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift, in double precision, that the normalisation amounts to."""
    scale, bias, mean, variance = (found[name].data.double() for name in ("scale", "bias", "mean", "variance"))
    factor = scale / torch.sqrt(variance + epsilon)
    return factor, bias - mean * factor


def _filter_axis(node: Node) -> int | None:
    """The axis of the weight along which the node's outputs lie; None where its bias is not a plain row of them."""
    attributes = node.attributes
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1 if attributes.get("group", 1) == 1 else None
    plain = attributes.get("alpha", 1.0) == 1 and attributes.get("beta", 1.0) == 1
    return (0 if attributes.get("transB", 0) else 1) if plain else None


def fold_batch_norm(graph: Graph) -> Graph:
    """Into the weight and bias of a convolution or product that nobody else reads."""
    users = graph.users()
    outputs = set(graph.outputs)

    def into_product(found: Match) -> Node | None:
        norm, product = found.nodes[:2]
        axis = _filter_axis(product)
        if axis is None or len(users.get(product.output, [])) != 1 or product.output in outputs:
            return None
        weight, given = found["w"], product.input(2)
        factor, shift = _affine(found, norm.attributes.get("epsilon", 1e-5))
        if given is not None and (not given.is_constant or given.data.shape != factor.shape):
            return None
        if given is not None:
            shift = shift + given.data.double() * factor
        shape = [1] * weight.data.dim()
        shape[axis] = -1
        scaled = (weight.data.double() * factor.reshape(shape)).to(weight.data.dtype)
        inputs: list[Value | None] = [
            found["x"],
            constant(f"{norm.output.name}.weight", scaled),
            constant(f"{norm.output.name}.bias", shift.to(weight.data.dtype)),
        ]
        return Node(product.op, inputs, [], dict(product.attributes), product.name)

    product = op("Conv|ConvTranspose|Gemm", any_("x"), constant_("w"))
    return rewrite(graph, [op("BatchNormalization", product, *_PARAMETERS, **_INFERENCE)], into_product)


def lower_batch_norm(graph: Graph) -> Graph:
    """One that no product took, in float32, as a multiplication and an addition, which fuse with what is around."""
    pattern = op("BatchNormalization", any_("x"), *_PARAMETERS, **_INFERENCE)
    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            lower_batch_norm(subgraph)
        found = match(node.output, pattern) if len([value for value in node.outputs if value.name]) == 1 else None
        if found is None or found["x"].dtype is not DType.FLOAT32 or (found["x"].rank or 0) < 2:
            continue
        x = found["x"]
        per_channel = [-1, *[1] * ((x.rank or 0) - 2)]
        factor, shift = (
            row.float().reshape(per_channel) for row in _affine(found, node.attributes.get("epsilon", 1e-5))
        )
        name = node.output.name
        scaled = insert_before(graph, node, Node("Mul", [x, constant(f"{name}.factor", factor)], []))
        scaled.dtype, scaled.shape = x.dtype, x.shape
        replace_node(graph, node, Node("Add", [scaled, constant(f"{name}.shift", shift)], []))
    return graph
