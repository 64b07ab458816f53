"""A graph bound for one set of input shapes: tapes of native kernels, with calls of Python between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from trine.graph.errors import ExecutionError
from trine.graph.ir import Graph, Node, Value
from trine.graph.native.packed import Packed
from trine.graph.native.recorder import RULES, PythonItem, Recorder
from trine.graph.native.tape import Context, Tape
from trine.graph.native.tensor import NUMBERS, Tensor
from trine.graph.runtime import Kernel, bind


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


class NativeProgram:
    """Runs a graph whose inputs have fixed shapes. Several threads may run it at once.

    `variants` names the rule to try first for a node; `kernel_of` gives the Python kernel of a node that has no rule.
    """

    def __init__(
        self,
        graph: Graph,
        packed: Packed,
        variants: Mapping[Node, str] | None = None,
        kernel_of: Callable[[Node], Kernel | None] | None = None,
    ) -> None:
        self.graph = graph
        direct = [value for value in dict.fromkeys(graph.outputs) if _plain(value)]
        self._outputs = {value: slot for slot, value in enumerate(direct, 1)}
        self.recorder = tape = Recorder(packed, self._outputs, slots=1 + len(direct))
        for node in graph.nodes:
            if not record(tape, node, (variants or {}).get(node)):
                tape.python(node)
        arena = tape.finish(graph.outputs)
        self.tape = Tape(tape.steps, arena, tape.slots)
        self._items = self._plan(kernel_of or (lambda node: None))
        self._contexts: list[Context] = []
        self._lock = Lock()

    @property
    def arena_bytes(self) -> int:
        """What one run takes for intermediate values."""
        return self.tape.arena_bytes

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
        with self._lock:
            context = self._contexts.pop() if self._contexts else None
        if context is None:
            context = Context(self.tape)
        try:
            return self._run(context, arguments, None)
        finally:
            with self._lock:
                self._contexts.append(context)

    def _run(self, context: Context, arguments: Sequence[Any], times: Any) -> tuple[Any, ...]:
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
                self._python(item, context, values, made)
                continue
            for slot, value in item.hand_in:
                tensor = self._checked(value, values[value])
                kept.append(tensor)
                context.bases[slot] = tensor.data_ptr()
            failed = self.tape.run(context, item.first, item.end, times)
            if failed >= 0:
                raise ExecutionError(f"node {self.tape.steps[failed].name!r} failed: an index is out of range")
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


def record(tape: Recorder, node: Node, variant: str | None = None) -> bool:
    """The node by the rule `variant`, or else by the first that applies; whether one did."""
    rules = RULES.get(node.op, {})
    order = [variant, *(name for name in rules if name != variant)] if variant in rules else list(rules)
    return any(tape.record(node, rules[name]) for name in order if name is not None)


def _plain(value: Value) -> bool:
    """Whether a tape can write it."""
    return value.producer is not None and value.dtype in NUMBERS and value.static_shape is not None


def _own(result: Any, context: Context) -> Any:
    """The result, or a copy of it if it lies in the arena, where something else will soon lie."""
    if isinstance(result, list):
        return [_own(item, context) for item in result]
    if isinstance(result, torch.Tensor):
        start = result.untyped_storage().data_ptr()
        if context.address <= start < context.address + context.nbytes:
            return result.clone()
    return result
