"""Transposes moved and cancelled."""

from __future__ import annotations

from trine.graph.ir import Graph, Node
from trine.graph.passes.pattern import Match, any_, op, rewrite


def _perm(node: Node) -> list[int]:
    x = node.inputs[0]
    assert x is not None
    rank = x.rank if x.rank is not None else 0
    return list(node.attributes.get("perm", reversed(range(rank))))


def _is_matrices(node: Node) -> bool:
    return _perm(node) == [0, 2, 1]


def unfold_transposes(graph: Graph) -> Graph:
    """Matrices turned in three dimensions, with reshapes from four and back, are turned in four: no copy in between."""

    def build(found: Match) -> Node | None:
        x, folded, last = found["x"], found.nodes[-1].output, found.nodes[0].output
        if x.shape is None or folded.shape is None or last.shape is None or len(x.shape) != 4 or len(last.shape) != 4:
            return None
        a, b, rows, columns = x.shape
        if folded.shape[1:] != (rows, columns) or last.shape != (a, b, columns, rows):
            return None
        return Node("Transpose", [x], [], {"perm": [0, 1, 3, 2]})

    pattern = op("Reshape", op("Transpose", op("Reshape", any_("x"), any_("3d")), test=_is_matrices), any_("4d"))
    return rewrite(graph, [pattern], build)


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
