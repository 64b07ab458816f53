"""Control flow, sequences, and what has a number of results that only a run knows."""

from __future__ import annotations

from trine.graph.dims import unknown
from trine.graph.dtypes import DType
from trine.graph.ir import Dim, Graph, Node
from trine.graph.shape_rules.common import Context, Facts, refuse, rule


@rule("If")
def _if(node: Node, context: Context) -> Facts:
    branches: list[Graph] = [node.attributes["then_branch"], node.attributes["else_branch"]]
    if any(branch.inputs for branch in branches) or any(len(b.outputs) < len(node.outputs) for b in branches):
        raise refuse(node, "has a branch with inputs, or with fewer outputs than the node")
    facts: Facts = []
    for a, b in zip(branches[0].outputs, branches[1].outputs, strict=False):
        same = a.shape is not None and a.shape == b.shape
        facts.append((a.dtype if a.dtype is b.dtype else None, a.shape if same else None))
    return facts


@rule("Loop")
def _loop(node: Node, context: Context) -> Facts:
    body: Graph = node.attributes["body"]
    carried = len(node.inputs) - 2
    if len(body.inputs) != carried + 2 or len(body.outputs) < max(carried + 1, len(node.outputs) + 1):
        raise refuse(node, f"carries {carried} values, but its body has {len(body.inputs)} inputs")
    _check_end(node, body)
    facts: Facts = [(value.dtype, None) for value in body.outputs[1 : 1 + carried]]
    for value in body.outputs[1 + carried :]:
        facts.append(
            (value.dtype, None if value.shape is None else (unknown(), *(_scoped(dim) for dim in value.shape)))
        )
    return facts


_MOST_ROUNDS = 1_000_000


def _check_end(node: Node, body: Graph) -> None:
    """A loop whose condition is always true ends by its count: one that says none, or a huge one, is a mistake."""
    trips, first, last = node.input(0), node.input(1), body.outputs[0]
    while last.producer is not None and last.producer.op == "Identity" and last.producer.inputs[0] is not None:
        last = last.producer.inputs[0]
    condition = first if last is body.inputs[1] else last
    if condition is not None and not (condition.is_constant and bool(condition.data.any())):
        return
    count = None if trips is None else int(trips.data) if trips.is_constant else 0
    if count is None or count > _MOST_ROUNDS:
        times = "forever" if count is None else f"{count} times"
        raise refuse(node, f"would run {times}: its condition is always true")


@rule("Scan")
def _scan(node: Node, context: Context) -> Facts:
    body: Graph = node.attributes["body"]
    given = len(node.inputs) - node.attributes.get("batched", 0)
    if len(body.inputs) != given or not 0 < node.attributes["num_scan_inputs"] <= given:
        raise refuse(node, f"has {given} inputs, but its body has {len(body.inputs)}")
    return []


@rule("SequenceMap")
def _sequence_map(node: Node, context: Context) -> Facts:
    body: Graph = node.attributes["body"]
    if len(body.inputs) != len(node.inputs):
        raise refuse(node, f"has {len(node.inputs)} inputs, but its body has {len(body.inputs)}")
    return []


def _scoped(dim: Dim) -> Dim:
    """A symbol of a body means another number each time round: outside it says nothing."""
    return dim if isinstance(dim, int) else unknown()


@rule("NonMaxSuppression")
def _non_max_suppression(node: Node, context: Context) -> Facts:
    return [(DType.INT64, (unknown(), 3))]


@rule("SequenceLength SequenceEmpty SequenceConstruct")
def _sequence(node: Node, context: Context) -> Facts:
    return [(DType.INT64, ())] if node.op == "SequenceLength" else [(None, None)]
