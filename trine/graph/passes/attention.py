"""Attention, recognised by its softmax between two products."""

from __future__ import annotations

from trine.graph.dims import broadcast
from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value
from trine.graph.passes.pattern import Match, Pattern, any_, constant, insert_before, is_scalar, number, op, rewrite

_SCORES = op("MatMul", any_("q"), any_("k"))
_SCALE = constant("scale", is_scalar)
_SCALED = [op("Mul", _SCORES, _SCALE), op("Div", _SCORES, _SCALE), _SCORES]


def _last_axis(node: Node) -> bool:
    x = node.input(0)
    axis = node.attributes.get("axis", -1)
    return axis == -1 or (x is not None and x.rank is not None and axis == x.rank - 1)


def _guarded(weights: Pattern) -> Pattern:
    """Weights that are not a number, since a row's mask hides every key, are 0: as exporters of torch write it."""
    return op("Where", op("IsNaN", weights), number(0), weights)


_MASKED = [
    masked
    for scaled in _SCALED
    for masked in (op("Add", op("Add", scaled, any_("mask")), any_("more")), op("Add", scaled, any_("mask")), scaled)
]
_WEIGHTS = [op("Softmax", masked, test=_last_axis) for masked in _MASKED]
PATTERNS = [op("MatMul", w, any_("v")) for weights in _WEIGHTS for w in (weights, _guarded(weights))]


def fuse_attention(graph: Graph) -> Graph:
    """softmax(q k scale + mask) v as one operator; k stays [..., D, S] as the product had it (a view costs nothing)."""

    def build(found: Match) -> Node | None:
        q, k, v = found["q"], found["k"], found["v"]
        if any(value.dtype is not DType.FLOAT32 or value.rank != 4 for value in (q, k, v)):
            return None
        masks = [found[name] for name in ("mask", "more") if name in found.values]
        scores = next(node for node in found.nodes[1:] if node.op == "MatMul").output
        if not all(_broadcasts(mask, scores) for mask in masks):
            return None
        scale = 1.0
        if "scale" in found.values:
            divided = any(node.op == "Div" for node in found.nodes)
            scale = 1 / found.scalar("scale") if divided else found.scalar("scale")
        mask = masks[0] if masks else None
        if len(masks) > 1:
            mask = _sum(graph, found.nodes[0], *masks)
        q, left = _unscaled(q)
        k, right = _unscaled(k)
        attributes = {"scale": scale * left * right, "k_transposed": 1}
        if any(node.op == "IsNaN" for node in found.nodes):
            attributes["guarded"] = 1
        return Node("ScaledDotProductAttention", [q, k, v, mask], [], attributes)

    return rewrite(graph, PATTERNS, build)


def _sum(graph: Graph, node: Node, a: Value, b: Value) -> Value:
    """A node before `node` that adds two masks."""
    total = insert_before(graph, node, Node("Add", [a, b], []))
    total.dtype, total.shape = a.dtype, broadcast(a.shape or (), b.shape or ())
    return total


def _broadcasts(mask: Value, scores: Value) -> bool:
    """That nothing says the mask is larger than the scores in some dimension."""
    if mask.shape is None or scores.shape is None or len(mask.shape) > len(scores.shape):
        return False
    pairs = zip(reversed(mask.shape), reversed(scores.shape), strict=False)
    return all(a in (1, b) or isinstance(a, str) for a, b in pairs)


def _unscaled(value: Value) -> tuple[Value, float]:
    """What a multiplication by a number was applied to, and the number."""
    node = value.producer
    if node is not None and node.op == "Mul":
        for x, factor in (node.inputs, node.inputs[::-1]):
            if x is not None and factor is not None and factor.is_constant and factor.data.numel() == 1 and x.rank == 4:
                return x, float(factor.data.reshape(()))
    return value, 1.0
