"""Times candidates on the device, as they will run: in a CUDA graph, all nodes that pose the same problem in a row.

Equal layers have different weights, so a row of them finds its weights where the model's run finds them: in the card's
cache where all fit there, in its memory otherwise. The fastest few of each problem are then tried in the whole graph,
and what is fastest there is kept.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from trine.graph.gpu import generic
from trine.graph.gpu.program import Captured, DeviceProgram
from trine.graph.gpu.registry import Kernel, Target, options
from trine.graph.ir import Graph, Node
from trine.graph.runtime import bind
from trine.graph.tactics.tuning import TimingCache

logger = logging.getLogger(__name__)

exclusive: Callable[[], AbstractContextManager[Any]] = nullcontext
"""What holds the device for the time of a measurement; replaced where several processes measure at once."""

_TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 6e-2}
"""Largest error of a candidate, relative to the norm of the float32 result (float32 by TF32 on the matrix units)."""
_CLOSE = 1.15
_OURS = ("triton", "hopper", "depthwise")
"""How names of candidates begin that are compiled when they first run."""
_LAUNCHES = 24


def first_choices(graph: Graph, target: Target) -> dict[Node, str]:
    """Without timing: the first candidate of each node that has any."""
    found = {node: options(node, target) for node in graph.nodes}
    return {node: next(iter(candidates)) for node, candidates in found.items() if candidates}


def kernels_of(graph: Graph, choices: Mapping[Node, str], target: Target) -> dict[Node, Kernel]:
    """A kernel for each node: what was chosen, the first candidate that applies, or the operator's meaning."""
    kernels: dict[Node, Kernel] = {}
    for node in graph.nodes:
        candidates = options(node, target)
        name = choices.get(node)
        if name is not None and name in candidates:
            kernels[node] = candidates[name]()
        elif (candidates and name is None) or candidates:
            kernels[node] = next(iter(candidates.values()))()
        else:
            kernels[node] = generic.safe(node, lambda node=node: generic.kernel(node, target), target)  # type: ignore[misc]
    return kernels


def settle(program: DeviceProgram, inputs: Sequence[Any]) -> dict[Node, list[Any]]:
    """Run once, moving to the host what fails on the device; each node's inputs as they were."""
    seen: dict[Node, list[Any]] = {}

    def see(node: Node, kernel: Kernel, given: list[Any]) -> Any:
        seen[node] = given
        try:
            return kernel(*given)
        except (RuntimeError, TypeError, ValueError, IndexError):
            if options(node, program.target):
                raise
            program.kernels[node] = generic.on_host(node, program.target)
            return program.kernels[node](*given)

    program.trace(inputs, see)
    return seen


def device_key(target: Target) -> str:
    if not target.cuda:
        return f"{target.device.type}|torch {torch.__version__}"
    return f"{torch.cuda.get_device_name(target.device)}|torch {torch.__version__}|cuda {torch.version.cuda}"


def problem(node: Node, given: Sequence[Any], target: Target) -> str:
    """Operator, attributes, and what the inputs look like, constants too: nodes of one problem share their choice."""

    def described(index: int) -> Any:
        value, x = node.inputs[index], given[index]
        if value is None:
            return None
        if value.is_constant:
            return ["constant", str(value.data.dtype), list(value.data.shape)]
        return [str(x.dtype), list(x.shape), list(x.stride())] if isinstance(x, Tensor) else str(type(x))

    attributes = {key: str(value) for key, value in sorted(node.attributes.items()) if not key.endswith("scale")}
    outputs = [bool(value.name) for value in node.outputs]
    shapes = [described(index) for index in range(len(node.inputs))]
    return json.dumps([device_key(target), str(target.dtype), target.tf32, node.op, attributes, shapes, outputs])


