"""Building, saving, loading and running plans."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trine.core.errors import ConfigurationError
from trine.graph import plan as plan_file
from trine.graph import tactics
from trine.graph.dtypes import DType, from_numpy, to_numpy, to_torch
from trine.graph.errors import InputError, PlanError
from trine.graph.export import is_torch, to_onnx
from trine.graph.importer import import_model
from trine.graph.ir import Graph, Node, Value
from trine.graph.memory import memory_use
from trine.graph.native import Executor, native_is_available
from trine.graph.native.executor import shapes_of
from trine.graph.passes import Effect
from trine.graph.passes import optimise as run_passes
from trine.graph.precision import Accuracy, Data, Report, lower_precision
from trine.graph.profiles import Profile, check_profiles, described, find_profile, from_description
from trine.graph.refit import refit_by_name, refit_from_graph
from trine.graph.runtime import Program, check_input
from trine.graph.tactics import Choice, Kernel, TimingCache, choose_first, kernels_for

Array = np.ndarray[Any, Any]


class Plan:
    """A compiled model. `run` may be called from several threads."""

    def __init__(
        self,
        graph: Graph,
        effects: list[Effect] | None = None,
        choices: Mapping[Node, Choice] | None = None,
        kernels: Mapping[Node, Kernel] | None = None,
        profiles: Sequence[Profile] = (),
        precision: Mapping[str, Any] | None = None,
        *,
        native: bool = True,
        packed: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.graph = graph
        self.precision = dict(precision or Report("fp32", 0).as_dict())
        self.profiles = list(profiles)
        self.effects = effects or []
        self.choices = dict(choices or {})
        self._kernels: dict[Node, Kernel | None] = dict(kernels or {})
        self._is_native = native and native_is_available()
        self._prepare(packed or {})

    def _prepare(self, packed: Mapping[str, torch.Tensor]) -> None:
        """What depends on the weights."""
        self.__dict__.pop("program", None)
        tactics_ = {node: choice.tactic for node, choice in self.choices.items()}
        self._executor = Executor(self.graph, tactics_, self._kernel_of, packed) if self._is_native else None

    def _kernel_of(self, node: Node) -> Kernel | None:
        """The kernel that the node's tactic makes, once."""
        if node not in self._kernels:
            choice = self.choices.get(node) or Choice("")  # the first that applies
            self._kernels[node] = kernels_for({node: choice}).get(node)
        return self._kernels[node]

    @cached_property
    def program(self) -> Program:
        """The graph as calls of Python, node by node: for calibration, and where there are no native kernels."""
        kernels = {node: self._kernel_of(node) for node in self.graph.walk()}
        return Program(self.graph, {node: kernel for node, kernel in kernels.items() if kernel is not None})

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Named arrays (tensors and lists are taken, too) to named arrays. InputError for what does not fit."""
        quick = None if self._executor is None else self._executor.run_arrays(inputs)
        if quick is not None:
            return dict(zip(self.graph.output_names, quick, strict=True))
        wanted = {value.name: value for value in self.graph.inputs}
        for name in inputs:
            if name not in wanted:
                raise InputError(f"no input is called {name!r}: {', '.join(wanted) or 'there is none'}", param=name)
        symbols: dict[str, int] = {}
        arguments = [self._argument(value, inputs, symbols) for value in self.graph.inputs]
        if self.profiles:
            names = [value.name for value in self.graph.inputs]
            find_profile(self.profiles, {name: given.shape for name, given in zip(names, arguments, strict=True)})
        with torch.inference_mode():
            results = self.program.run(*arguments) if self._executor is None else self._executor.run(arguments)
        return {
            name: to_caller(result, value.dtype)
            for name, value, result in zip(self.graph.output_names, self.graph.outputs, results, strict=True)
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a plan file, which `load_plan` reads."""
        places = {node: index for index, node in enumerate(self.graph.walk())}
        tactics_ = {str(places[node]): [choice.tactic, choice.times] for node, choice in self.choices.items()}
        effects = [[effect.name, effect.added, effect.removed] for effect in self.effects]
        extra = {"effects": effects, "profiles": described(self.profiles), "precision": self.precision}
        packed = None if self._executor is None else self._executor.packed_weights(self._usual_shapes())
        plan_file.save(path, self.graph, {"tactics": tactics_, **extra}, packed)

    def _usual_shapes(self) -> list[tuple[int, ...] | None]:
        """Shapes of the inputs that the first profile names as usual; 1 where nothing says."""
        bounds = self.profiles[0] if self.profiles else {}
        return example_shapes(self.graph, {name: bound.opt for name, bound in bounds.items()})

    def refit(self, weights: Mapping[str, Any] | str | os.PathLike[str] | bytes | Any) -> None:
        """Put in other weights without a new build: arrays by name, or all of them from an ONNX model.

        Names are those of the model, where no pass has changed the weight (as folding a normalisation does); from a
        model of the same architecture every weight follows. ConfigurationError for what does not fit.
        """
        if isinstance(weights, Mapping):
            tensors = {name: _from_caller(given, Value(name)) for name, given in weights.items()}
            refit_by_name(self.graph, tensors)
        else:
            other = import_model(weights)
            run_passes(other)
            refit_from_graph(self.graph, self._lowered(other))
        self._kernels.clear()
        self._prepare({})

    @property
    def device(self) -> str:
        """cpu, or the GPU that it runs on."""
        runtime = getattr(self, "runtime", None)
        return "cpu" if runtime is None else str(runtime.target.device)

    def _lowered(self, graph: Graph) -> Graph:
        """An optimised graph in the plan's precision, which on a GPU is the runtime's own affair."""
        if self.device != "cpu":
            return graph
        kind = str(self.precision["precision"])
        if kind in ("int8", "fp8"):
            raise ConfigurationError(f"a plan in {kind} can't be refitted from a model: build it again")
        return lower_precision(graph, kind)[0]

    def inspect(self) -> dict[str, Any]:
        """What the plan is: interface, layers with their tactics and times, memory, what each pass did."""
        return {
            "inputs": [_described(value) for value in self.graph.inputs],
            "outputs": [
                {**_described(value), "name": name}
                for name, value in zip(self.graph.output_names, self.graph.outputs, strict=True)
            ],
            "returns": [value.name for value in self.graph.outputs],
            "profiles": described(self.profiles),
            "layers": [self._layer(node) for node in self.graph.nodes],
            "memory": self._memory(),
            "weights": sum(value.nbytes or 0 for value in self.graph.constants()),
            "passes": [{"name": e.name, "added": e.added, "removed": e.removed} for e in self.effects],
            "precision": self.precision,
        }

    def _memory(self) -> dict[str, Any] | None:
        """Bytes of intermediate values and results: of all, and what a run takes; and the node where most live."""
        if self._executor is None:
            use = memory_use(self.graph)
            return None if use is None else {"total": use.total, "peak": use.peak, "at": use.at}
        program = self._executor.program(tuple(self._usual_shapes()))
        use = memory_use(program.graph, program.sizes)
        return None if use is None else {"total": use.total, "peak": program.run_bytes, "at": use.at}

    def _layer(self, node: Node) -> dict[str, Any]:
        choice = self.choices.get(node)
        return {
            "name": node.name,
            "op": node.op,
            "inputs": [value.name for value in node.inputs if value is not None],
            "outputs": [_described(value) for value in node.outputs if value.name],
            "origins": list(node.origins),
            "tactic": "reference" if choice is None else choice.tactic,
            "times_ms": {} if choice is None else choice.times,
        }

    def profile(self, inputs: Mapping[str, Any], runs: int = 10) -> list[tuple[str, str, float]]:
        """Name, operator and mean milliseconds of each layer over some runs; 0 for one that costs nothing."""
        symbols: dict[str, int] = {}
        arguments = [self._argument(value, inputs, symbols) for value in self.graph.inputs]
        times: dict[Node, float] = dict.fromkeys(self.graph.nodes, 0.0)
        with torch.inference_mode():
            if self._executor is None:
                self._time_calls(arguments, times, runs)
            else:
                program = self._executor.program(shapes_of(arguments))
                for step in program.profile(arguments, runs):
                    node = program.origins.get(step.node)
                    if node is not None:
                        times[node] = times.get(node, 0.0) + step.milliseconds
        return [(node.name, node.op, milliseconds) for node, milliseconds in times.items()]

    def _time_calls(self, arguments: list[Any], times: dict[Node, float], runs: int) -> None:
        """Add to `times` what each node takes as a call of Python."""
        last = 0.0

        def see(node: Node, given: list[Any], results: tuple[Any, ...]) -> None:
            nonlocal last
            times[node] += (time.perf_counter() - last) / runs * 1e3
            last = time.perf_counter()

        for _ in range(runs):
            last = time.perf_counter()
            self.program.trace(arguments, see)

    def _argument(self, value: Value, inputs: Mapping[str, Any], symbols: dict[str, int]) -> Any:
        if value.name not in inputs:
            raise InputError(f"input {value.name!r} is missing", param=value.name)
        tensor = _from_caller(inputs[value.name], value)
        if tensor is not None and not isinstance(tensor, list):
            check_input(value, tensor, symbols)
        return tensor


