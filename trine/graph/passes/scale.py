"""A constant that scales each column of a product belongs into the product's weight: layer scale, for example."""

from __future__ import annotations

import torch

from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.passes.convolution import absorb_followers
from trine.graph.passes.pattern import Match, any_, op, rewrite
from trine.graph.passes.pattern import constant as constant_


def fold_scale(graph: Graph) -> Graph:
    """Linear times a constant row (or number), where nobody else reads the product, as a Linear of scaled weights."""
    users, outputs = graph.users(), set(graph.outputs)

    def build(found: Match) -> Node | None:
        times, linear = found.nodes
        weight, bias, residual = linear.inputs[1], linear.input(2), linear.input(3)
        if residual is not None or linear.attributes["activation"] or weight is None or not weight.is_constant:
            return None
        alone = len(users.get(linear.output, [])) == 1 and linear.output not in outputs
        factor = found["scale"].data
        rows = weight.data.shape[0]
        if not alone or factor.numel() not in (1, rows) or factor.shape[-1:] not in ((), (1,), (rows,)):
            return None
        if factor.dtype is not weight.data.dtype or factor.dim() > (linear.output.rank or 0):
            return None
        if bias is not None and not bias.is_constant:
            return None
        row = factor.reshape(-1)
        scaled = constant(f"{times.output.name}.weight", weight.data * row[:, None])
        shifted: Value | None = None
        if bias is not None:
            shifted = constant(f"{times.output.name}.bias", bias.data * row)
        return Node("Linear", [linear.inputs[0], scaled, shifted], [], dict(linear.attributes), linear.name)

    pattern = op("Mul", op("Linear", any_("x")), constant_("scale", torch.Tensor.is_floating_point))
    rewrite(graph, [pattern], build)
    absorb_followers(graph, "Linear", 3)
    return graph
