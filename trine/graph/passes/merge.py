"""Products of one value by several constant matrices are one product: queries, keys and values, for example."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from trine.graph.ir import Graph, Node, Value, constant

_NEAR = 16  # nodes between two that are merged: a result that lies long before its reader takes memory


def merge_linear(graph: Graph) -> Graph:
    """Linear nodes that read the same value, near each other, become one; a Split gives each reader its columns."""
    _merge_in(graph, {})
    return graph


def _merge_in(graph: Graph, joined: dict[str, Value]) -> None:
    groups: dict[tuple[Value | None, str], list[list[Node]]] = {}
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        for subgraph in node.subgraphs:
            _merge_in(subgraph, joined)
        if node.op == "Linear" and _is_plain(node):
            runs = groups.setdefault((node.inputs[0], node.attributes["activation"]), [[]])
            if runs[-1] and places[node] - places[runs[-1][-1]] > _NEAR:
                runs.append([])
            runs[-1].append(node)
    for nodes in (run for runs in groups.values() for run in runs if len(run) > 1):
        _merge(graph, nodes, joined)


def _is_plain(node: Node) -> bool:
    """That it adds no residual, and multiplies by constants of float32."""
    weight, bias = node.inputs[1], node.input(2)
    if weight is None or not weight.is_constant or node.input(3) is not None or weight.data.dtype is not torch.float32:
        return False
    return (bias is None or bias.is_constant) and node.output.rank is not None


def _merge(graph: Graph, nodes: Sequence[Node], joined: dict[str, Value]) -> None:
    first = nodes[0]
    weights = [node.inputs[1] for node in nodes]
    rows = [0 if weight is None else weight.data.shape[0] for weight in weights]
    biases = [node.input(2) or constant("", torch.zeros(count)) for node, count in zip(nodes, rows, strict=True)]
    bias = _joined(biases, joined) if any(node.input(2) for node in nodes) else None
    shape = (*(first.output.shape or ())[:-1], sum(rows))
    whole = Value(f"{first.output.name}.merged", first.output.dtype, shape)
    inputs = [first.inputs[0], _joined(weights, joined), bias]
    merged = Node("Linear", inputs, [whole], dict(first.attributes), f"{first.name}.merged")
    sizes = constant(f"{whole.name}.sizes", torch.tensor(rows))
    split = Node("Split", [whole, sizes], [node.output for node in nodes], {"axis": -1}, f"{first.name}.split")
    place = graph.nodes.index(first)
    graph.nodes[:] = [node for node in graph.nodes if node not in nodes]
    graph.nodes[place:place] = [merged, split]


def _joined(values: Sequence[Value | None], joined: dict[str, Value]) -> Value:
    """The constants one below the other, named by all of them, so that `Plan.refit` finds each; the same ones once."""
    parts = [value for value in values if value is not None]
    name = "|".join(f"{value.name}[{value.data.shape[0]}]" for value in parts)
    if name not in joined:
        joined[name] = constant(name, torch.cat([value.data for value in parts]))
    return joined[name]


def parts_of(name: str) -> dict[str, slice]:
    """The rows that each constant has in one that was joined from several; empty for another name."""
    found, start = {}, 0
    for part in name.split("|"):
        matched = re.fullmatch(r"(.*)\[(\d+)\]", part)
        if matched is None:
            return {}
        found[matched[1]] = slice(start, start + int(matched[2]))
        start += int(matched[2])
    return found