def tune(
    graph: Graph, inputs: Sequence[Any], target: Target, cache: TimingCache, budget: float | None = None
) -> tuple[dict[Node, str], dict[Node, dict[str, float]]]:
    """The fastest candidate of each node, and the milliseconds a launch of those that were timed.

    After `budget` seconds nothing more is timed: nodes get what the cache knows, or the first candidate.
    """
    deadline = float("inf") if budget is None else time.monotonic() + budget
    choices = first_choices(graph, target)
    program = DeviceProgram(graph, kernels_of(graph, choices, target), target)
    seen = settle(program, inputs)
    groups: dict[str, list[Node]] = {}
    for node in choices:
        groups.setdefault(problem(node, seen[node], target), []).append(node)
    if target.cuda:
        wanted = {nodes[0]: _worth_compiling(nodes[0], cache.times.get(key), target) for key, nodes in groups.items()}
        _compile_ahead(((node, name) for node, names in wanted.items() for name in names), seen, target, deadline)
    times: dict[Node, dict[str, float]] = {}
    for key, nodes in groups.items():
        found = cache.times.get(key)
        if found is None and time.monotonic() < deadline:
            found = cache.times[key] = _time_group(nodes, seen[nodes[0]], target)
        if found is not None:
            best = min(found, key=found.__getitem__)
            times |= dict.fromkeys(nodes, found)
            choices |= dict.fromkeys(nodes, best)
    if target.cuda:
        timed = [nodes for nodes in groups.values() if nodes[0] in times]
        _refine(graph, inputs, target, choices, timed, times, deadline)
    return choices, times


def _worth_compiling(node: Node, known: Mapping[str, float] | None, target: Target) -> list[str]:
    """Candidates of ours that will be timed, or, where times are known, tried in the whole graph."""
    if known is None:
        candidates = options(node, target)
        names = list(candidates) if len(candidates) > 1 else []
    else:
        least = min(known.values())
        names = [name for name, taken in known.items() if taken <= least * _CLOSE]
    return [name for name in names if name.startswith(_OURS)]


def _compile_ahead(
    wanted: Iterable[tuple[Node, str]], seen: Mapping[Node, list[Any]], target: Target, deadline: float
) -> None:
    """Run each of these kernels once, several at a time: almost all of it is their compilation, most of which holds no
    lock of Python's. What fails here fails again where it is reported.
    """

    def first_run(node: Node, name: str) -> None:
        if time.monotonic() < deadline:
            with torch.cuda.device(target.device), torch.inference_mode(), suppress(Exception):
                options(node, target)[name]()(*seen[node])

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 16)) as threads:
        list(threads.map(lambda pair: first_run(*pair), wanted))
    torch.cuda.synchronize(target.device)


def _time_group(nodes: list[Node], given: list[Any], target: Target) -> dict[str, float]:
    expected = _expected(nodes[0], given, target)
    times: dict[str, float] = {}
    candidates = options(nodes[0], target)
    if len(candidates) == 1:
        return dict.fromkeys(candidates, 0.0)
    for name in candidates:
        try:
            kernels = [options(node, target)[name]() for node in nodes]
            if not agrees(kernels[0](*given), expected, nodes[0]):
                logger.debug("%s for %s %s gives wrong results", name, nodes[0].op, nodes[0].name)
                continue
            with exclusive():
                times[name] = _time(kernels, given, target)
        except Exception as error:
            # a compiler's refusal may be of any type; the candidate is out
            logger.debug("%s for %s %s: %s", name, nodes[0].op, nodes[0].name, str(error)[:300])
            if target.cuda:
                torch.cuda.synchronize(target.device)
    return times or {next(iter(candidates)): 0.0}


def _expected(node: Node, given: list[Any], target: Target) -> tuple[Any, ...]:
    """The operator's meaning in float32 on the same inputs."""
    function, _ = bind(node)
    arguments = [
        value.data.to(target.device) if value is not None and value.is_constant else x
        for value, x in zip(node.inputs, given, strict=True)
    ]
    wide = [x.float() if isinstance(x, Tensor) and x.dtype is target.dtype else x for x in arguments]
    with target.device:
        result = function(*wide)
    return result if isinstance(result, tuple) else (result,)


