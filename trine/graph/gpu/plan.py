"""Plans for a GPU: one captured program for each set of input shapes."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trine.core.errors import ConfigurationError
from trine.graph.dtypes import DType
from trine.graph.errors import ExecutionError, InputError
from trine.graph.gpu import inductor, tuning
from trine.graph.gpu.fp8 import Scales, calibrate, to_fp8
from trine.graph.gpu.lowering import input_shapes, lower
from trine.graph.gpu.program import Captured, DeviceProgram
from trine.graph.gpu.registry import Target, options
from trine.graph.ir import Graph, Node, Value
from trine.graph.memory import memory_use
from trine.graph.tactics import TimingCache

logger = logging.getLogger(__name__)

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
}
"""What each precision computes in, where it does not say otherwise."""
_MOST_SHAPES = 8
INDUCTOR_MODE = "max-autotune-no-cudagraphs"


def device(name: str) -> torch.device:
    """The device, or ConfigurationError where there is none such."""
    found = torch.device(name)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"device {name!r}: there is no GPU that torch can use here (torch {torch.__version__}); "
            "leave the device out to build for the CPU"
        )
    if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
        raise ConfigurationError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return found


@dataclass
class Point:
    """What a plan knows of one set of input shapes: candidates by the lowered graph's node, and their times."""

    choices: dict[str, str] = field(default_factory=dict)
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a run of the whole graph: "nodes" by these choices, "inductor" by TorchInductor."""

    def use_inductor(self) -> bool:
        return self.whole.get(inductor.NAME, float("inf")) < self.whole.get("nodes", float("inf"))


Shapes = tuple[tuple[int, ...] | None, ...]
"""Of a plan's inputs; None for one that is no tensor."""


