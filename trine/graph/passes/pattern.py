"""Patterns of nodes, and their replacement. A fusion says what it looks for and what it puts there:

GELU = op("Mul", op("Mul", any_("x"), number(0.5)), op("Add", op("Erf", …), number(1)))

def fuse_gelu(graph):
    return rewrite(graph, [GELU], lambda found: Node("Gelu", [found["x"]], []))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch

from trine.graph.ir import Graph, Node, Value

_COMMUTATIVE = {"Add", "Mul", "Max", "Min", "And", "Or"}


@dataclass(frozen=True)
class Pattern:
    """What a value must be. Kinds: "op" (made by such a node), "any", "number" (a constant of one element)."""

    kind: str
    name: str = ""
    inputs: tuple[Pattern, ...] = ()
    value: float = 0.0
    test: Callable[[Any], bool] | None = None


def op(name: str, *inputs: Pattern, test: Callable[[Node], bool] | None = None) -> Pattern:
    """A node of operator `name` (bars between alternatives) that passes `test`; operands of Add … in any order."""
    return Pattern("op", name, inputs, test=test)


def any_(name: str) -> Pattern:
    """Any value, the same one wherever the name occurs."""
    return Pattern("any", name)


def constant(name: str, test: Callable[[torch.Tensor], bool] | None = None) -> Pattern:
    """A constant that passes `test` on its tensor."""
    return Pattern("constant", name, test=test)


def number(value: float) -> Pattern:
    """A constant of one element near `value`."""
    return Pattern("number", value=value)


@dataclass
class Match:
    """Values by the pattern's names, and the nodes inside, the root first."""

    values: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    def __getitem__(self, name: str) -> Value:
        return self.values[name]

    def copy(self) -> Match:
        return Match(dict(self.values), list(self.nodes))

    def scalar(self, name: str) -> float:
        """The number in a constant of one element."""
        return float(self.values[name].data.reshape(()))


def match(value: Value | None, pattern: Pattern, found: Match | None = None) -> Match | None:
    """How `value` fits the pattern, or None."""
    found = Match() if found is None else found
    if value is None:
        return None
    if pattern.kind == "any":
        return found if found.values.setdefault(pattern.name, value) is value else None
    if pattern.kind in ("number", "constant"):
        return found if _fits_constant(value, pattern, found) else None
    node = value.producer
    if node is None or node.op not in pattern.name.split("|") or (pattern.test is not None and not pattern.test(node)):
        return None
    if len([item for item in node.inputs if item is not None]) < len(pattern.inputs):
        return None
    orders = permutations(pattern.inputs) if node.op in _COMMUTATIVE else [pattern.inputs]
    for order in orders:
        attempt: Match | None = found.copy()
        assert attempt is not None
        attempt.nodes.append(node)
        for item, wanted in zip(node.inputs, order, strict=False):
            attempt = match(item, wanted, attempt)
            if attempt is None:
                break
        if attempt is not None:
            return attempt
    return None


def _fits_constant(value: Value, pattern: Pattern, found: Match) -> bool:
    data = value.data
    if not isinstance(data, torch.Tensor):
        return False
    if pattern.kind == "constant":
        same = found.values.setdefault(pattern.name, value) is value
        return same and (pattern.test is None or pattern.test(data))
    if data.numel() != 1 or data.is_complex() or data.dim() > 1:
        return False
    return abs(float(data.reshape(())) - pattern.value) <= 1e-4 * abs(pattern.value)


def is_scalar(data: torch.Tensor) -> bool:
    return data.numel() == 1


def rewrite(graph: Graph, patterns: Sequence[Pattern], build: Callable[[Match], Node | None]) -> Graph:
    """Replace each match by the node that `build` makes of it (without outputs), or leave it where that is None.

    Nodes inside a match whose results someone else reads are kept for them; the root's one output is replaced.
    """
    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            rewrite(subgraph, patterns, build)
        if len([value for value in node.outputs if value.name]) != 1:
            continue
        for pattern in patterns:
            found = match(node.output, pattern)
            made = None if found is None else build(found)
            if made is not None:
                replace_node(graph, node, made)
                break
    remove_unread(graph)
    return graph


def replace_node(graph: Graph, old: Node, new: Node) -> None:
    """Put `new` where `old` stands; it makes old's first output, which keeps its identity."""
    output = old.output
    new.outputs = [output]
    output.producer = new
    new.name = new.name or old.name
    graph.nodes[graph.nodes.index(old)] = new
    old.outputs = [Value("")]


def insert_before(graph: Graph, node: Node, new: Node) -> Value:
    """Add `new`, with one output made here, before `node`."""
    if not new.outputs:
        new.outputs = [Value(f"{node.output.name}.{new.op}.{len(graph.nodes)}")]
        new.outputs[0].producer = new
    new.name = new.name or node.name
    graph.nodes.insert(graph.nodes.index(node), new)
    return new.output


def remove_unread(graph: Graph) -> None:
    """Drop nodes of which nothing is read any more."""
    needed = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if any(value in needed for value in node.outputs):
            needed.update(node.reads())
            kept.append(node)
    graph.nodes[:] = kept[::-1]