def _described(value: Value) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype, "shape": None if value.shape is None else list(value.shape)}


def _from_caller(given: Any, value: Value) -> Any:
    if given is None or isinstance(given, torch.Tensor):
        return given
    if isinstance(given, list) and value.dtype is None:
        return [_from_caller(item, value) for item in given]
    array = np.asarray(given)
    try:
        kind = from_numpy(array.dtype)
    except TypeError as error:
        raise InputError(f"input {value.name!r}: {error}", param=value.name) from None
    if kind is DType.STRING:
        return array.astype(object)
    if value.dtype is not None and kind is not value.dtype:
        raise InputError(f"input {value.name!r} is {kind}; it must be {value.dtype}", param=value.name)
    return to_torch(array)


def to_caller(result: Any, dtype: DType | None) -> Any:
    """A tensor of the host as an array, a sequence as a list of them."""
    if isinstance(result, torch.Tensor):
        return np.array(to_numpy(result, dtype))
    return [to_caller(item, None) for item in result] if isinstance(result, list) else result


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """A plan that `Plan.save` wrote; its weights are mapped from the file. PlanError for any other file."""
    graph, header, packed = plan_file.load(path)
    nodes = list(graph.walk())
    try:
        choices = {nodes[int(place)]: Choice(name, times) for place, (name, times) in header["tactics"].items()}
        effects = [Effect(*parts) for parts in header["effects"]]
        profiles = from_description(header["profiles"])
        check_profiles(profiles, graph)
        if "gpu" in header:
            from trine.graph.gpu.api import restore

            return restore(graph, effects, header["gpu"], profiles)
        return Plan(graph, effects, choices, profiles=profiles, precision=header["precision"], packed=packed)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError):
        raise PlanError(f"{str(path)!r} is damaged: build the plan again") from None


