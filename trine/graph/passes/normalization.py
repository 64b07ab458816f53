"""LayerNorm and RMSNorm, which exporters before opset 17 write out in small steps."""

from __future__ import annotations

from trine.graph.ir import Graph, Node
from trine.graph.passes.pattern import Match, Pattern, any_, constant, is_scalar, number, op, rewrite


def _over_last_axis(node: Node) -> bool:
    axes, x = node.input(1), node.input(0)
    if axes is None or not axes.is_constant or x is None or x.rank is None or not node.attributes.get("keepdims", 1):
        return False
    return axes.data.numel() == 1 and int(axes.data.reshape(())) in (-1, x.rank - 1)


def _mean(x: Pattern) -> Pattern:
    return op("ReduceMean", x, test=_over_last_axis)


X = any_("x")
_CENTRED = op("Sub", X, _mean(X))
_EPSILON = constant("epsilon", is_scalar)


def _normalised(numerator: Pattern, squares: list[Pattern]) -> list[Pattern]:
    """numerator over the root of the mean of squares."""
    patterns = []
    for square in squares:
        root = op("Sqrt", op("Add", _mean(square), _EPSILON))
        patterns += [op("Div", numerator, root), op("Mul", numerator, op("Reciprocal", root))]
        patterns.append(op("Mul", numerator, op("Div", number(1), root)))
    return patterns


_SCALE = constant("scale")
LAYER_NORM = [
    op("Add", op("Mul", normal, _SCALE), constant("bias"))
    for normal in _normalised(_CENTRED, [op("Pow", _CENTRED, number(2)), op("Mul", _CENTRED, _CENTRED)])
]
RMS_NORM = [op("Mul", normal, _SCALE) for normal in _normalised(X, [op("Pow", X, number(2)), op("Mul", X, X)])]


def _is_row(found: Match, name: str) -> bool:
    """A vector as long as x's last axis."""
    x, value = found["x"], found[name]
    return x.shape is not None and value.static_shape == x.shape[-1:] and value.dtype is x.dtype


def fuse_layer_norm(graph: Graph) -> Graph:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis."""

    def build(found: Match) -> Node | None:
        if not (_is_row(found, "scale") and _is_row(found, "bias")):
            return None
        attributes = {"axis": -1, "epsilon": found.scalar("epsilon")}
        return Node("LayerNormalization", [found["x"], found["scale"], found["bias"]], [], attributes)

    return rewrite(graph, LAYER_NORM, build)


def fuse_rms_norm(graph: Graph) -> Graph:
    """x / sqrt(mean(x²) + epsilon) * scale over the last axis."""

    def build(found: Match) -> Node | None:
        if not _is_row(found, "scale"):
            return None
        attributes = {"axis": -1, "epsilon": found.scalar("epsilon")}
        return Node("RMSNormalization", [found["x"], found["scale"]], [], attributes)

    return rewrite(graph, RMS_NORM, build)
