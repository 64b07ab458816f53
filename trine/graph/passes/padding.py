"""Zeros around an image that only convolutions read: they can pad for themselves."""

from __future__ import annotations

from trine.graph.ir import Graph, Node
from trine.graph.passes.pattern import remove_unread


def fold_padding(graph: Graph) -> Graph:
    """Pad by zeros in space, read by Conv nodes alone, becomes part of their own padding."""
    users, outputs = graph.users(), set(graph.outputs)
    for node in list(graph.nodes):
        for subgraph in node.subgraphs:
            fold_padding(subgraph)
        pads = _zeros_in_space(node)
        readers = users.get(node.output, []) if node.outputs else []
        if pads is None or node.output in outputs or not readers or not all(_can_pad(r, node) for r in readers):
            continue
        for reader in readers:
            own = reader.attributes.get("pads") or [0] * len(pads)
            reader.attributes["pads"] = [a + b for a, b in zip(own, pads, strict=True)]
            reader.inputs[0] = node.inputs[0]
    remove_unread(graph)
    return graph


def _can_pad(reader: Node, pad: Node) -> bool:
    return (
        reader.op == "Conv"
        and reader.attributes.get("auto_pad", "NOTSET") == "NOTSET"
        and reader.inputs[0] is pad.output
        and pad.output not in reader.inputs[1:]
    )


def _zeros_in_space(node: Node) -> list[int] | None:
    """What a Pad adds before and after each dimension from the third on, if that is all it does, with zeros."""
    x, given, value, axes = (node.input(place) for place in range(4))
    if node.op != "Pad" or node.attributes.get("mode", "constant") != "constant":
        return None
    if x is None or x.rank is None or x.rank < 3:
        return None
    if given is None or not given.is_constant or axes is not None:
        return None
    if value is not None and (not value.is_constant or value.data.numel() != 1 or float(value.data.reshape(())) != 0):
        return None
    pads = [int(count) for count in given.data.tolist()]
    before, after = pads[: x.rank], pads[x.rank :]
    return None if min(pads) < 0 or any((*before[:2], *after[:2])) else [*before[2:], *after[2:]]
