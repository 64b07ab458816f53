"""Nodes that nobody needs, and nodes that compute the same."""

from __future__ import annotations

from typing import Any

import torch

from trine.graph.dtypes import to_numpy
from trine.graph.ir import Graph, Node, Value
from trine.graph.operators import find


def remove_dead_nodes(graph: Graph) -> Graph:
    """Drop nodes of which no output is read, and the names of single outputs that nobody reads."""
    needed = set(graph.outputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if not any(value in needed for value in node.outputs):
            continue
        for subgraph in node.subgraphs:
            remove_dead_nodes(subgraph)
        for value in node.outputs[1:]:
            if value not in needed:
                value.name = ""  # an operator may save the work
        needed.update(node.reads())
        kept.append(node)
    graph.nodes[:] = kept[::-1]
    return graph


def merge_common_subexpressions(graph: Graph) -> Graph:
    """Of nodes with the same operator, inputs and attributes, the first computes for all."""
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            merge_common_subexpressions(subgraph)
        if node.subgraphs or not find(node.op, node.name).pure:
            continue
        key = (node.op, tuple(map(_identity, node.inputs)), _attributes(node), _wanted(node))
        first = seen.setdefault(key, node)
        if first is not node:
            graph.nodes.remove(node)
            for old, new in zip(node.outputs, first.outputs, strict=True):
                if old.name:
                    graph.replace(old, new)
    return graph


def _identity(value: Value | None) -> Any:
    """Small constants are compared by contents, everything else by identity."""
    if value is None or not isinstance(value.data, torch.Tensor) or value.data.numel() > 64:
        return value
    return (value.dtype, tuple(value.data.shape), to_numpy(value.data).tobytes())


def _attributes(node: Node) -> tuple[Any, ...]:
    return tuple(
        (key, id(value) if isinstance(value, torch.Tensor) else str(value))
        for key, value in sorted(node.attributes.items())
    )


def _wanted(node: Node) -> tuple[bool, ...]:
    return tuple(bool(value.name) for value in node.outputs)
