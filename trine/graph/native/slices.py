"""Large images of a batch are worked on one after the other, so that what lies between two kernels stays in the cache.

A run of nodes over images becomes a loop of the tape: its steps are recorded for one image, and what is read from or
written to around them moves on by an image each time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value
from trine.graph.native.recorder import Joined, Recorder
from trine.graph.native.structure import copy
from trine.graph.native.tape import Loop
from trine.graph.native.tensor import Tensor

_LEAST_BYTES = 4 << 20
"""That a node reads and writes for the whole batch: less than that stays in the caches anyway."""
_CONVOLUTIONS = frozenset(["FusedConv", "Conv", "ConvTranspose"])
_NODES = _CONVOLUTIONS | {
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish"),
    *("LeakyRelu", "Add", "Sub", "Mul"),
}
"""Operators that treat every image alike and by itself, where `_is_by_image` finds nothing that speaks against it."""


@dataclass(eq=False)
class Slices:
    """Nodes for one image of `count`; of each value that crosses their border the whole, and one image's part."""

    count: int
    nodes: list[Node] = field(default_factory=list)
    entering: list[tuple[Value, Value]] = field(default_factory=list)
    leaving: list[tuple[Value, Value]] = field(default_factory=list)

    def sizes(self) -> dict[Value, int]:
        """Bytes of what the nodes make, for all images; what crosses the border counts once."""
        views = ("EnterSlices", "LeaveSlices")
        return {node.output: 0 if node.op in views else (node.output.nbytes or 0) * self.count for node in self.nodes}


def in_slices(graph: Graph) -> tuple[list[Slices], dict[Node, Node]]:
    """Change `graph` so that its large images are worked on one by one; and of which node each new one is a copy.

    The new nodes stand in the places of the old ones. An EnterSlices stands for the step into a loop, a LeaveSlices for
    the step out of it.
    """
    made: list[Slices] = []
    origins: dict[Node, Node] = {}
    users, outputs = graph.users(), set(graph.outputs)
    for run in _runs(graph):
        inside = set(run)
        slices = Slices(_batch(run[0]))
        parts: dict[Value, Value] = {}

        def part(value: Value | None, slices: Slices = slices, parts: dict[Value, Value] = parts) -> Value | None:
            if value is None or value.is_constant:
                return value
            if value not in parts:
                parts[value] = _one_image(value)
                slices.entering.append((value, parts[value]))
            return parts[value]

        for node in run:
            inputs = [part(value) for value in node.inputs]
            parts[node.output] = _one_image(node.output)
            copy = Node(node.op, inputs, [parts[node.output]], node.attributes, node.name, node.origins)
            slices.nodes.append(copy)
            origins[copy] = node
            if node.output in outputs or any(reader not in inside for reader in users.get(node.output, [])):
                slices.leaving.append((node.output, parts[node.output]))
        start = graph.nodes.index(run[0])
        enter = [Node("EnterSlices", [whole], [one]) for whole, one in slices.entering]
        leave = [Node("LeaveSlices", [one], [whole]) for whole, one in slices.leaving]
        slices.nodes = [*enter, *slices.nodes, *leave]
        graph.nodes[start : start + len(run)] = slices.nodes
        made.append(slices)
    return made, origins


def worth_slicing(graph: Graph) -> bool:
    return bool(_runs(graph))


def _one_image(value: Value) -> Value:
    assert value.static_shape is not None
    return Value(value.name, value.dtype, (1, *value.static_shape[1:]))


def _batch(node: Node) -> int:
    shape = node.output.static_shape
    return shape[0] if shape else 1


