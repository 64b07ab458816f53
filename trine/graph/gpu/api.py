"""Plans that run on a GPU, with the interface of all plans."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trine.core.errors import ConfigurationError
from trine.graph import plan as plan_file
from trine.graph.api import Plan, to_caller
from trine.graph.dtypes import DType
from trine.graph.errors import InputError
from trine.graph.gpu.plan import GpuRuntime
from trine.graph.ir import Graph, Node
from trine.graph.passes import Effect
from trine.graph.precision import Data, Report, batches
from trine.graph.profiles import Profile, described, find_profile
from trine.graph.tactics import TimingCache

logger = logging.getLogger(__name__)


class GpuPlan(Plan):
    """A compiled model on a GPU. `run` may be called from several threads.

    Inputs may be arrays or tensors of the host, and CUDA tensors; where one is a CUDA tensor, outputs are, too.
    """

    def __init__(self, graph: Graph, effects: list[Effect], runtime: GpuRuntime, profiles: Sequence[Profile]) -> None:
        self.runtime = runtime
        super().__init__(
            graph, effects, profiles=profiles, precision=Report(runtime.precision, 0).as_dict(), native=False
        )

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Named arrays or tensors to named arrays, or CUDA tensors. InputError for what does not fit."""
        wanted = {value.name: value for value in self.graph.inputs}
        for name in inputs:
            if name not in wanted:
                raise InputError(f"no input is called {name!r}: {', '.join(wanted) or 'there is none'}", param=name)
        symbols: dict[str, int] = {}
        arguments = [self._argument(value, inputs, symbols) for value in self.graph.inputs]
        if self.profiles:
            find_profile(self.profiles, {name: x.shape for name, x in zip(wanted, arguments, strict=True)})
        results = self.runtime.run(arguments)
        on_device = any(isinstance(x, torch.Tensor) and x.is_cuda for x in arguments)
        return {
            name: x if on_device else to_caller(x.cpu() if isinstance(x, torch.Tensor) else x, value.dtype)
            for name, value, x in zip(self.graph.output_names, self.graph.outputs, results, strict=True)
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a plan file, which `load_plan` reads: the graph, and what was found out about this device."""
        effects = [[effect.name, effect.added, effect.removed] for effect in self.effects]
        extra = {"effects": effects, "profiles": described(self.profiles), "precision": self.precision}
        plan_file.save(path, self.graph, {"tactics": {}, **extra, "gpu": self.runtime.stored()})

    def refit(self, weights: Mapping[str, Any] | str | os.PathLike[str] | bytes | Any) -> None:
        super().refit(weights)
        self.runtime.forget()

    def inspect(self) -> dict[str, Any]:
        """As for all plans; layers as lowered for the first shapes; "gpu" says how each set of shapes runs."""
        facts = super().inspect()
        layers = [
            {**self._layer(node), "tactic": tactic, "times_ms": times} for node, tactic, times in self.runtime.layers()
        ]
        return {**facts, "layers": layers or facts["layers"], "gpu": self.runtime.facts()}

    def _layer(self, node: Node) -> dict[str, Any]:
        """Floats are described as they travel, in the plan's type."""
        found = super()._layer(node)
        for value in found["outputs"]:
            if value["dtype"] == DType.FLOAT32:
                value["dtype"] = str(self.runtime.target.dtype).removeprefix("torch.")
        return found

    def _memory(self) -> dict[str, Any] | None:
        return self.runtime.memory()

    def profile(self, inputs: Mapping[str, Any], runs: int = 10) -> list[tuple[str, str, float]]:
        """Name, operator and milliseconds of each node of the lowered graph, each alone in a CUDA graph."""
        symbols: dict[str, int] = {}
        return self.runtime.profile([self._argument(value, inputs, symbols) for value in self.graph.inputs], runs)


def build(
    graph: Graph,
    effects: list[Effect],
    device: str,
    *,
    precision: str,
    tune: bool,
    timing_cache: str | os.PathLike[str] | None,
    shapes: Mapping[str, Sequence[int]],
    profiles: Sequence[Profile],
    calibration: Data | None,
    budget: float | None,
    inductor: bool,
) -> GpuPlan:
    """A plan of an optimised graph, captured for each profile's best shapes, or for the model's own.

    `budget` is how many seconds the timing may take, for each profile. A model with open dimensions and no shapes given
    is prepared when inputs come. ConfigurationError where there is no such device, or for float8 without calibration
    data.
    """
    runtime = GpuRuntime(graph, device, precision)
    if precision == "fp8":
        if calibration is None:
            raise ConfigurationError(
                "precision fp8 needs calibration data: give calibration= (--calibration data.npz), inputs such as the "
                "model will see"
            )
        runtime.calibrate(batches(graph, calibration))
    cache = TimingCache(None if timing_cache is None else Path(timing_cache))
    for profile in profiles or [{}]:
        point = {**shapes, **{name: bounds.opt for name, bounds in profile.items()}}
        if all(value.name in point or value.static_shape is not None for value in graph.inputs):
            try:
                runtime.build(point, cache, tune, inductor, budget=budget)
            except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
                # the model can't run on made-up inputs: it is prepared when real ones come
                logger.debug("not prepared: %s", str(error)[:300])
    cache.save()
    return GpuPlan(graph, effects, runtime, profiles)


def restore(graph: Graph, effects: list[Effect], stored: Mapping[str, Any], profiles: Sequence[Profile]) -> GpuPlan:
    """A plan from its file's parts; candidates are timed again if it was built on another kind of device."""
    return GpuPlan(graph, effects, GpuRuntime.restored(graph, stored), profiles)
