"""Which layers get the lower precision: all of them, or as many as an accuracy allows.

How much a layer alone costs is measured, on the user's data. Layers are then given back to float32, those first that
cost most for the work they save, until the drop is within what the user allows; every assignment that is considered is
measured itself, since errors do not simply add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10, prod

import torch

from trine.core.errors import ConfigurationError
from trine.graph.ir import Graph, Node
from trine.graph.precision.calibration import Batch
from trine.graph.precision.clone import clone
from trine.graph.precision.quantize import LOWER, quantizable
from trine.graph.precision.ranges import Range
from trine.graph.precision.report import (
    Accuracy,
    Outputs,
    Report,
    Tracer,
    compare,
    layer_noise,
    measured,
    noise,
    run_all,
)

_SAMPLES_FOR_SENSITIVITY = 16
_RUNS_FOR_LAYERS = 2


def lowered(graph: Graph, nodes: Sequence[Node], precision: str, ranges: Mapping[str, Range]) -> Graph:
    """A copy of the graph with these of its nodes in `precision`."""
    copy, copies = clone(graph)
    LOWER[precision](copy, [copies[node] for node in nodes], ranges)
    return copy


def assign(
    graph: Graph,
    precision: str,
    ranges: Mapping[str, Range],
    data: Sequence[Batch],
    *,
    accuracy_drop: float | None = None,
    accuracy: Accuracy | None = None,
    tracer: Tracer | None = None,
) -> tuple[Graph, Report, Mapping[str, torch.Tensor]]:
    """The graph in lower precision, how it compares, and its packed weights; with `accuracy_drop` (percentage points)
    only those layers that this allows. `tracer` is one of the graph. ConfigurationError where there is no data to
    measure on.
    """
    nodes = quantizable(graph)
    if not data:
        if accuracy_drop is not None:
            raise ConfigurationError("accuracy_drop needs calibration data to measure the drop on: give calibration=")
        return lowered(graph, nodes, precision, ranges), Report(precision, 0), {}
    tracer = tracer or Tracer(graph)
    exact = tracer.run(data)
    every = nodes
    search = _Search(graph, precision, ranges, data, exact, accuracy)
    sensitivity: dict[str, float] = {}
    if accuracy_drop is None:
        best = lowered(graph, nodes, precision, ranges)
    else:
        nodes, best, sensitivity = search.within(nodes, accuracy_drop)
    found = Tracer(best)
    outputs = found.run(data)
    report = Report(
        precision,
        samples=sum(len(run[0]) if run and run[0].dim() else 1 for run in data),
        outputs=compare(outputs, exact),
        layers=layer_noise(tracer, found, data[:_RUNS_FOR_LAYERS]),
        kept=[node.name for node in every if node not in set(nodes)],
        sensitivity=sensitivity,
    )
    if accuracy is not None or accuracy_drop is not None:
        report.accuracy = (measured(accuracy, exact, exact), measured(accuracy, outputs, exact))
    return best, report, found.packed


class _Search:
    """For the largest part of the work in lower precision that holds the accuracy."""

    def __init__(
        self,
        graph: Graph,
        precision: str,
        ranges: Mapping[str, Range],
        data: Sequence[Batch],
        exact: Outputs,
        accuracy: Accuracy | None,
    ) -> None:
        self.graph, self.precision, self.ranges = graph, precision, ranges
        self.data, self.exact, self.accuracy = data, exact, accuracy
        self.full = measured(accuracy, exact, exact)

    def within(self, nodes: Sequence[Node], drop: float) -> tuple[list[Node], Graph, dict[str, float]]:
        """The nodes, the graph with them lowered, and each node's own signal to noise if that was asked for."""
        if drop < 0:
            raise ConfigurationError(f"accuracy_drop is {drop}: give percentage points, 0 or more")
        graph, holds = self._try(nodes, drop)
        if holds:
            return list(nodes), graph, {}
        few = self._few()
        alone = {node: self._alone(node, few) for node in nodes}
        # Noise power per multiplication saved: the dearest first.
        dearest = sorted(nodes, key=lambda node: alone[node] + _decibels_of_work(node))
        low, high = 0, len(dearest)  # giving back `high` of them surely holds
        best = clone(self.graph)[0]
        while high - low > 1:
            middle = (low + high) // 2
            graph, holds = self._try(dearest[middle:], drop)
            if holds:
                high, best = middle, graph
            else:
                low = middle
        chosen, best = self._restore(dearest[high:], dearest[:high], best, drop)
        return chosen, best, {node.name: value for node, value in alone.items()}

    def _restore(
        self, chosen: list[Node], given_back: list[Node], best: Graph, drop: float
    ) -> tuple[list[Node], Graph]:
        """Take back what was given up needlessly: the largest layers are tried, one by one."""
        for node in sorted(given_back, key=_work, reverse=True)[:8]:
            graph, holds = self._try([*chosen, node], drop)
            if holds:
                chosen, best = [*chosen, node], graph
        return chosen, best

    def _try(self, nodes: Sequence[Node], drop: float) -> tuple[Graph, bool]:
        graph = lowered(self.graph, nodes, self.precision, self.ranges)
        reached = measured(self.accuracy, run_all(graph, self.data), self.exact)
        return graph, self.full - reached <= drop + 1e-9

    def _few(self) -> list[Batch]:
        """The first runs of the data, enough to rank layers by."""
        size = max(len(self.data[0][0]) if self.data[0] and self.data[0][0].dim() else 1, 1)
        return list(self.data[: max(1, _SAMPLES_FOR_SENSITIVITY // size)])

    def _alone(self, node: Node, data: Sequence[Batch]) -> float:
        graph = lowered(self.graph, [node], self.precision, self.ranges)
        return noise(run_all(graph, data), run_all(self.graph, data))


def _work(node: Node) -> float:
    """Multiplications of a product, its open dimensions taken as one."""
    w, shape = node.inputs[1], node.output.shape or ()
    assert w is not None
    places = prod(dim for dim in shape if isinstance(dim, int))
    return float(places * w.data[0].numel())


def _decibels_of_work(node: Node) -> float:
    """As noise is counted: ten times a tenth of the work is ten decibels."""
    return 10 * log10(max(_work(node), 1.0))
