"""Times the candidates of each node on real inputs, and remembers the times.

Nodes are tuned in running order, each on what the nodes chosen before it really give it (their memory layout, too).
A candidate that fails, or disagrees with the operator's own meaning, is out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trine.graph.ir import Graph, Node, Value
from trine.graph.native import Executor, NativeProgram, Tensor
from trine.graph.native.executor import shapes_of
from trine.graph.native.timing import can_time, kernels_name, time_variants, variants_of
from trine.graph.runtime import Program, bind
from trine.graph.tactics.registry import REFERENCE, Kernel, candidates

_RUNS = 5
_SECONDS_A_CANDIDATE = 0.08


@dataclass(frozen=True)
class Choice:
    """How a node runs, and the milliseconds of each candidate, where they were taken."""

    tactic: str
    times: dict[str, float] = field(default_factory=dict)


class TimingCache:
    """Times by device, versions and problem, in a JSON file. A file of another form is an empty cache."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.times: dict[str, dict[str, float]] = {}
        if path is not None and path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                self.times = {key: dict(value) for key, value in stored["times"].items()}
            except (ValueError, KeyError, AttributeError, TypeError):
                self.times = {}

    def save(self) -> None:
        """Write the file whole, or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"times": self.times}, file)
        os.replace(file.name, self.path)


def device_key() -> str:
    """What times depend on besides the problem."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}|{torch.backends.cpu.get_cpu_capability()}|torch {torch.__version__}|{torch.get_num_threads()}"


def problem_key(node: Node, inputs: Sequence[Any]) -> str:
    """Operator, attributes, and what the inputs look like; equal problems have equal keys."""
    shapes = [
        None if x is None else (str(x.dtype), list(x.shape), list(x.stride()) if isinstance(x, torch.Tensor) else None)
        for x in inputs
    ]
    constant = [value is not None and value.is_constant for value in node.inputs]
    attributes = {key: str(value) for key, value in sorted(node.attributes.items())}
    options = [(option.name, option.channels_last) for option in candidates(node)]
    text = json.dumps([device_key(), node.op, attributes, shapes, constant, options])
    return f"{node.op}:{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _first(node: Node) -> tuple[Choice, Kernel | None]:
    made = ((option.name, option.make(node)) for option in candidates(node))
    name, kernel = next(((name, kernel) for name, kernel in made if kernel is not None), (REFERENCE, None))
    return Choice(name), kernel


def choose_first(graph: Graph, program: NativeProgram | None = None) -> dict[Node, Choice]:
    """Without timing: the first candidate that applies to each node; what `program` runs natively, as it does."""
    native = {} if program is None else native_choices(program)
    return {node: native.get(node) or _first(node)[0] for node in graph.walk() if node in native or candidates(node)}


def native_choices(program: NativeProgram) -> dict[Node, Choice]:
    """How a program runs those nodes that native kernels compute."""
    variants = program.recorder.variants
    return {program.origins[node]: Choice(name) for node, name in variants.items() if node in program.origins}


def kernels_for(choices: Mapping[Node, Choice]) -> dict[Node, Kernel]:
    """The chosen kernels; one that does not apply (on another device) is replaced by the next that does."""
    kernels: dict[Node, Kernel] = {}
    for node, choice in choices.items():
        options = sorted(candidates(node), key=lambda option: option.name != choice.tactic)
        if choice.tactic == REFERENCE:
            continue
        for option in options:
            kernel = option.make(node)
            if kernel is not None:
                kernels[node] = kernel
                break
    return kernels


def tune(
    graph: Graph,
    points: Sequence[Sequence[Any]],
    cache: TimingCache,
    budget: float | None = None,
    executor: Executor | None = None,
) -> tuple[dict[Node, Choice], dict[Node, Kernel]]:
    """The fastest candidate of each node of `graph` (subgraphs keep the first that applies), on these inputs.

    `points` are several sets of inputs: a node's choice is the one with the least time over all of them. After `budget`
    seconds nothing more is timed: nodes get what the cache knows, or the first candidate that applies. Nodes that
    `executor` runs natively choose among its variants, the others among the tactics in Python.
    """
    deadline = float("inf") if budget is None else time.monotonic() + budget
    choices = choose_first_in_subgraphs(graph)
    native = [] if executor is None else [executor.program(shapes_of(inputs)) for inputs in points]
    timed = [_tune_native(program, cache, deadline) for program in native]
    for node in set.intersection(*map(set, timed)) if timed else ():
        choices[node] = _joined([at[node] for at in timed])
    waiting = {node for node in graph.nodes if node not in choices and candidates(node)}
    kernels = kernels_for({node: choice for node, choice in choices.items() if node not in graph.nodes})
    if not waiting:
        return choices, kernels
    found = [_tune_at(graph, waiting, inputs, cache, kernels, deadline) for inputs in points]
    for node in found[0]:
        choice = choices[node] = _joined([at[node][0] for at in found])
        kernel = next((at[node][1] for at in found if at[node][0].tactic == choice.tactic), None)
        if kernel is not None:
            kernels[node] = kernel
    return choices, kernels


