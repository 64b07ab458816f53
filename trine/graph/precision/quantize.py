"""Gives nodes a lower precision: what is quantised where, and with which scales.

The result is a graph with QuantizeLinear and DequantizeLinear around what was chosen, as an exporter would write it;
`trine.graph.passes.quantized` folds them. Activations become uint8 with a zero point, which spends every step on the
range that occurs (after a ReLU, none on negative numbers) and costs nothing: a product's share of the zero point is a
constant of each output channel. Weights are int8, symmetric, with a scale for each output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from trine.graph.dtypes import DType
from trine.graph.fitting_weights import rounded
from trine.graph.ir import Graph, Node, Value, constant
from trine.graph.passes.pattern import replace_node
from trine.graph.passes.quantized import fuse_quantized
from trine.graph.precision.equalise import equalise
from trine.graph.precision.ranges import Range

PRODUCTS = ("FusedConv", "Linear")
_MOVES = frozenset(
    ["MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "DepthToSpace", "Identity"]
)
"""Operators that do the same to integers as to what these stand for, where all have one scale."""
_FLOAT8_LARGEST = 448.0  # of e4m3


def quantizable(graph: Graph) -> list[Node]:
    """The nodes that a lower precision makes faster: products by constant weights, in float32."""
    return [node for node in graph.nodes if node.op in PRODUCTS and _weight(node) is not None]


def _weight(node: Node) -> torch.Tensor | None:
    """The float32 weight, if it is a constant, the bias, too, and no sum is too long for an int32."""
    w, bias = node.inputs[1], node.input(2)
    if w is None or not w.is_constant or w.dtype is not DType.FLOAT32 or w.data.dim() < 2:
        return None
    if bias is not None and not bias.is_constant:
        return None
    data: torch.Tensor = w.data
    if node.inputs[0] is None or not 0 < data[0].numel() < (1 << 16):
        return None
    return data if bool(torch.isfinite(torch.stack(torch.aminmax(data))).all()) else None


@dataclass(frozen=True)
class Format:
    """How numbers are stored: 8-bit integers or floats."""

    activations: DType
    weights: DType


INTEGERS = Format(DType.UINT8, DType.INT8)
FLOATS = Format(DType.FLOAT8E4M3FN, DType.FLOAT8E4M3FN)


def quantize(graph: Graph, nodes: Collection[Node], ranges: Mapping[str, Range], form: Format = INTEGERS) -> None:
    """Make the nodes of `quantizable` that are among `nodes`, and what joins them, 8 bits wide. In place."""
    chosen = {node for node in nodes if _weight(node) is not None and node.inputs[0] and node.inputs[0].name in ranges}
    ranges = dict(ranges)
    if form is INTEGERS:
        equalise(graph, chosen, ranges)
    plan = _Plan(graph, chosen, ranges)
    pairs: dict[Value, Value] = {}
    for node in list(graph.nodes):
        readers = plan.rewritten_inputs(node)
        for index in readers:
            value = node.inputs[index]
            assert value is not None
            if value not in pairs:
                pairs[value] = _pair(graph, value, plan.range(value), form)
            node.inputs[index] = pairs[value]
        if node in chosen:
            _quantize_weight(graph, node, form)
    graph.verify()
    fuse_quantized(graph)


class _Plan:
    """Which values become integers, and which of them must share a scale."""

    def __init__(self, graph: Graph, chosen: set[Node], ranges: Mapping[str, Range]) -> None:
        self.graph, self.chosen, self.ranges = graph, chosen, ranges
        self.users = graph.users()
        self.group: dict[Value, Value] = {}
        self.integer: set[Value] = set()
        for node in chosen:
            self._want(node.inputs[0])
        self._spread()
        self._join()
        self.shared: dict[Value, Range] = {}
        for value in [*self.group, *self.integer]:
            root, found = self._root(value), ranges[value.name]
            known = self.shared.get(root, found)
            self.shared[root] = Range(min(known.low, found.low), max(known.high, found.high))

    def _want(self, value: Value | None) -> bool:
        if value is None or value in self.integer or value.is_constant or value.name not in self.ranges:
            return False
        self.integer.add(value)
        return True

    def _spread(self) -> None:
        """Up and down through what moves values: a pooling before a quantised convolution works on integers, too."""
        changed = True
        while changed:
            changed = False
            for node in reversed(self.graph.nodes):
                if self._moves(node) and node.output in self.integer and self._made_of_integers(node):
                    wanted = [self._want(value) for value in self._moved(node)]
                    changed |= any(wanted)
                if node in self.chosen and node.op == "FusedConv" and self._only_for_integers(node):
                    changed |= self._want(node.output)

    def _made_of_integers(self, node: Node) -> bool:
        """Whether anything gains from the operator's inputs being integers: quantised nodes make them."""
        makers = [value.producer for value in self._moved(node)]
        return all(value.name in self.ranges for value in self._moved(node)) and any(
            maker is not None and (maker in self.chosen or self._moves(maker)) for maker in makers
        )

    def _only_for_integers(self, node: Node) -> bool:
        """Whether all that read a convolution's result are quantised convolutions, or averages."""
        readers = self.users.get(node.output, [])
        return (
            bool(readers)
            and node.output not in self.graph.outputs
            and all(reader.op == "GlobalAveragePool" or self._takes_sum(reader, node.output) for reader in readers)
        )

    def _takes_sum(self, reader: Node, value: Value) -> bool:
        return reader in self.chosen and reader.op == "FusedConv" and value in (reader.inputs[0], reader.input(3))

    @staticmethod
    def _moves(node: Node) -> bool:
        named = sum(bool(value.name) for value in node.outputs)
        return node.op in _MOVES and named == 1 and node.output.dtype is DType.FLOAT32

    @staticmethod
    def _moved(node: Node) -> list[Value]:
        values = node.inputs if node.op == "Concat" else node.inputs[:1]
        return [value for value in values if value is not None]

    def _join(self) -> None:
        """One scale for what a moving operator reads and makes."""
        for node in self.graph.nodes:
            if not self._moves(node) or node.output not in self.integer:
                continue
            if all(value in self.integer for value in self._moved(node)):
                for value in self._moved(node):
                    self.group[self._root(value)] = self._root(node.output)

    def _root(self, value: Value) -> Value:
        while self.group.get(value, value) is not value:
            value = self.group[value]
        return value

    def range(self, value: Value) -> Range:
        return self.shared[self._root(value)]

    def rewritten_inputs(self, node: Node) -> list[int]:
        """The inputs that the node reads as integers."""
        found = []
        moves = self._moves(node) and node.output in self.integer
        moves = moves and all(value in self.integer for value in self._moved(node))
        for index, value in enumerate(node.inputs):
            if value is None or value not in self.integer:
                continue
            made = value.producer
            stays_integer = made is not None and (made in self.chosen or self._moves(made))
            # What a node in float32 made is there in float32: others than these read that.
            if stays_integer or moves or (node in self.chosen and index == 0):
                found.append(index)
        return found


