"""GELU and SiLU, which exporters write out in small steps."""

from __future__ import annotations

from math import pi, sqrt

from trine.graph.ir import Graph, Node
from trine.graph.passes.pattern import Match, Pattern, any_, constant, is_scalar, number, op, rewrite

X = any_("x")


def _halved(inner: Pattern) -> list[Pattern]:
    """x * inner / 2 in the orders in which it is written."""
    return [
        op("Mul", op("Mul", X, inner), number(0.5)),
        op("Mul", op("Mul", X, number(0.5)), inner),
        op("Mul", X, op("Mul", inner, number(0.5))),
        op("Div", op("Mul", X, inner), number(2)),
    ]


_SCALED = (op("Div", X, number(sqrt(2))), op("Mul", X, number(sqrt(0.5))))
EXACT = [pattern for scaled in _SCALED for pattern in _halved(op("Add", op("Erf", scaled), number(1)))]

_CUBES = (op("Pow", X, number(3)), op("Mul", op("Mul", X, X), X))
_INNER = [op("Add", X, op("Mul", cube, number(0.044715))) for cube in _CUBES]
TANH = [
    pattern
    for inner in _INNER
    for pattern in _halved(op("Add", op("Tanh", op("Mul", inner, number(sqrt(2 / pi)))), number(1)))
]

SILU = [op("Mul", X, op("Sigmoid", X)), op("Mul", X, op("Sigmoid", op("Mul", X, constant("alpha", is_scalar))))]


def fuse_gelu(graph: Graph) -> Graph:
    """x Φ(x), by the error function or its tanh approximation (Hendrycks and Gimpel, 2016)."""
    rewrite(graph, EXACT, lambda found: Node("Gelu", [found["x"]], []))
    return rewrite(graph, TANH, lambda found: Node("Gelu", [found["x"]], [], {"approximate": "tanh"}))


def fuse_silu(graph: Graph) -> Graph:
    """x times its logistic function, or that of x times a number (as in CLIP)."""

    def build(found: Match) -> Node:
        if "alpha" not in found.values:
            return Node("Swish", [found["x"]], [])
        return Node("Swish", [found["x"]], [], {"alpha": found.scalar("alpha")})

    return rewrite(graph, SILU, build)