def _tune_native(program: NativeProgram, cache: TimingCache, deadline: float) -> dict[Node, Choice]:
    """The best variant of each node that the program runs natively."""
    found = native_choices(program)
    tensors = program.recorder.tensors
    for node in program.recorder.variants:
        origin = program.origins.get(node)
        if origin is None or not can_time(node, tensors):
            continue
        key = _native_key(node, tensors)
        if key not in cache.times and time.monotonic() < deadline:
            cache.times[key] = time_variants(node, tensors)
        times = cache.times.get(key)
        if times:
            found[origin] = Choice(min(times, key=lambda name: times[name]), times)
    return found


def _native_key(node: Node, tensors: Mapping[Value, Tensor]) -> str:
    """As `problem_key`, for variants of native kernels."""
    lie = [
        None
        if value is None
        else (list(tensors[value].shape), list(tensors[value].strides))
        if value in tensors
        else list(value.static_shape or ())
        for value in node.inputs
    ]
    attributes = {key: str(value) for key, value in sorted(node.attributes.items())}
    text = json.dumps([device_key(), kernels_name(), node.op, attributes, lie, variants_of(node)])
    return f"native {node.op}:{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _tune_at(
    graph: Graph,
    waiting: Collection[Node],
    inputs: Sequence[Any],
    cache: TimingCache,
    kernels: Mapping[Node, Kernel],
    deadline: float,
) -> dict[Node, tuple[Choice, Kernel | None]]:
    """The choice of each waiting node on these inputs, and its kernel."""
    found: dict[Node, tuple[Choice, Kernel | None]] = {}

    def pick(node: Node, arguments: list[Any]) -> Kernel | None:
        if node not in waiting:
            return None
        found[node] = _fastest(node, arguments, cache, time.monotonic() < deadline)
        return found[node][1]

    Program(graph, kernels).trace(inputs, choose=pick)
    return found


def _joined(choices: list[Choice]) -> Choice:
    """The candidate with the least sum of times, among those timed at every point; the first point's where none was."""
    common = set.intersection(*(set(choice.times) for choice in choices))
    if len(choices) == 1 or not common:
        return choices[0]
    sums = {name: sum(choice.times[name] for choice in choices) for name in choices[0].times if name in common}
    return Choice(min(sums, key=lambda name: sums[name]), sums)


def choose_first_in_subgraphs(graph: Graph) -> dict[Node, Choice]:
    choices: dict[Node, Choice] = {}
    for node in graph.nodes:
        for subgraph in node.subgraphs:
            choices |= choose_first(subgraph)
    return choices


def _fastest(node: Node, inputs: list[Any], cache: TimingCache, timing: bool) -> tuple[Choice, Kernel | None]:
    """From the cache, else by timing; where there is no time for that, the first that applies."""
    channels_last = any(option.channels_last for option in candidates(node))
    if channels_last:
        inputs = [_channels_last(value) for value in inputs]
    key = problem_key(node, inputs)
    known = cache.times.get(key)
    if known:
        return _from_cache(node, known)
    if not timing:
        return _first(node)
    reference, _ = bind(node)
    expected = reference(*inputs)
    times: dict[str, float] = {}
    made: dict[str, Kernel] = {}
    for option in candidates(node):
        try:
            kernel = option.make(node)
            if kernel is None or not _agrees(kernel(*inputs), expected):
                continue
            times[option.name] = _time(kernel, inputs)
            made[option.name] = kernel
        except (RuntimeError, ValueError, TypeError):
            continue  # it does not take this problem
    if not (channels_last and times):
        times[REFERENCE] = _time(reference, inputs)
    cache.times[key] = times
    best = min(times, key=lambda name: times[name])
    return Choice(best, times), made.get(best)


def _channels_last(value: Any) -> Any:
    """An image with its channels innermost; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _from_cache(node: Node, known: dict[str, float]) -> tuple[Choice, Kernel | None]:
    for name in sorted(known, key=lambda name: known[name]):
        if name == REFERENCE:
            return Choice(REFERENCE, known), None
        for option in candidates(node):
            kernel = option.make(node) if option.name == name else None
            if kernel is not None:
                return Choice(name, known), kernel
    return Choice(REFERENCE, known), None


def _agrees(result: Any, expected: Any) -> bool:
    """Within what the order of sums may change."""
    if not isinstance(result, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return False
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    scale = float(expected.float().abs().max()) if expected.numel() else 1.0
    return bool(
        torch.allclose(result.float(), expected.float(), rtol=1e-3, atol=1e-4 * max(scale, 1e-6), equal_nan=True)
    )


def _time(kernel: Kernel, inputs: list[Any]) -> float:
    """The least of some runs, in milliseconds: what disturbs a run only ever makes it longer."""
    best = float("inf")
    deadline = time.perf_counter() + _SECONDS_A_CANDIDATE
    for _ in range(_RUNS):
        start = time.perf_counter()
        kernel(*inputs)
        end = time.perf_counter()
        best = min(best, end - start)
        if end > deadline:
            break
    return best * 1e3
