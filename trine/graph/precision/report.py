"""How near a plan of lower precision comes to float32, on the user's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from trine.core.errors import ConfigurationError
from trine.graph.ir import Graph, Value
from trine.graph.native import Executor, native_is_available
from trine.graph.precision.calibration import Batch
from trine.graph.precision.clone import clone
from trine.graph.runtime import Program
from trine.graph.tactics import Choice, choose_first, kernels_for

Outputs: TypeAlias = dict[str, np.ndarray[Any, Any]]
Accuracy: TypeAlias = Callable[[Outputs], float] | Sequence[int] | np.ndarray[Any, Any]
"""What a user cares about, in percent: a function of all outputs, or the right class of each sample."""


@dataclass(frozen=True)
class OutputError:
    """One output against float32. `agreement` is the part of the samples with the same largest entry."""

    cosine: float
    largest: float
    mean: float
    agreement: float


@dataclass
class Report:
    """`layers` has each layer's signal to noise in decibels (what it makes, against float32, all of it quantised);
    `accuracy` the user's own measure, as (float32, this plan).
    """

    precision: str
    samples: int
    outputs: dict[str, OutputError] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    """Layers that stay in float32 to hold the accuracy."""
    sensitivity: dict[str, float] = field(default_factory=dict)
    """Signal to noise of the outputs with that layer alone in lower precision, where it was measured."""
    accuracy: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"precision {self.precision}, {self.samples} samples"]
        for name, error in self.outputs.items():
            lines.append(
                f"  output {name}: cosine {error.cosine:.5f}, largest error {error.largest:.4g}, "
                f"mean {error.mean:.4g}, same top-1 {error.agreement:.2%}"
            )
        if self.accuracy is not None:
            lines.append(f"  accuracy {self.accuracy[1]:.2f} (fp32 {self.accuracy[0]:.2f})")
        if self.kept:
            lines.append(f"  in fp32: {', '.join(self.kept)}")
        for name, decibels in sorted(self.layers.items(), key=lambda item: item[1])[:5]:
            lines.append(f"  layer {name}: {decibels:.1f} dB")
        return "\n".join(lines)


def decibels(signal: float, noise: float) -> float:
    """Ten times the logarithm of the ratio of two sums of squares, 200 at most."""
    if noise <= 0:
        return 200.0
    return -200.0 if signal <= 0 else min(200.0, 10 * math.log10(signal / noise))


def _runner(graph: Graph) -> tuple[Callable[[Batch], tuple[Any, ...]], Executor | None]:
    """Runs the graph as a plan does that nobody tuned, natively where that is open."""
    if native_is_available():
        executor = Executor(graph, {}, lambda node: kernels_for({node: Choice("")}).get(node), {})
        return executor.run, executor
    program = Program(graph, kernels_for(choose_first(graph)))
    return lambda run: program.run(*run), None


class Tracer:
    """A graph that tells every value of a run, bound once for all of a user's data."""

    def __init__(self, graph: Graph) -> None:
        self._names = graph.output_names
        whole, self._made = _with_everything(graph)
        self._run, self._executor = _runner(whole)

    @property
    def packed(self) -> Mapping[str, torch.Tensor]:
        """The weights as kernels want them, for whoever runs the graph next."""
        return {} if self._executor is None else self._executor.packed.entries

    def run(self, data: Sequence[Batch], see: Callable[[Value, torch.Tensor], None] | None = None) -> Outputs:
        """As `run_all`; `see` is told every value of each run."""
        collected: list[list[np.ndarray[Any, Any]]] = [[] for _ in self._names]
        for run in data:
            with torch.inference_mode():
                results = self._run(run)
            _collect(collected, results)
            if see is not None:
                for value, result in zip(self._made, results[len(collected) :], strict=True):
                    if isinstance(result, torch.Tensor):
                        see(value, result)
        return _joined(self._names, collected)


def run_all(graph: Graph, data: Sequence[Batch]) -> Outputs:
    """Every output over all runs, joined along the first axis."""
    runner, _ = _runner(graph)
    collected: list[list[np.ndarray[Any, Any]]] = [[] for _ in graph.outputs]
    for run in data:
        with torch.inference_mode():
            _collect(collected, runner(run))
    return _joined(graph.output_names, collected)