def _pair(graph: Graph, value: Value, found: Range, form: Format) -> Value:
    """`value` after QuantizeLinear and DequantizeLinear, which are put where it is made."""
    if form is INTEGERS:
        scale, zero = found.scale(form.activations)
    else:
        scale, zero = max(-found.low, found.high, 1e-30) / _FLOAT8_LARGEST, 0
    scales = constant(f"{value.name}.scale", torch.tensor(scale, dtype=torch.float32))
    zeros = constant(f"{value.name}.zero", torch.tensor(zero).to(form.activations.torch))
    stored = Value(f"{value.name}.{form.activations}", form.activations, value.shape)
    real = Value(f"{value.name}.dequantized", DType.FLOAT32, value.shape)
    nodes = [
        Node("QuantizeLinear", [value, scales, zeros], [stored], {}, f"{value.name}.quantize"),
        Node("DequantizeLinear", [stored, scales, zeros], [real], {}, f"{value.name}.dequantize"),
    ]
    place = 0 if value.producer is None else graph.nodes.index(value.producer) + 1
    graph.nodes[place:place] = nodes
    return real


def _quantize_weight(graph: Graph, node: Node, form: Format) -> None:
    w = node.inputs[1]
    assert w is not None
    data: torch.Tensor = w.data
    if form is INTEGERS:
        stored, scales = rounded(data, depthwise=data.shape[1] == 1 and node.attributes.get("group", 1) > 1)
    else:
        largest = data.flatten(1).abs().amax(1)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        scales = largest / _FLOAT8_LARGEST
        stored = (data / _along(scales, data)).to(form.weights.torch)
    name = f"{node.output.name}.weight"
    real = Value(f"{name}.dequantized", DType.FLOAT32, w.shape)
    inputs: list[Value | None] = [constant(f"{name}.stored", stored), constant(f"{name}.scales", scales)]
    made = Node("DequantizeLinear", inputs, [real], {"axis": 0}, f"{name}.dequantize")
    graph.nodes.insert(graph.nodes.index(node), made)
    node.inputs[1] = real


def _along(scales: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """One number for each filter, to broadcast over the filters."""
    return scales.reshape(-1, *[1] * (data.dim() - 1))


def reduce(graph: Graph, nodes: Collection[Node], dtype: DType) -> None:
    """Give the nodes weights in bfloat16 or float16; they round their input to it, and sum in float32. In place."""
    for node in nodes:
        data = _weight(node)
        if data is None:
            continue
        w = constant(f"{node.output.name}.{dtype}", _within(data, dtype).to(dtype.torch))
        op = "ReducedConv" if node.op == "FusedConv" else "ReducedLinear"
        replace_node(graph, node, Node(op, [node.inputs[0], w, *node.inputs[2:]], [], node.attributes, node.name))
    graph.verify()


def _within(data: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Held to what the type can tell from infinity."""
    limit = torch.finfo(dtype.torch).max
    return data.clamp(-limit, limit)


LOWER: dict[str, Callable[[Graph, Collection[Node], Mapping[str, Range]], None]] = {
    "bf16": lambda graph, nodes, ranges: reduce(graph, nodes, DType.BFLOAT16),
    "fp16": lambda graph, nodes, ranges: reduce(graph, nodes, DType.FLOAT16),
    "int8": lambda graph, nodes, ranges: quantize(graph, nodes, ranges),
    "fp8": lambda graph, nodes, ranges: quantize(graph, nodes, ranges, FLOATS),
}
"""What `precision` does to the nodes that it is given to."""
PRECISIONS = ("fp32", *LOWER)
