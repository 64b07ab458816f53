"""A graph bound for one set of input shapes: tapes of native kernels, with calls of Python between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import c_int64
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch

from trine.graph.errors import ExecutionError
from trine.graph.ir import Graph, Node, Value
from trine.graph.native.elementwise import may_defer
from trine.graph.native.narrow import narrow_values
from trine.graph.native.packed import Packed
from trine.graph.native.recorder import RULES, PythonItem, Recorder
from trine.graph.native.slices import Slices, record_slices
from trine.graph.native.structure import joined
from trine.graph.native.tape import Arenas, Context, Tape
from trine.graph.native.tensor import NUMBERS, Tensor
from trine.graph.runtime import Kernel, bind

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LayerTime:
    """What one step for a node takes; `kernel` is "python" where Python runs the node."""

    node: Node
    kernel: str
    milliseconds: float


@dataclass(eq=False)
class _Native:
    """Steps [first, end) of the tape, and what Python hands in for them: slots with values."""

    first: int
    end: int
    hand_in: list[tuple[int, Value]]


@dataclass(eq=False)
class _Call:
    """A node that Python runs: its kernel, and its inputs (captures of subgraphs last)."""

    node: Node
    kernel: Kernel
    inputs: list[Value | None]


class UnfitSlicesError(Exception):
    """A node in a loop over images has no kernel."""


class NativeProgram:
    """Runs a graph whose inputs have fixed shapes. Several threads may run it at once.

    `variants` names the rule to try first for a node; `kernel_of` gives the Python kernel of a node that has no rule;
    `origins` says of which nodes the graph's are copies; `arenas` may serve several programs. `slices` are loops over
    images; UnfitSlicesError where they can't be.
    """

    def __init__(
        self,
        graph: Graph,
        packed: Packed,
        variants: Mapping[Node, str] | None = None,
        kernel_of: Callable[[Node], Kernel | None] | None = None,
        origins: Mapping[Node, Node] | None = None,
        arenas: Arenas | None = None,
        slices: Sequence[Slices] = (),
    ) -> None:
        self._arenas = arenas or Arenas()
        self.graph = graph
        self.origins = {node: node for node in graph.nodes} if origins is None else dict(origins)
        direct = [value for value in dict.fromkeys(graph.outputs) if _plain(value)]
        self._outputs = {value: slot for slot, value in enumerate(direct, 1)}
        self.sizes = {value: size for part in slices for value, size in part.sizes().items()}
        """Bytes of values of loops, for all images."""
        self.recorder = tape = _recorded(graph, packed, self._outputs, variants or {}, slices)
        arena = tape.finish(graph.outputs)
        self.tape = Tape(tape.steps, arena, tape.slots)
        self._items = self._plan(kernel_of or (lambda node: None))
        self._contexts: list[Context] = []
        self._array_outputs = [
            (value.static_shape or (), value.dtype.numpy, slot) for value, slot in self._outputs.items() if value.dtype
        ]
        places = {value: place for place, value in enumerate(self._outputs)}
        self._array_places = [places[value] for value in graph.outputs if value in places]
        slots = {tensor.buffer.slot: value for value, tensor in tape.externals.items()}
        self._array_inputs = [
            (slot, graph.inputs.index(value)) for slot, value in slots.items() if value in graph.inputs
        ]
        self._lock = Lock()

    @property
    def arena_bytes(self) -> int:
        """What one run takes for intermediate values."""
        return self.tape.arena_bytes

    @property
    def run_bytes(self) -> int:
        """What one run takes for intermediate values and results, those of nodes that Python runs all together."""
        outside = {value for value in self.graph.outputs if value.producer is not None}
        outside.update(value for node in self.python_nodes for value in node.outputs)
        return self.arena_bytes + sum(value.nbytes or 0 for value in outside)

    @property
    def python_nodes(self) -> list[Node]:
        """Nodes that no native kernel computes."""
        return [item.node for item in self._items if isinstance(item, _Call)]

    def _plan(self, kernel_of: Callable[[Node], Kernel | None]) -> list[_Native | _Call]:
        """Runs of steps become one call each."""
        slots = {tensor.buffer: (tensor.buffer.slot, value) for value, tensor in self.recorder.externals.items()}
        items: list[_Native | _Call] = []
        count = 0
        for item in self.recorder.items:
            if isinstance(item, PythonItem):
                items.append(self._call(item.node, kernel_of))
                continue
            if not items or not isinstance(items[-1], _Native):
                items.append(_Native(count, count, []))
            run = items[-1]
            assert isinstance(run, _Native)
            count += 1
            run.end = count
            for tensor in item.pointers.values():
                found = slots.get(tensor.buffer)
                if found is not None and found not in run.hand_in:
                    run.hand_in.append(found)
        return items

    def _call(self, node: Node, kernel_of: Callable[[Node], Kernel | None]) -> _Call:
        kernel = kernel_of(node)
        captures: list[Value] = []
        if kernel is None:
            inner = {part: kernel_of(part) for graph in node.subgraphs for part in graph.walk()}
            kernel, captures = bind(node, {part: found for part, found in inner.items() if found is not None})
        return _Call(node, kernel, [*node.inputs, *captures])

    def run(self, *arguments: Any) -> tuple[Any, ...]:
        """Inputs to outputs, in order; the outputs are the caller's. ExecutionError names the node that failed."""
        context = self._take()
        try:
            return self._run(context, arguments)
        finally:
            self._give(context)

    @cached_property
    def is_one_call(self) -> bool:
        """Whether a run is one tape and nothing else, from inputs to outputs."""
        whole = len(self._items) == 1 and isinstance(self._items[0], _Native)
        return whole and set(self.graph.outputs) <= set(self._outputs)

    def run_arrays(self, arrays: Sequence[Array]) -> list[Array]:
        """As `run` where `is_one_call`, on contiguous NumPy arrays of the right types and shapes: the shortest way."""
        item = self._items[0]
        assert isinstance(item, _Native)
        made = [np.empty(shape, dtype) for shape, dtype, _ in self._array_outputs]
        context = self._take()
        try:
            bases = context.bases
            for (_, _, slot), array in zip(self._array_outputs, made, strict=True):
                bases[slot] = array.__array_interface__["data"][0]
            for slot, place in self._array_inputs:
                bases[slot] = arrays[place].__array_interface__["data"][0]
            failed = self.tape.run(context, item.first, item.end)
        finally:
            self._give(context)
        if failed >= 0:
            raise self._failure(failed)
        return [made[place] for place in self._array_places]

    def _take(self) -> Context:
        with self._lock:
            context = self._contexts.pop() if self._contexts else None
        context = Context(self.tape) if context is None else context
        context.use(self._arenas.take(self.tape.arena_bytes))
        return context

    def _give(self, context: Context) -> None:
        self._arenas.give(context.arena)
        with self._lock:
            self._contexts.append(context)

    def _failure(self, step: int) -> ExecutionError:
        node = self.tape.steps[step].node
        return ExecutionError(f"node {node.name!r} ({node.op}) failed: an index is out of range")

    def profile(self, arguments: Sequence[Any], runs: int) -> list[LayerTime]:
        """Mean milliseconds of each step and each call of Python, in running order."""
        context = self._take()
        times = (c_int64 * max(1, len(self.tape.steps)))()
        total = [0.0] * len(times)
        calls: dict[Node, float] = {}
        for _ in range(runs):
            self._run(context, arguments, times, calls)
            total = [before + now for before, now in zip(total, times, strict=True)]
        self._give(context)
        found: list[LayerTime] = []
        for item in self._items:
            if isinstance(item, _Call):
                found.append(LayerTime(item.node, "python", calls[item.node] / runs * 1e3))
                continue
            steps = self.tape.steps[item.first : item.end]
            found += [
                LayerTime(step.node, step.kernel_name, total[item.first + k] / runs / 1e6)
                for k, step in enumerate(steps)
            ]
        return found

    def _run(
        self, context: Context, arguments: Sequence[Any], times: Any = None, calls: dict[Node, float] | None = None
    ) -> tuple[Any, ...]:
        values: dict[Value, Any] = dict(zip(self.graph.inputs, arguments, strict=True))
        made: dict[Value, torch.Tensor] = {}
        for value, slot in self._outputs.items():
            assert value.dtype is not None
            assert value.static_shape is not None
            made[value] = torch.empty(value.static_shape, dtype=value.dtype.torch)
            context.bases[slot] = made[value].data_ptr()
        kept: list[torch.Tensor] = []
        for item in self._items:
            if isinstance(item, _Call):
                start = perf_counter()
                self._python(item, context, values, made)
                if calls is not None:
                    calls[item.node] = calls.get(item.node, 0.0) + perf_counter() - start
                continue
            for slot, value in item.hand_in:
                tensor = self._checked(value, values[value])
                kept.append(tensor)
                context.bases[slot] = tensor.data_ptr()
            failed = self.tape.run(context, item.first, item.end, times)
            if failed >= 0:
                raise self._failure(failed)
        return tuple(self._result(value, values, made) for value in self.graph.outputs)

    def _python(
        self, item: _Call, context: Context, values: dict[Value, Any], made: Mapping[Value, torch.Tensor]
    ) -> None:
        given = [self._given(value, context, values, made) for value in item.inputs]
        try:
            result = item.kernel(*given)
        except (ExecutionError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ExecutionError(f"node {item.node.name!r} ({item.node.op}) failed: {reason}") from error
        results = result if isinstance(result, tuple) else (result,)
        for value, part in zip(item.node.outputs, results, strict=False):
            if value.name:
                values[value] = _own(part, context)

    def _given(
        self, value: Value | None, context: Context, values: Mapping[Value, Any], made: Mapping[Value, torch.Tensor]
    ) -> Any:
        if value is None:
            return None
        if value in values:
            return values[value]
        if value.is_constant:
            return value.data
        tensor = self.recorder.tensors[value]
        return self._seen(tensor, context, values, made)

    def _seen(
        self, tensor: Tensor, context: Context, values: Mapping[Value, Any], made: Mapping[Value, torch.Tensor]
    ) -> torch.Tensor:
        """A tensor of the tape, as torch sees it."""
        buffer = tensor.buffer
        if buffer.in_arena:
            return context.view(tensor)
        base = buffer.owner
        if not buffer.address:
            owners = {self._outputs[value]: whole for value, whole in made.items()}
            for value, external in self.recorder.externals.items():
                if external.buffer is buffer:
                    owners[buffer.slot] = self._checked(value, values[value])
            base = owners[buffer.slot]
        flat: torch.Tensor = base.reshape(-1)
        return flat.as_strided(tensor.shape, tensor.strides, flat.storage_offset() + tensor.offset)

    @staticmethod
    def _checked(value: Value, given: Any) -> torch.Tensor:
        """What Python made, as the tape expects it."""
        assert value.dtype is not None
        if not isinstance(given, torch.Tensor) or given.dtype is not value.dtype.torch:
            raise ExecutionError(f"value {value.name!r} is not {value.dtype}, as it was said to be")
        if tuple(given.shape) != value.static_shape:
            raise ExecutionError(f"value {value.name!r} has shape {list(given.shape)}, not {list(value.shape or ())}")
        return given.contiguous()

    def _result(self, value: Value, values: Mapping[Value, Any], made: Mapping[Value, torch.Tensor]) -> Any:
        if value in values:
            return values[value]
        return value.data if value.is_constant else made[value]


def _recorded(
    graph: Graph,
    packed: Packed,
    outputs: Mapping[Value, int],
    variants: Mapping[Node, str],
    slices: Sequence[Slices],
) -> Recorder:
    """The whole graph. Python knows nothing of values in bfloat16: where it would meet one, there are none."""
    for narrow in (narrow_values(graph), frozenset[Value]()):
        tape = Recorder(packed, outputs, slots=1 + len(outputs))
        tape.may_defer, tape.narrow = may_defer(graph), narrow
        tape.joined = {} if narrow else joined(graph)
        _record_nodes(tape, graph, variants, slices)
        called = [item.node for item in tape.items if isinstance(item, PythonItem)]
        if narrow.isdisjoint(value for node in called for value in (*node.reads(), *node.outputs)):
            break
    return tape


def _record_nodes(tape: Recorder, graph: Graph, variants: Mapping[Node, str], slices: Sequence[Slices]) -> None:
    begins, inside = {part.nodes[0]: part for part in slices}, {node for part in slices for node in part.nodes}
    for node in graph.nodes:
        if node in begins:
            if not record_slices(tape, begins[node], lambda part: record(tape, part, variants.get(part))):
                raise UnfitSlicesError
        elif node not in inside and not record(tape, node, variants.get(node)):
            tape.python(node)


def record(tape: Recorder, node: Node, variant: str | None = None) -> bool:
    """The node by the rule `variant`, or else by the first that applies; whether one did."""
    rules = RULES.get(node.op, {})
    order = [variant, *(name for name in rules if name != variant)] if variant in rules else list(rules)
    for name in order:
        if name is not None and tape.record(node, rules[name]):
            tape.variants[node] = name
            return True
    return False


def _plain(value: Value) -> bool:
    """Whether a tape can write it."""
    return value.producer is not None and value.dtype in NUMBERS and value.static_shape is not None


def _own(result: Any, context: Context) -> Any:
    """The result, or a copy of it if it lies in the arena, where something else will soon lie."""
    if isinstance(result, list):
        return [_own(item, context) for item in result]
    if isinstance(result, torch.Tensor):
        start = result.untyped_storage().data_ptr()
        if context.arena.address <= start < context.arena.address + context.arena.nbytes:
            return result.clone()
    return result