def build(
    source: str | os.PathLike[str] | bytes | Any,
    *,
    args: Sequence[torch.Tensor] | None = None,
    folder: Path | None = None,
    optimise: bool = True,
    tune: bool = True,
    timing_cache: str | os.PathLike[str] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    profiles: Sequence[Profile] = (),
    budget: float | None = None,
    precision: str = "fp32",
    calibration: Data | None = None,
    calibration_method: str = "minmax",
    calibration_cache: str | os.PathLike[str] | None = None,
    accuracy_drop: float | None = None,
    accuracy: Accuracy | None = None,
    device: str = "cpu",
    inductor: bool = False,
) -> Plan:
    """Compile an ONNX file, its bytes, a ModelProto, an exported program, or a torch module with inputs `args`.

    `tune=False` takes the first candidate for each node instead of timing them; `timing_cache` is a file that keeps
    times for the next build; `shapes` are the inputs' shapes to tune for, where the model leaves them open; `profiles`
    say the same, and which shapes the plan takes; `budget` is how many seconds the timing may take: after that, nodes
    get the first candidate that applies.

    `precision` is fp32, bf16, fp16, int8 or fp8. The last two need `calibration`: an .npz file, arrays by input name
    with samples along the first axis, or one such mapping a run; `calibration_method` is entropy, percentile, minmax or
    mse, and `calibration_cache` a file that keeps the ranges. `accuracy_drop` (percentage points) keeps in fp32 what
    the drop forbids, measured on that data by `accuracy`: a function of all outputs by name to percent, or the right
    class of each sample; without it, by how often fp32's class stays. `Plan.precision` reports what came of it.

    `device` is cpu or cuda (cuda:1, …): there fp32, tf32, fp16, bf16 and fp8 are known, fp8 with the largest magnitudes
    of `calibration`; `inductor` lets TorchInductor compete for the whole graph, which takes minutes.
    """
    graph = import_model(to_onnx(source, args) if is_torch(source) else source, folder)
    check_profiles(profiles, graph)
    if inductor and device == "cpu":
        raise ConfigurationError("inductor is for plans on a GPU: give a device, or leave it out")
    if not optimise:
        if device != "cpu":
            raise ConfigurationError(f"device {device!r} needs the passes: leave optimise on")
        if precision != "fp32":
            raise ConfigurationError(f"precision {precision!r} needs the passes: leave optimise on")
        return Plan(graph, profiles=profiles, native=False)
    effects = run_passes(graph)
    if device != "cpu":
        from trine.graph.gpu.api import build as build_for_gpu

        if accuracy_drop is not None or accuracy is not None or calibration_cache is not None:
            raise ConfigurationError("accuracy_drop, accuracy and calibration_cache are for device cpu: leave them out")
        return build_for_gpu(
            graph,
            effects,
            device,
            precision=precision,
            tune=tune,
            timing_cache=timing_cache,
            shapes=shapes or {},
            profiles=profiles,
            calibration=calibration,
            budget=budget,
            inductor=inductor,
        )
    graph, report, packed = lower_precision(
        graph,
        precision,
        calibration=calibration,
        method=calibration_method,
        cache=calibration_cache,
        accuracy_drop=accuracy_drop,
        accuracy=accuracy,
    )
    points: list[Mapping[str, Sequence[int]]] = [
        {**(shapes or {}), **{name: bounds.opt for name, bounds in profile.items()}} for profile in profiles or [{}]
    ]
    made = partial(Plan, graph, effects, profiles=profiles, precision=report.as_dict())
    executor = Executor(graph, {}, lambda node: None, packed) if native_is_available() else None
    cache = TimingCache(None if timing_cache is None else Path(timing_cache))
    kernels: dict[Node, Kernel] = {}
    try:
        with torch.inference_mode():
            examples = [example_inputs(graph, point) for point in points]
            if not tune or any(node.op == "Loop" for node in graph.walk()):  # a loop may not end on made-up inputs
                program = None if executor is None else executor.program(shapes_of(examples[0]))
                choices = choose_first(graph, program)
            else:
                choices, kernels = tactics.tune(graph, examples, cache, budget, executor)
                cache.save()
    except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError):
        return made(choose_first(graph))  # the model can't run on made-up inputs
    return made(choices, kernels, packed=None if executor is None else executor.packed.entries)


