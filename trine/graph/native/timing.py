"""Times the native variants of a node on inputs that lie as they do in the whole graph."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value
from trine.graph.native.packed import Packed
from trine.graph.native.recorder import RULES, Recorder
from trine.graph.native.tape import Arena, Context, Tape, library
from trine.graph.native.tensor import Buffer, Tensor
from trine.graph.runtime import bind

_RUNS = 8
_SURE = 2
"""Runs after which a variant is out that is a third slower than another one."""
_SECONDS = 0.3
_CACHE_BYTES = 64 << 20


def variants_of(node: Node) -> list[str]:
    """Names of the rules that there are for the node; whether they apply shows when they are recorded."""
    return list(RULES.get(node.op, {}))


def can_time(node: Node, tensors: Mapping[Value, Tensor]) -> bool:
    """Whether there is a choice, and inputs can be made up: floats that kernels take."""
    given = [value for value in node.inputs if value is not None and not value.is_constant]
    return len(variants_of(node)) > 1 and all(v.dtype is DType.FLOAT32 and v in tensors for v in given)


def time_variants(node: Node, tensors: Mapping[Value, Tensor], expected: bool = True) -> dict[str, float]:
    """Milliseconds of each variant that applies and (if `expected`) agrees with the operator's meaning.

    `tensors` says how the inputs lie. Weights come from memory, as they do in a run of a large network; the inputs,
    which some node has just made, from the cache.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = {
        value: _made_up(tensors[value], generator)
        for value in dict.fromkeys(node.inputs)
        if value is not None and not value.is_constant
    }
    wanted = None
    if expected:
        given = [None if value is None else inputs.get(value, value.data) for value in node.inputs]
        wanted = bind(node)[0](*given)
    trials: dict[str, _Trial] = {}
    for name in variants_of(node):
        trial = _Trial.of(node, name, tensors, inputs)
        if trial is not None and (wanted is None or _agrees(trial.result(), wanted)):
            trials[name] = trial
    return _race(trials)


def _race(trials: Mapping[str, _Trial]) -> dict[str, float]:
    """The least milliseconds of each trial: what disturbs a run only ever makes it longer.

    They take turns, so that what disturbs for a while hits all alike; those far behind leave early.
    """
    times = dict.fromkeys(trials, float("inf"))
    deadline = time.perf_counter() + _SECONDS
    for turn in range(_RUNS):
        left = [name for name in trials if turn < _SURE or times[name] < 4 / 3 * min(times.values())]
        if turn >= _SURE and (len(left) < 2 or time.perf_counter() > deadline):
            break
        for name in left:
            times[name] = min(times[name], trials[name].time())
    return times


class _Trial:
    """One variant of a node on a tape of its own."""

    def __init__(self, recorder: Recorder, node: Node, inputs: list[torch.Tensor]) -> None:
        end = len(recorder.steps)
        recorder.python(Node("Identity", [node.output], [Value("seen")]))  # the result stays readable
        self._node, self._recorder, self._inputs, self._end = node, recorder, inputs, end
        self._tape = Tape(recorder.steps, recorder.finish([]), recorder.slots)
        self._context = Context(self._tape)
        self._context.use(Arena(self._tape.arena_bytes))
        for slot, tensor in enumerate(inputs, 1):
            self._context.bases[slot] = tensor.data_ptr()

    @classmethod
    def of(
        cls, node: Node, variant: str, tensors: Mapping[Value, Tensor], inputs: Mapping[Value, torch.Tensor]
    ) -> _Trial | None:
        recorder = Recorder(Packed(Graph()), slots=1 + len(inputs))
        for slot, value in enumerate(inputs, 1):
            own = tensors[value]
            first, end = own.extent
            buffer = Buffer((end - first) * own.itemsize, slot=slot)
            recorder.tensors[value] = Tensor(buffer, own.dtype, own.shape, own.strides, own.offset - first)
        applies = recorder.record(node, RULES[node.op][variant])
        return cls(recorder, node, list(inputs.values())) if applies and recorder.steps else None

    def result(self) -> torch.Tensor:
        self._run()
        return self._context.view(self._recorder.tensors[self._node.output]).clone()

    def time(self) -> float:
        """Milliseconds of one run."""
        library().trine_probe_read(_other_data().data_ptr(), _CACHE_BYTES)
        for tensor in (*self._inputs, self._context.arena.data):
            library().trine_probe_read(tensor.data_ptr(), tensor.untyped_storage().nbytes() >> 18 << 18)
        start = time.perf_counter()
        self._run()
        return (time.perf_counter() - start) * 1e3

    def _run(self) -> None:
        self._tape.run(self._context, 0, self._end)


def kernels_name() -> str:
    """Which build of the native kernels runs, and on how many threads."""
    return f"{library().trine_isa().decode()} {library().trine_num_threads()}"


@cache
def _other_data() -> torch.Tensor:
    """More than a cache holds."""
    return torch.zeros(_CACHE_BYTES, dtype=torch.uint8)


def _made_up(tensor: Tensor, generator: torch.Generator) -> torch.Tensor:
    first, end = tensor.extent
    flat = torch.randn(max(end - first, 1), generator=generator)
    return flat.as_strided(tensor.shape, tensor.strides, tensor.offset - first)


def _agrees(result: torch.Tensor, expected: Any) -> bool:
    """Within what the order of sums may change."""
    if not isinstance(expected, torch.Tensor) or result.shape != expected.shape:
        return False
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    return torch.allclose(result, expected, rtol=1e-3, atol=1e-4 * max(scale, 1e-6), equal_nan=True)