def _collect(collected: list[list[np.ndarray[Any, Any]]], results: Sequence[Any]) -> None:
    for parts, result in zip(collected, results, strict=False):
        if isinstance(result, torch.Tensor):
            parts.append(np.array(result.to(torch.float32).numpy() if result.is_floating_point() else result))


def _joined(names: Sequence[str], collected: Sequence[list[np.ndarray[Any, Any]]]) -> Outputs:
    joined = {}
    for name, parts in zip(names, collected, strict=True):
        if parts and all(part.ndim and part.shape[1:] == parts[0].shape[1:] for part in parts):
            joined[name] = np.concatenate(parts)
        elif parts:
            joined[name] = np.concatenate([part.reshape(-1) for part in parts])
    return joined


def _with_everything(graph: Graph) -> tuple[Graph, list[Value]]:
    """A copy that returns what every node makes, too; and those values."""
    copy, _ = clone(graph)
    made = [value for node in copy.nodes for value in node.outputs if value.name and value.dtype is not None]
    copy.outputs = [*copy.outputs, *made]
    copy.output_names = [*copy.output_names, *(f"{index}" for index in range(len(made)))]
    return copy, made


def measured(accuracy: Accuracy | None, outputs: Outputs, expected: Outputs) -> float:
    """In percent. Without the user's own measure: how often float32's largest entry stays the largest."""
    if callable(accuracy):
        return float(accuracy(outputs))
    first = next(iter(outputs.values()))
    places = first.reshape(len(first), -1).argmax(1)
    if accuracy is None:
        other = next(iter(expected.values()))
        return float((places == other.reshape(len(other), -1).argmax(1)).mean()) * 100
    labels = np.asarray(accuracy).reshape(-1)
    if len(labels) < len(places):
        raise ConfigurationError(f"accuracy: {len(labels)} labels for {len(places)} samples; give one for each")
    return float((places == labels[: len(places)]).mean()) * 100


def compare(outputs: Outputs, expected: Outputs) -> dict[str, OutputError]:
    errors = {}
    for name, array in outputs.items():
        want = expected[name]
        if array.dtype.kind != "f" or array.shape != want.shape or not array.size:
            continue
        a, b = array.reshape(len(array), -1).astype(np.float64), want.reshape(len(want), -1).astype(np.float64)
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        difference = np.abs(a - b)
        errors[name] = OutputError(
            cosine=float((a * b).sum()) / norm if norm else 1.0,
            largest=float(difference.max()),
            mean=float(difference.mean()),
            agreement=float((a.argmax(1) == b.argmax(1)).mean()),
        )
    return errors


def noise(outputs: Outputs, expected: Outputs) -> float:
    """Signal to noise of all float outputs together, in decibels."""
    pairs = [(outputs[name], want) for name, want in expected.items() if want.dtype.kind == "f"]
    signal = sum(float((want.astype(np.float64) ** 2).sum()) for _, want in pairs)
    return decibels(signal, sum(float(((got.astype(np.float64) - want) ** 2).sum()) for got, want in pairs))


def layer_noise(exact_of: Tracer, lower: Tracer, data: Sequence[Batch]) -> dict[str, float]:
    """Signal to noise of each value by its name, where both graphs make one of that name in float32 or integers."""
    signals: dict[str, float] = {}
    noises: dict[str, float] = {}
    for run in data:
        whole: dict[str, torch.Tensor] = {}
        exact_of.run([run], lambda value, x, into=whole: into.__setitem__(value.name, x))  # type: ignore[misc]

        def see(value: Value, x: torch.Tensor, exact: Mapping[str, torch.Tensor] = whole) -> None:
            name, real = _real(value, x)
            want = exact.get(name)
            if want is None or not want.is_floating_point() or want.shape != real.shape:
                return
            signals[name] = signals.get(name, 0.0) + float((want.double() ** 2).sum())
            noises[name] = noises.get(name, 0.0) + float(((real - want).double() ** 2).sum())

        lower.run([run], see)
    return {name: decibels(signal, noises[name]) for name, signal in signals.items()}


def _real(value: Value, x: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The name that the value has in float32, and what it stands for."""
    node = value.producer
    if x.is_floating_point() or node is None or "y_scale" not in node.attributes:
        return value.name, x
    a = node.attributes
    return value.name.removesuffix(f".{a['y_dtype']}"), (x.to(torch.float32) - a["y_zero"]) * a["y_scale"]