class GpuRuntime:
    """The device side of a plan. `run` may be called from several threads: runs of equal shapes take turns."""

    def __init__(self, graph: Graph, name: str, precision: str, scales: Scales | None = None) -> None:
        if precision not in PRECISIONS:
            raise ConfigurationError(f"precision {precision!r} on a GPU: {', '.join(PRECISIONS)}")
        self.graph, self.precision, self.scales = graph, precision, scales or {}
        self.target = Target(device(name), PRECISIONS[precision], tf32=precision != "fp32")
        self.points: dict[Shapes, Point] = {}
        self._ready: OrderedDict[Shapes, Captured | _Eager] = OrderedDict()
        self._lock = threading.Lock()

    def build(
        self, shapes: Mapping[str, Sequence[int]], cache: TimingCache, tune: bool, with_inductor: bool,
        inputs: Sequence[Any] | None = None, budget: float | None = None,
    ) -> None:  # fmt: skip
        """Choose kernels for inputs of these shapes, and have them ready."""
        found = input_shapes(self.graph, shapes)
        key = tuple(found[value.name] for value in self.graph.inputs)
        with torch.inference_mode(), self._numerics():
            given = self._example(key) if inputs is None else self.on_device(inputs)
            lowered = self._lowered(key)
            point = Point()
            if tune:
                choices, times = tuning.tune(lowered, given, self.target, cache, budget)
                point.choices = {label(node): name for node, name in choices.items()}
                point.times = {label(node): taken for node, taken in times.items()}
            self.points[key] = point
            program = self._prepare(lowered, key, given)
            if tune and with_inductor and isinstance(program, Captured):
                program = self._with_inductor(lowered, given, point, program)
            self._keep(key, program)

    def _with_inductor(self, lowered: Graph, given: list[Any], point: Point, ours: Captured) -> Captured:
        try:
            theirs = Captured(inductor.compiled(lowered, given, self.target, INDUCTOR_MODE), given)
        except Exception:
            return ours
        with tuning.exclusive():
            for _ in range(2):
                for name, program in (("nodes", ours), (inductor.NAME, theirs)):
                    took = tuning.replay_seconds(program.replay, 8) * 1e3
                    point.whole[name] = min(took, point.whole.get(name, took))
        return theirs if point.use_inductor() else ours

    def _lowered(self, key: Shapes) -> Graph:
        pairs = zip(self.graph.inputs, key, strict=True)
        lowered = lower(self.graph, {value.name: shape for value, shape in pairs if shape is not None})
        return to_fp8(lowered, self.scales) if self.precision == "fp8" else lowered

    def calibrate(self, batches: Sequence[Sequence[Any]]) -> None:
        """Find the scales of float8 inputs from what these inputs make of them."""
        largest: Scales = {}
        with torch.inference_mode(), self._numerics():
            for inputs in batches:
                given = self.on_device(inputs)
                lowered = lower(self.graph, {v.name: x.shape for v, x in zip(self.graph.inputs, given, strict=True)})
                calibrate(lowered, given, self.target, largest)
        self.scales = largest

    def _prepare(self, lowered: Graph, key: Shapes, given: list[Any]) -> Captured | _Eager:
        """Bind, settle and capture; a graph that can't be captured runs node by node."""
        point = self.points.get(key) or self._nearest(key)
        choices = {node: point.choices[label(node)] for node in lowered.nodes if label(node) in point.choices}
        program = DeviceProgram(lowered, tuning.kernels_of(lowered, choices, self.target), self.target)
        tuning.settle(program, given)
        program = DeviceProgram(lowered, program.kernels, self.target)
        if point.use_inductor():
            try:
                return Captured(inductor.compiled(lowered, given, self.target, INDUCTOR_MODE), given)
            except Exception:
                point.whole.clear()
        if not self.target.cuda:
            return _Eager(program, "there is no graph to capture on a CPU")
        if not all(isinstance(x, Tensor) for x in given):
            return _Eager(program, "an input is no tensor")
        try:
            return Captured(program.run, given)
        except (RuntimeError, ExecutionError) as error:
            torch.cuda.synchronize(self.target.device)
            return _Eager(program, " ".join(str(error).split())[:200])

    def _nearest(self, key: Shapes) -> Point:
        """The choices made for the shapes whose sizes are closest: names of nodes are the same."""

        def distance(other: Shapes) -> float:
            pairs = zip((d for s in other for d in s or ()), (d for s in key for d in s or ()), strict=False)
            return sum(abs(math.log((a + 1) / (b + 1))) for a, b in pairs)

        return self.points[min(self.points, key=distance)] if self.points else Point()

    def _keep(self, key: Shapes, program: Captured | _Eager) -> None:
        self._ready[key] = program
        self._ready.move_to_end(key)
        while len(self._ready) > _MOST_SHAPES:
            self._ready.popitem(last=False)

    def program(self, given: list[Any]) -> Captured | _Eager:
        """What runs inputs like these: prepared when they come for the first time."""
        key = tuple(_shape(x) for x in given)
        with self._lock:
            if key not in self._ready:
                with torch.inference_mode(), self._numerics():
                    lowered = self._lowered(key)
                    example = [self._laid_out(x, value) for x, value in zip(given, self.graph.inputs, strict=True)]
                    self._keep(key, self._prepare(lowered, key, example))
            self._ready.move_to_end(key)
            return self._ready[key]

    def run(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Tensors of the host or the device to tensors on the device, of the graph's types."""
        self.check(arguments)
        program = self.program(list(arguments))
        with torch.inference_mode(), self._numerics():
            if isinstance(program, Captured):
                results: Sequence[Any] = program.run([_tensor(x) for x in arguments])
            else:
                results = program.program.run(*self.on_device(arguments))
        return tuple(_typed(x, value.dtype) for x, value in zip(results, self.graph.outputs, strict=True))

    def check(self, arguments: Sequence[Any]) -> None:
        """That row numbers among the inputs, where they are on the host, lie in their tables. InputError says which."""
        for node in self.graph.nodes:
            table, indices = (node.inputs[0], node.inputs[1]) if node.op == "Gather" else (None, None)
            if table is None or not table.is_constant or indices not in self.graph.inputs:
                continue
            given = arguments[self.graph.inputs.index(indices)]
            if not isinstance(given, Tensor) or given.is_cuda or not given.numel():
                continue
            size = table.data.shape[node.attributes.get("axis", 0)]
            least, most = (int(x) for x in torch.aminmax(given))
            if least < -size or most >= size:
                wrong = most if most >= size else least
                raise InputError(
                    f"input {indices.name!r} has the number {wrong}; a table it looks up has {size} rows",
                    param=indices.name,
                )

    def on_device(self, arguments: Sequence[Any]) -> list[Any]:
        return [self._laid_out(x, value) for x, value in zip(arguments, self.graph.inputs, strict=True)]

    def _laid_out(self, x: Any, value: Value) -> Any:
        """An input as the program takes it: floats in the target's type, images with channels innermost."""
        if not isinstance(x, Tensor):
            return x
        x = x.to(self.target.device, self.target.dtype if value.dtype is DType.FLOAT32 else x.dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and x.is_floating_point() else x

    def _example(self, key: Shapes) -> list[Any]:
        from trine.graph.api import example_inputs

        pairs = zip(self.graph.inputs, key, strict=True)
        shapes = {value.name: shape for value, shape in pairs if shape is not None}
        return self.on_device(example_inputs(self.graph, shapes))

    def _numerics(self) -> _Numerics:
        return _Numerics(tf32=self.precision != "fp32")

    def forget(self) -> None:
        """Weights have changed: nothing that was prepared holds any more."""
        with self._lock:
            self.target = Target(self.target.device, self.target.dtype, self.target.tf32)
            self._ready.clear()

    def profile(self, arguments: Sequence[Any], runs: int) -> list[tuple[str, str, float]]:
        """Name, operator and milliseconds a launch of each node for these inputs."""
        with torch.inference_mode(), self._numerics():
            given = self.on_device(arguments)
            key = tuple(_shape(x) for x in given)
            lowered, point = self._lowered(key), self.points.get(key) or self._nearest(key)
            choices = {node: point.choices[label(node)] for node in lowered.nodes if label(node) in point.choices}
            program = DeviceProgram(lowered, tuning.kernels_of(lowered, choices, self.target), self.target)
            seen = tuning.settle(program, given)
            return [
                (node.name, node.op, tuning.launch_ms(program.kernels[node], seen[node], self.target, runs))
                for node in lowered.nodes
            ]

    def layers(self) -> list[tuple[Node, str, dict[str, float]]]:
        """The nodes as lowered for the first shapes that are ready, their candidates, and the times tried."""
        key = next(iter(self._ready), None)
        if key is None:
            return []
        point = self.points.get(key) or self._nearest(key)
        found = []
        for node in self._lowered(key).nodes:
            first = next(iter(options(node, self.target)), "torch")
            found.append((node, point.choices.get(label(node), first), point.times.get(label(node), {})))
        return found

    def memory(self) -> dict[str, Any] | None:
        """Bytes of intermediates for the first shapes that are ready, as the graph's own memory holds them."""
        key = next(iter(self._ready), None)
        use = None if key is None else memory_use(self._lowered(key))
        share = self.target.dtype.itemsize / 4  # floats travel in the target's type
        return None if use is None else {"total": int(use.total * share), "peak": int(use.peak * share), "at": use.at}

    def facts(self) -> dict[str, Any]:
        """What the plan says of itself: each set of shapes with how it runs, and what its intermediates take."""
        points = []
        for key, program in self._ready.items():
            point = self.points.get(key, Point())
            points.append(
                {
                    "shapes": {v.name: list(s) for v, s in zip(self.graph.inputs, key, strict=True) if s is not None},
                    "captured": isinstance(program, Captured),
                    "why_not": program.reason if isinstance(program, _Eager) else "",
                    "tactics": dict(point.choices),
                    "times_ms": {name: dict(taken) for name, taken in point.times.items()},
                    "whole_ms": dict(point.whole),
                    "graph_bytes": program.nbytes if isinstance(program, Captured) else None,
                }
            )
        name = torch.cuda.get_device_name(self.target.device) if self.target.cuda else "CPU"
        return {"device": str(self.target.device), "name": name, "precision": self.precision, "points": points}

    def stored(self) -> dict[str, Any]:
        """For the plan file."""
        points = [
            {
                "shapes": [None if shape is None else list(shape) for shape in key],
                "choices": p.choices,
                "times": p.times,
                "whole": p.whole,
            }
            for key, p in self.points.items()
        ]
        return {
            "device": self.target.device.type,
            "built_on": tuning.device_key(self.target),
            "precision": self.precision,
            "scales": self.scales,
            "points": points,
        }

    @classmethod
    def restored(cls, graph: Graph, stored: Mapping[str, Any]) -> GpuRuntime:
        """From the plan file: on another kind of device candidates are timed again when shapes first come."""
        runtime = cls(graph, stored["device"], stored["precision"], dict(stored["scales"]))
        same = stored["built_on"] == tuning.device_key(runtime.target)
        for point in stored["points"]:
            key = tuple(None if shape is None else tuple(shape) for shape in point["shapes"])
            if same:
                runtime.points[key] = Point(point["choices"], point["times"], point["whole"])
            else:
                pairs = zip(graph.inputs, key, strict=True)
                shapes = {value.name: shape for value, shape in pairs if shape is not None}
                runtime.build(shapes, TimingCache(), True, bool(point["whole"]))
        return runtime


def label(node: Node) -> str:
    """What a node of a lowered graph is called in a plan: by its first result that somebody reads."""
    return next((value.name for value in node.outputs if value.name), node.name)


@dataclass
class _Eager:
    """A program that runs node by node, and why it is not captured."""

    program: DeviceProgram
    reason: str


class _Numerics:
    """cuDNN chooses by measurement; float32 products run in TF32 unless full precision was asked for."""

    def __init__(self, tf32: bool) -> None:
        self.tf32 = tf32

    def __enter__(self) -> None:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        self.before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, self.tf32, self.tf32

    def __exit__(self, *_: object) -> None:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = self.before


def _tensor(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise ExecutionError(f"a {type(x).__name__} can't go to a GPU")
    return x


def _shape(x: Any) -> tuple[int, ...] | None:
    return tuple(x.shape) if isinstance(x, Tensor) else None


def _typed(x: Any, dtype: DType | None) -> Any:
    return x.to(dtype.torch) if isinstance(x, Tensor) and dtype is not None and x.dtype is not dtype.torch else x
