"""What the rules share: how one is registered, what it may ask, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from trine.graph.dims import broadcast
from trine.graph.dtypes import DType
from trine.graph.errors import UnsupportedOperatorError
from trine.graph.ir import Dim, Node, Shape, Value

Fact: TypeAlias = tuple[DType | None, Shape | None]
Facts: TypeAlias = list[Fact]


class Context(Protocol):
    """What a rule may ask."""

    def elements(self, value: Value | None) -> tuple[Dim, ...] | None:
        """The contents of a small integer vector (or scalar), if known."""


Rule = Callable[[Node, Context], Facts]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = function
        return function

    return register


def refuse(node: Node, reason: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(node.op, node.name, reason)


def first(node: Node) -> Value:
    x = node.input(0)
    if x is None:
        raise refuse(node, "needs its first input")
    return x


def axis_of(node: Node, rank: int, default: int) -> int:
    axis: int = node.attributes.get("axis", default)
    if not -rank <= axis < rank:
        raise refuse(node, f"has axis {axis}, but its input has {rank} dimensions")
    return axis % rank


def same_types(node: Node, values: list[Value]) -> DType | None:
    kinds = [value.dtype for value in values if value.dtype is not None]
    if len(set(kinds)) > 1:
        raise refuse(node, f"has operands of types {kinds[0]} and {next(k for k in kinds if k is not kinds[0])}")
    return kinds[0] if kinds else None


def broadcast_all(node: Node, values: list[Value]) -> Shape | None:
    shape: Shape = ()
    for value in values:
        if value.shape is None:
            return None
        joined = broadcast(shape, value.shape)
        if joined is None:
            raise refuse(node, f"can't broadcast {' and '.join(str(list(v.shape or ())) for v in values)}")
        shape = joined
    return shape


def present(node: Node) -> list[Value]:
    return [value for value in node.inputs if value is not None]
