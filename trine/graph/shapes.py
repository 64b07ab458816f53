"""Types and shapes of values from those of a node's inputs, with symbols for what is known only when a plan runs.

A rule gives (dtype, shape) of each output; a shape of None means that not even the rank is known.
Small integer vectors are followed through the arithmetic that models do on shapes (Shape, Gather, Concat, …, Reshape).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trine.graph.dims import add, floor_divide, multiply, subtract
from trine.graph.errors import UnsupportedOperatorError
from trine.graph.ir import Dim, Graph, Node, Value
from trine.graph.operators.room import bytes_of, largest
from trine.graph.shape_rules import RULES, Context, Facts, refuse

_LONGEST_VECTOR = 64


class Inference(Context):
    """Visits nodes in order; keeps what is known of the contents of small integer vectors."""

    def __init__(self) -> None:
        self.contents: dict[Value, tuple[Dim, ...]] = {}

    def run(self, graph: Graph) -> None:
        """Every node of the graph and its subgraphs."""
        for value in graph.constants():
            self.learn_constant(value)
        for node in graph.nodes:
            for subgraph in node.subgraphs:
                self.run(subgraph)
            self.visit(node)

    def learn_constant(self, value: Value) -> None:
        data = value.data
        if (
            isinstance(data, torch.Tensor)
            and data.dtype in (torch.int64, torch.int32)
            and data.dim() <= 1
            and data.numel() <= _LONGEST_VECTOR
        ):
            self.contents[value] = tuple(int(item) for item in data.reshape(-1).tolist())

    def elements(self, value: Value | None) -> tuple[Dim, ...] | None:
        return None if value is None else self.contents.get(value)

    def visit(self, node: Node) -> None:
        """Set dtype and shape of the node's outputs, as far as they follow from its inputs."""
        facts = self._facts(node)
        for value, (dtype, shape) in zip(node.outputs, facts, strict=False):
            value.dtype = dtype if dtype is not None else value.dtype
            value.shape = shape if shape is not None else value.shape
            if any(isinstance(dim, int) and dim < 0 for dim in value.shape or ()):
                raise refuse(node, f"makes a tensor of shape {list(value.shape or ())}")
            sizes, itemsize = value.static_shape, 1 if value.dtype is None else value.dtype.numpy.itemsize
            if sizes is not None and bytes_of(sizes, itemsize) > largest():
                raise UnsupportedOperatorError(
                    node.op,
                    node.name,
                    f"makes a tensor {list(value.shape or ())}, which is larger than this machine's memory",
                )
        self._follow(node)

    def _facts(self, node: Node) -> Facts:
        rule = RULES.get(node.op)
        try:
            return [] if rule is None else rule(node, self)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise refuse(node, f"has inputs and attributes that don't go together ({reason})") from error

    def _follow(self, node: Node) -> None:
        """The contents of a small integer vector that the node makes."""
        found = _contents(node, self)
        if found is not None and len(found) <= _LONGEST_VECTOR:
            self.contents[node.output] = found


def infer_shapes(graph: Graph) -> Graph:
    """The pass: dtype and shape of every value, in place."""
    Inference().run(graph)
    return graph


def _contents(node: Node, context: Context) -> tuple[Dim, ...] | None:
    op, x = node.op, node.input(0)
    if op == "Shape" and x is not None and x.shape is not None:
        rank = len(x.shape)
        start, end = node.attributes.get("start", 0), node.attributes.get("end")
        return x.shape[slice(start, rank if end is None else end)]
    if op == "Size" and x is not None and x.shape is not None:
        return (multiply(*x.shape),)
    arrays = [context.elements(value) for value in node.inputs if value is not None]
    if not arrays or arrays[0] is None:
        return None
    first = arrays[0]
    if op in ("Squeeze", "Unsqueeze", "Identity", "Reshape") or (op == "Cast" and node.attributes["to"] in (6, 7)):
        return first if node.output.rank in (0, 1) else None
    if any(array is None for array in arrays):
        return None
    known: list[tuple[Dim, ...]] = [array for array in arrays if array is not None]
    if op == "Concat":
        return tuple(dim for array in known for dim in array)
    if op == "Gather" and len(known) == 2 and node.output.rank in (0, 1):
        places = [place for place in known[1] if isinstance(place, int) and -len(first) <= place < len(first)]
        return tuple(first[place] for place in places) if len(places) == len(known[1]) else None
    if op == "Slice":
        return _sliced(known)
    if op in ("Add", "Sub", "Mul", "Div") and len(known) == 2:
        return _arithmetic(op, *known)
    if op == "Equal" and len(known) == 2 and len(known[0]) == len(known[1]):
        return _equal(*known)
    if op == "Where" and len(known) == 3 and len({len(array) for array in known}) == 1:
        return tuple(a if chosen else b for chosen, a, b in zip(*known, strict=True))
    return None


def _sliced(known: list[tuple[Dim, ...]]) -> tuple[Dim, ...] | None:
    first, *bounds = known
    numbers: list[Any] = [array[0] if len(array) == 1 else None for array in bounds]
    if len(numbers) < 2 or not all(isinstance(number, int) for number in numbers):
        return None
    return first[slice(numbers[0], numbers[1], numbers[3] if len(numbers) > 3 else 1)]


def _equal(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """1 and 0; None where it is not known. A dimension is no negative number."""
    found: list[Dim] = []
    for x, y in zip(a, b, strict=True):
        symbols = [dim for dim in (x, y) if isinstance(dim, str)]
        negative = any(isinstance(dim, int) and dim < 0 for dim in (x, y))
        if x != y and symbols and not negative:
            return None
        found.append(int(x == y))
    return tuple(found)


_DIM_FUNCTIONS: dict[str, Callable[[Dim, Dim], Dim]] = {
    "Add": add,
    "Sub": subtract,
    "Mul": multiply,
    "Div": floor_divide,
}


def _arithmetic(op: str, a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    if len(a) != len(b):
        if 1 not in (len(a), len(b)):
            return None
        a, b = (a * len(b) if len(a) == 1 else a), (b * len(a) if len(b) == 1 else b)
    if op == "Div" and any(isinstance(dim, int) and dim <= 0 for dim in (*a, *b)):
        return None
    return tuple(_DIM_FUNCTIONS[op](x, y) for x, y in zip(a, b, strict=True))
