"""The intermediate representation: a graph of values and nodes. Its written specification is docs/graph-ir.md.

Objects are compared by identity. A node lists the values it reads and makes; a value knows the node that makes it, or
is a graph's input, or a constant with its data. Nodes stand in an order in which they can run. A subgraph (a branch
of If, the body of Loop or Scan) is an attribute of its node and reads the values of the graphs around it directly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import torch

from trine.graph.dtypes import DType
from trine.graph.errors import VerificationError

Dim: TypeAlias = int | str
"""A number, or the name of a number known when the plan runs: equal names in one graph are equal numbers."""
Shape: TypeAlias = tuple[Dim, ...]


@dataclass(eq=False, slots=True)
class Value:
    """What flows along an edge: a tensor unless `dtype` is None and a sequence, optional or unknown type is meant.

    `shape` is None when not even the rank is known. `data` makes it a constant (an object array for strings).
    """

    name: str
    dtype: DType | None = None
    shape: Shape | None = None
    data: Any = None
    producer: Node | None = None

    @property
    def is_constant(self) -> bool:
        return self.data is not None

    @property
    def static_shape(self) -> tuple[int, ...] | None:
        """The shape if every dimension is a number."""
        if self.shape is None or any(isinstance(dim, str) for dim in self.shape):
            return None
        return tuple(dim for dim in self.shape if isinstance(dim, int))

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def nbytes(self) -> int | None:
        """Of its elements, if the shape is static."""
        shape = self.static_shape
        return None if shape is None or self.dtype in (None, DType.STRING) else prod(shape) * self.dtype.torch.itemsize

    def __repr__(self) -> str:
        shape = "?" if self.shape is None else ",".join(map(str, self.shape))
        return f"%{self.name}:{self.dtype or '?'}[{shape}]"


@dataclass(eq=False, slots=True)
class Node:
    """One operation. An input that is left out is None, an output that nobody wants has an empty name.

    `origins` are the nodes of the model that it computes, for people.
    """

    op: str
    inputs: list[Value | None]
    outputs: list[Value]
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for value in self.outputs:
            value.producer = self

    @property
    def output(self) -> Value:
        """Its first output."""
        return self.outputs[0]

    @property
    def subgraphs(self) -> list[Graph]:
        return [attribute for attribute in self.attributes.values() if isinstance(attribute, Graph)]

    def input(self, index: int) -> Value | None:
        """Input `index`; None when it is left out or the node has fewer."""
        return self.inputs[index] if index < len(self.inputs) else None

    def reads(self) -> Iterator[Value]:
        """Every value it needs: its inputs, and what its subgraphs read from around them."""
        for value in self.inputs:
            if value is not None:
                yield value
        for graph in self.subgraphs:
            yield from graph.captures()

    def __repr__(self) -> str:
        outputs = ", ".join(repr(value) if value.name else "_" for value in self.outputs)
        inputs = ", ".join("_" if value is None else f"%{value.name}" for value in self.inputs)
        attributes = ", ".join(f"{key}={_brief(value)}" for key, value in sorted(self.attributes.items()))
        return f"{outputs} = {self.op}({inputs})" + (f" {{{attributes}}}" if attributes else "")


def _brief(attribute: Any) -> str:
    if isinstance(attribute, torch.Tensor):
        return f"tensor{list(attribute.shape)}"
    return f"graph {attribute.name}" if isinstance(attribute, Graph) else repr(attribute)


@dataclass(eq=False)
class Graph:
    """Nodes in running order, from `inputs` to `outputs`; `output_names` are what a caller knows these by."""

    name: str = ""
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    output_names: list[str] = field(default_factory=list)

    def constants(self) -> list[Value]:
        """Those that its nodes (not its subgraphs' own) read or it returns, each once, in order of use."""
        seen: dict[Value, None] = {}
        for value in (*(v for node in self.nodes for v in node.reads()), *self.outputs):
            if value.is_constant:
                seen.setdefault(value)
        return list(seen)

    def users(self) -> dict[Value, list[Node]]:
        """The nodes that read each value, through subgraphs too: a node that reads it twice is there once."""
        users: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.reads()):
                users.setdefault(value, []).append(node)
        return users

    def captures(self) -> list[Value]:
        """Values from around this subgraph that it, or a subgraph in it, reads or returns; constants aside."""
        own = set(self.inputs)
        captured: dict[Value, None] = {}
        for node in self.nodes:
            for value in node.reads():
                if value not in own and not value.is_constant:
                    captured.setdefault(value)
            own.update(node.outputs)
        for value in self.outputs:
            if value not in own and not value.is_constant:
                captured.setdefault(value)
        return list(captured)

    def replace(self, old: Value, new: Value, users: Iterable[Node] | None = None) -> None:
        """Every reader of `old`, in subgraphs and among the outputs too, reads `new` from now on.

        `users` narrows where to look, if the caller knows.
        """
        for node in self.nodes if users is None else users:
            node.inputs = [new if value is old else value for value in node.inputs]
            for graph in node.subgraphs:
                graph.replace(old, new)
        self.outputs = [new if value is old else value for value in self.outputs]

    def walk(self) -> Iterator[Node]:
        """Its nodes and those of all subgraphs."""
        for node in self.nodes:
            yield node
            for graph in node.subgraphs:
                yield from graph.walk()

    def __str__(self) -> str:
        lines = [f"graph {self.name}({', '.join(map(repr, self.inputs))})"]
        lines += [f"  const {value!r}" for value in self.constants()]
        for node in self.nodes:
            lines.append(f"  {node!r}")
            for graph in node.subgraphs:
                lines += [f"    {line}" for line in str(graph).splitlines()]
        lines.append(f"  return {', '.join(f'%{value.name}' for value in self.outputs)}")
        return "\n".join(lines)

    def verify(self) -> None:
        """Check every rule of docs/graph-ir.md; VerificationError names the rule and the place."""
        _verify(self, set(), {})


