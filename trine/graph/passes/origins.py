"""Which nodes of the model each node of the optimised graph computes: found by comparing the graph around a pass."""

from __future__ import annotations

from dataclasses import dataclass

from trine.graph.ir import Graph, Node, Value


@dataclass(frozen=True)
class Snapshot:
    """The nodes of a graph and of its subgraphs, with the values that each read and made."""

    inputs: dict[Node, tuple[Value | None, ...]]
    outputs: dict[Node, tuple[Value, ...]]

    @classmethod
    def of(cls, graph: Graph) -> Snapshot:
        nodes = list(graph.walk())
        return cls({node: tuple(node.inputs) for node in nodes}, {node: tuple(node.outputs) for node in nodes})


def label(node: Node) -> str:
    """What a person knows a node of the model by."""
    return f"{node.op} {node.name}" if node.name else node.op


def trace_origins(before: Snapshot, graph: Graph) -> None:
    """Give the nodes that a pass made or changed the origins of the nodes that went."""
    after = Snapshot.of(graph)
    makers = {value: node for node, values in before.outputs.items() for value in values if value.name}
    made = [node for node in after.inputs if after.inputs[node] != before.inputs.get(node) or _moved(node, before)]
    found: dict[Node, dict[str, None]] = {}
    for node in made:
        region = _region(node, before, makers, after)
        own = dict.fromkeys(node.origins)
        found[node] = own | dict.fromkeys(name for old in region for name in old.origins)
    readers = {value: node for node in made for value in node.inputs if value is not None}
    for node in made:  # one that only makes something for another new node, as a merged product for its Split
        reader = readers.get(node.output)
        if not found[node] and reader is not None:
            found[node], found[reader] = found[reader], {}
    for node, origins in found.items():
        node.origins = tuple(origins)


def _moved(node: Node, before: Snapshot) -> bool:
    return tuple(node.outputs) != before.outputs.get(node)


def _region(node: Node, before: Snapshot, makers: dict[Value, Node], after: Snapshot) -> list[Node]:
    """The nodes that went, backwards from what `node` makes to what it reads."""
    given = set(node.inputs)
    waiting = [value for value in (*node.outputs, *before.inputs.get(node, ())) if value is not None]
    seen: set[Node] = set()
    while waiting:
        value = waiting.pop()
        old = makers.get(value)
        if old is None or old in seen or old in after.inputs or (value in given and value not in node.outputs):
            continue
        seen.add(old)
        waiting += [item for item in before.inputs[old] if item is not None]
    return [old for old in before.inputs if old in seen]
