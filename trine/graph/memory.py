"""What a graph's intermediate values take: all together, and at the busiest moment of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trine.graph.ir import Graph, Node, Value

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Expand", "Split", "Slice"})
"""Operators whose result lies in their first input's memory."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of intermediates: `total` of all, `peak` of those alive at once, and the node where that is."""

    total: int
    peak: int
    at: str


def memory_use(graph: Graph, sizes: Mapping[Value, int] | None = None) -> MemoryUse | None:
    """From shapes, or from `sizes` where shapes are open; None where neither says. Inputs and constants aside."""
    roots: dict[Value, Value] = {}
    last: dict[Value, int] = {}
    for index, node in enumerate(graph.nodes):
        for value in node.reads():
            last[roots.get(value, value)] = index
        if node.op in VIEWS and node.inputs[0] is not None:
            source = node.inputs[0]
            for value in node.outputs:
                roots[value] = roots.get(source, source)
    for value in graph.outputs:
        last[roots.get(value, value)] = len(graph.nodes)
    return _walk(graph, roots, last, sizes or {})


def _walk(
    graph: Graph, roots: dict[Value, Value], last: dict[Value, int], sizes: Mapping[Value, int]
) -> MemoryUse | None:
    alive: dict[Value, int] = {}
    total, peak, place = 0, 0, ""
    for index, node in enumerate(graph.nodes):
        for value in node.outputs:
            if value in roots or not value.name:
                continue
            size = sizes.get(value, value.nbytes)
            if size is None:
                return None
            total += size
            alive[value] = size
        if sum(alive.values()) > peak:
            peak, place = sum(alive.values()), _name(node)
        alive = {value: size for value, size in alive.items() if last.get(value, -1) > index}
    return MemoryUse(total, peak, place)


def _name(node: Node) -> str:
    return node.name or node.op
