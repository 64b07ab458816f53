"""Channels made alike before they share one scale.

Transformers have a few channels that are many times as large as the others: spread over them, eight bits leave the
others little. A product does not change when a channel of its input is divided by a number that its weights are
multiplied by, and weights have room (after Xiao and others, "SmoothQuant", 2023; that also weighs the weights' own
largest, which measured worse here: 2 to 7 dB on MiniLM's layers). The division is a product by a constant
before the rounding, which a quantised product before it does itself.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.precision.ranges import Range

_UNEQUAL = 2.5
"""The largest channel, over the mean of all: from here on it pays."""


_ROOM = 1.2
"""Other data goes beyond what calibration saw, in some channel: cutting costs more than coarser steps."""


def equalise(graph: Graph, nodes: Collection[Node], ranges: dict[str, Range]) -> None:
    """Divide what the Linear nodes among `nodes` read, and multiply their weights. `ranges` learns the new values'."""
    groups: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "Linear" and node in nodes and node.inputs[0] is not None:
            groups.setdefault(node.inputs[0], []).append(node)
    for value, readers in groups.items():
        found = ranges[value.name]
        if len(found.lows) == readers[0].inputs[1].data.shape[1]:  # type: ignore[union-attr]
            _equalise(graph, value, readers, found, ranges)


def _equalise(graph: Graph, value: Value, readers: list[Node], found: Range, ranges: dict[str, Range]) -> None:
    lows, highs = torch.tensor(found.lows), torch.tensor(found.highs)
    largest = torch.maximum(-lows, highs).clamp(min=0)
    if not largest.any() or float(largest.max() / largest.mean()) < _UNEQUAL:
        return
    # The square root leaves half of the differences to the weights, whose filters have scales of their own.
    factors = torch.where(largest > 0, largest, largest.new_ones(())).sqrt()
    factors = (factors / factors.log().mean().exp()).clamp(1e-3, 1e3)
    name = f"{value.name}.equal"
    made = Value(name, DType.FLOAT32, value.shape)
    divide = Node("Mul", [value, constant(f"{name}.factors", 1 / factors)], [made], {}, name)
    place = 0 if value.producer is None else graph.nodes.index(value.producer) + 1
    graph.nodes.insert(place, divide)
    ranges[name] = Range(_ROOM * float((lows / factors).min()), _ROOM * float((highs / factors).max()))
    for node in readers:
        weight = node.inputs[1]
        assert weight is not None
        node.inputs[0] = made
        node.inputs[1] = constant(f"{node.output.name}.equal.weight", weight.data * factors)