def _verify(graph: Graph, outer: set[Value], names: dict[str, Value]) -> None:
    defined = set(outer)
    names = dict(names)

    def define(value: Value, producer: Node | None) -> None:
        if value in defined:
            raise VerificationError(f"graph {graph.name!r}: value {value.name!r} is defined twice")
        if value.is_constant:
            raise VerificationError(f"graph {graph.name!r}: value {value.name!r} is a constant and computed, too")
        if value.producer is not producer:
            raise VerificationError(f"graph {graph.name!r}: value {value.name!r} names another producer than its node")
        defined.add(value)
        _check_name(graph, value, names)

    def read(value: Value, where: str) -> None:
        if value.is_constant:
            _check_constant(graph, value)
            _check_name(graph, value, names)
        elif value not in defined:
            raise VerificationError(f"graph {graph.name!r}: {where} reads {value.name!r} before it is computed")

    for value in graph.inputs:
        define(value, None)
    for node in graph.nodes:
        for given in node.inputs:
            if given is not None:
                read(given, f"node {node.name or node.op!r}")
        for subgraph in node.subgraphs:
            _verify(subgraph, defined, names)
        for value in node.outputs:
            define(value, node)
    for value in graph.outputs:
        read(value, "the list of outputs")


def _check_name(graph: Graph, value: Value, names: dict[str, Value]) -> None:
    if value.name and names.setdefault(value.name, value) is not value:
        raise VerificationError(f"graph {graph.name!r}: two values are called {value.name!r}")


def _check_constant(graph: Graph, value: Value) -> None:
    data = value.data
    if value.producer is not None:
        raise VerificationError(f"graph {graph.name!r}: constant {value.name!r} has a producer")
    if value.shape != tuple(data.shape):
        raise VerificationError(
            f"graph {graph.name!r}: constant {value.name!r} says shape {value.shape}, its data has {tuple(data.shape)}"
        )
    if isinstance(data, torch.Tensor) and (value.dtype is None or value.dtype.torch != data.dtype):
        raise VerificationError(f"graph {graph.name!r}: constant {value.name!r} says {value.dtype}, has {data.dtype}")


def constant(name: str, data: Any, dtype: DType | None = None) -> Value:
    """A constant value over a tensor (or an object array of strings)."""
    from trine.graph.dtypes import FROM_TORCH

    if dtype is None:
        dtype = FROM_TORCH[data.dtype] if isinstance(data, torch.Tensor) else DType.STRING
    return Value(name, dtype, tuple(data.shape), data)