def example_shapes(graph: Graph, shapes: Mapping[str, Sequence[int]]) -> list[tuple[int, ...] | None]:
    """Shapes of the inputs, None for those whose rank is open.

    An open dimension that `shapes` does not say is what it is in another input that has one of its name, else 1.
    """
    sizes: dict[str, int] = {}
    for value in graph.inputs:
        for dim, size in zip(value.shape or (), shapes.get(value.name, ()), strict=False):
            if isinstance(dim, str):
                sizes[dim] = size
    return [
        tuple(shapes[value.name])
        if shapes.get(value.name)
        else None
        if value.shape is None
        else tuple(sizes.get(dim, 1) if isinstance(dim, str) else dim for dim in value.shape)
        for value in graph.inputs
    ]


def example_inputs(graph: Graph, shapes: Mapping[str, Sequence[int]]) -> list[Any]:
    """Inputs to tune on: random floats, zeros else."""
    generator = torch.Generator().manual_seed(0)
    inputs: list[Any] = []
    for value, shape in zip(graph.inputs, example_shapes(graph, shapes), strict=True):
        if value.dtype is None or value.dtype is DType.STRING or shape is None:
            raise ValueError(f"input {value.name!r} has no shape to tune for")
        if value.dtype.is_float:
            inputs.append(torch.randn(list(shape), generator=generator).to(value.dtype.torch))
        else:
            inputs.append(torch.zeros(list(shape), dtype=value.dtype.torch))
    return inputs
