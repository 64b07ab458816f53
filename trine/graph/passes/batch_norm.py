"""BatchNormalization in inference is a scale and a shift a channel: the convolution before it can do it."""

from __future__ import annotations

import torch

from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.passes.pattern import Match, any_, op, rewrite
from trine.graph.passes.pattern import constant as constant_

_PARAMETERS = tuple(constant_(name) for name in ("scale", "bias", "mean", "variance"))
_INFERENCE = {"test": lambda node: not node.attributes.get("training_mode", 0)}


def _affine(found: Match, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift, in double precision, that the normalisation amounts to."""
    scale, bias, mean, variance = (found[name].data.double() for name in ("scale", "bias", "mean", "variance"))
    factor = scale / torch.sqrt(variance + epsilon)
    return factor, bias - mean * factor


def fold_batch_norm(graph: Graph) -> Graph:
    """Into the weight and bias of a convolution that nobody else reads."""
    users = graph.users()
    outputs = set(graph.outputs)

    def into_convolution(found: Match) -> Node | None:
        norm, conv = found.nodes[:2]
        if len(users.get(conv.output, [])) != 1 or conv.output in outputs:
            return None
        weight = found["w"]
        factor, shift = _affine(found, norm.attributes.get("epsilon", 1e-5))
        given = conv.input(2)
        if given is not None and not given.is_constant:
            return None
        if given is not None:
            shift = shift + given.data.double() * factor
        shape = [-1, *[1] * (weight.data.dim() - 1)]
        scaled = (weight.data.double() * factor.reshape(shape)).to(weight.data.dtype)
        inputs: list[Value | None] = [
            found["x"],
            constant(f"{norm.output.name}.weight", scaled),
            constant(f"{norm.output.name}.bias", shift.to(weight.data.dtype)),
        ]
        return Node("Conv", inputs, [], dict(conv.attributes), conv.name)

    pattern = op("BatchNormalization", op("Conv", any_("x"), constant_("w")), *_PARAMETERS, **_INFERENCE)
    return rewrite(graph, [pattern], into_convolution)
