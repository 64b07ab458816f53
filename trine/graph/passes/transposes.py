"""Transposes moved and cancelled."""

from __future__ import annotations

from trine.graph.ir import Graph, Node
from trine.graph.passes.pattern import Match, any_, op, rewrite


def _perm(node: Node) -> list[int]:
    x = node.inputs[0]
    assert x is not None
    rank = x.rank if x.rank is not None else 0
    return list(node.attributes.get("perm", reversed(range(rank))))


def cancel_transposes(graph: Graph) -> Graph:
    """Two transposes in a row are one; one that changes nothing is none."""

    def join(found: Match) -> Node | None:
        outer, inner = found.nodes
        if found["x"].rank is None:
            return None
        first, second = _perm(inner), _perm(outer)
        perm = [first[axis] for axis in second]
        if perm == list(range(len(perm))):
            return Node("Identity", [found["x"]], [])
        return Node("Transpose", [found["x"]], [], {"perm": perm})

    return rewrite(graph, [op("Transpose", op("Transpose", any_("x")))], join)