def agrees(result: Any, expected: tuple[Any, ...], node: Node) -> bool:
    """Whether each output that somebody wants is within its type's tolerance of the float32 result."""
    results = result if isinstance(result, tuple) else (result,)
    for value, actual, wanted in zip(node.outputs, results, expected, strict=False):
        if not value.name:
            continue
        if not isinstance(actual, Tensor) or actual.shape != wanted.shape:
            return False
        norm = float(torch.linalg.vector_norm(wanted.double()))
        error = float(torch.linalg.vector_norm(actual.double() - wanted.double()))
        if not error <= _TOLERANCE.get(actual.dtype, 0.0) * norm + 1e-6:
            return False
    return True


def _time(kernels: list[Kernel], given: list[Any], target: Target) -> float:
    """Milliseconds a launch: the least of some replays of a graph of at least 24 launches."""
    rounds = max(1, _LAUNCHES // len(kernels))

    def run() -> tuple[()]:
        for _ in range(rounds):
            for kernel in kernels:
                kernel(*given)
        return ()

    return seconds(run, target) * 1e3 / (rounds * len(kernels))


def launch_ms(kernel: Kernel, given: list[Any], target: Target, launches: int) -> float:
    """Milliseconds a launch of one kernel, some in a row; one that can't be captured, by the host's clock."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # a view launches nothing
            return seconds(lambda: [kernel(*given) for _ in range(launches)] and (), target) * 1e3 / launches
    except RuntimeError:
        start = time.perf_counter()
        kernel(*given)
        if target.cuda:
            torch.cuda.synchronize(target.device)
        return (time.perf_counter() - start) * 1e3


def seconds(run: Callable[[], Any], target: Target, repeats: int = 4) -> float:
    """The least time of `run`, captured as a CUDA graph; on a CPU (tests), once by the clock."""
    if not target.cuda:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    captured = Captured(run, [])
    return replay_seconds(captured.replay, repeats)


def replay_seconds(replay: Callable[[], None], repeats: int = 4) -> float:
    """The least time of some replays by the device's own clock."""
    replay()
    best = float("inf")
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return best


def _refine(
    graph: Graph, inputs: Sequence[Any], target: Target, choices: dict[Node, str], groups: list[list[Node]],
    times: Mapping[Node, Mapping[str, float]], deadline: float,
) -> None:  # fmt: skip
    """Try what was nearly as fast alone in the whole graph, dearest problems first; keep what makes that faster."""
    made: dict[tuple[Node, str], Kernel] = {}

    def kernel(node: Node, name: str) -> Kernel:
        if (node, name) not in made:
            made[node, name] = options(node, target)[name]()
        return made[node, name]

    kernels = kernels_of(graph, choices, target)
    try:
        best = whole_seconds(graph, kernels, inputs, target)
    except RuntimeError:
        return  # it can't be captured: there is nothing to compare
    order = sorted(groups, key=lambda nodes: -min(times[nodes[0]].values()) * len(nodes))
    for nodes in order[:12]:
        found = times[nodes[0]]
        least = min(found.values())
        for name in sorted(found, key=lambda name: found[name])[1:4]:
            if found[name] > least * _CLOSE or time.monotonic() > deadline:
                break
            trial = {**kernels, **{node: kernel(node, name) for node in nodes}}
            took = whole_seconds(graph, trial, inputs, target)
            if took < best * 0.995:
                best, kernels = took, trial
                choices.update(dict.fromkeys(nodes, name))


def whole_seconds(graph: Graph, kernels: Mapping[Node, Kernel], inputs: Sequence[Any], target: Target) -> float:
    """The time of a replay of the whole graph."""
    program = DeviceProgram(graph, kernels, target)
    with exclusive():
        return replay_seconds(Captured(program.run, inputs).replay, 8)