def _runs(graph: Graph) -> list[list[Node]]:
    """Neighbouring nodes that are worth it, at least two.

    Smaller ones between two such runs join them where that costs less than ending the loop: their weights, read once
    for each image, beside what the runs hand on past them for all images.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    users = graph.users()
    runs: list[list[Node]] = []
    between: list[Node] = []
    for node in graph.nodes:
        if not _is_by_image(node):
            runs.append([])
            between = []
        elif not _is_large(node):
            between.append(node)
        elif not runs or not runs[-1] or _batch(runs[-1][0]) != _batch(node):
            runs.append([node])
            between = []
        else:
            past = [
                item.output
                for item in runs[-1]
                if any(places[user] >= places[node] for user in users.get(item.output, []) if user in places)
            ]
            if between and _weights(between) * _batch(node) > sum(value.nbytes or 0 for value in past):
                runs.append([])
            runs[-1] += [*(between if runs[-1] else ()), node]
            between = []
    return [run for run in runs if len(run) > 1 and _pays(run, users, set(graph.outputs))]


def _pays(run: Sequence[Node], users: Mapping[Value, Sequence[Node]], outputs: Collection[Value]) -> bool:
    """Whether more stays inside the loop than crosses its border; a concatenation copies what comes from outside."""
    inside, made = set(run), {node.output for node in run}
    entering = {value for node in run for value in _images(node) if value not in made}
    crossing, kept = sum(value.nbytes or 0 for value in entering), 0
    for node in run:
        leaves = node.output in outputs or any(reader not in inside for reader in users.get(node.output, []))
        if leaves or (node.op == "Concat" and not entering.isdisjoint(node.reads())):
            crossing += node.output.nbytes or 0
        else:
            kept += node.output.nbytes or 0
    return kept >= crossing


def _weights(nodes: Sequence[Node]) -> int:
    return sum(value.nbytes or 0 for node in nodes for value in node.inputs if value is not None and value.is_constant)


def _images(node: Node) -> Sequence[Value]:
    return [value for value in (*node.inputs, *node.outputs) if value is not None and not value.is_constant]


def _is_by_image(node: Node) -> bool:
    if node.op not in _NODES or len(node.outputs) != 1 or _batch(node) < 2:
        return False
    if node.op == "Concat" and node.attributes["axis"] not in (1, -3):
        return False
    images = _images(node)
    if node.op in _CONVOLUTIONS:
        if any(value in images for value in node.inputs[1:3]):
            return False
    elif any(value and value.is_constant and value.rank == 4 and (value.shape or ())[0] != 1 for value in node.inputs):
        return False
    return all(
        value.dtype is DType.FLOAT32
        and value.rank == 4
        and value.static_shape
        and value.static_shape[0] == _batch(node)
        for value in images
    )


def _is_large(node: Node) -> bool:
    """Whether its images are, and its weights are small beside one of them: they are read again for each."""
    images = sum(value.nbytes or 0 for value in _images(node))
    return images >= _LEAST_BYTES and _weights([node]) * 2 <= images // _batch(node)


def record_slices(tape: Recorder, slices: Slices, record: Callable[[Node], bool]) -> bool:
    """The loop on a tape; False where some node has no kernel, and then the tape is of no use."""
    wholes = [tape.tensor(whole) for whole, _ in slices.entering]
    copies, loop = dict(tape.copies), Loop(slices.count)
    for whole, one in slices.leaving:
        tape.joined.setdefault(one, Joined(whole, 0, axis=0))
    for tensor in (*wholes, *(tape.whole(whole) for whole, _ in slices.leaving)):
        if tensor is None or loop.moving.setdefault(tensor.buffer, _step(tensor)) != _step(tensor):
            return False
    tape.loop = loop
    for node in slices.nodes:
        if node.op == "EnterSlices":
            entered = tape.tensor(node.inputs[0])
            assert entered is not None
            tape.alias(node.output, entered.slice(0, 0, 1))
        elif node.op == "LeaveSlices":
            tape.node = node
            source, target = tape.tensor(node.inputs[0]), tape.whole(node.output)
            if source is None:
                return False
            if source != target.slice(0, 0, 1):
                copy(tape, source, target.slice(0, 0, 1))
            tape.alias(node.output, target)
        elif not record(node):
            return False
    tape.loop, tape.copies = None, copies  # what was copied of one image is another's the next time
    return True


def _step(tensor: Tensor) -> int:
    """Bytes from one image to the next."""
    return tensor.strides[0] * tensor.itemsize
