"""A lowered graph bound to kernels of one device, and its capture as a CUDA graph.

Capturing records the kernels once, with every intermediate at a fixed place of the graph's own memory, where tensors
that are not alive together share it; a replay is one launch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trine.graph.errors import ExecutionError
from trine.graph.gpu.registry import Kernel, Target
from trine.graph.ir import Graph, Node, Value

Step = tuple[Node, Kernel, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The node, its kernel, registers read, registers written (-1 for nobody), registers that are free afterwards."""


class DeviceProgram:
    """Runs the nodes in order, each by the kernel it was given."""

    def __init__(self, graph: Graph, kernels: Mapping[Node, Kernel], target: Target) -> None:
        self.graph, self.kernels, self.target = graph, dict(kernels), target
        self._slots: dict[Value, int] = {}
        self._fixed: dict[int, Any] = {}
        for value in graph.inputs:
            self._slot(value)
        self.steps = self._with_releases([self._step(node) for node in graph.nodes])
        self._outputs = [self._slot(value) for value in graph.outputs]
        for value in graph.outputs:
            if value.is_constant:
                self._fixed[self._slots[value]] = target.constant(value)

    def _slot(self, value: Value | None) -> int:
        return -1 if value is None else self._slots.setdefault(value, len(self._slots))

    def _step(self, node: Node) -> Step:
        captures = [value for graph in node.subgraphs for value in graph.captures()]
        reads = [None if value is not None and value.is_constant else value for value in node.inputs]
        inputs = tuple(self._slot(value) for value in (*reads, *dict.fromkeys(captures)))
        outputs = tuple(self._slot(value) if value.name else -1 for value in node.outputs)
        return node, self.kernels[node], inputs, outputs, ()

    def _with_releases(self, steps: list[Step]) -> list[Step]:
        alive = {-1, *(self._slot(value) for value in (*self.graph.outputs, *self.graph.inputs))}
        released = []
        for node, kernel, inputs, outputs, _ in reversed(steps):
            last = tuple({*inputs, *outputs} - alive)
            alive.update(last)
            released.append((node, kernel, inputs, outputs, last))
        return released[::-1]

    def run(self, *arguments: Any) -> tuple[Any, ...]:
        """Inputs in order to outputs in order, all on the target. ExecutionError names the node that failed."""
        registers: list[Any] = [None] * (len(self._slots) + 1)  # the last one, -1, holds None
        registers[: len(arguments)] = arguments
        for slot, constant in self._fixed.items():
            registers[slot] = constant
        for node, kernel, inputs, outputs, last in self.steps:
            try:
                result = kernel(*[registers[slot] for slot in inputs])
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ExecutionError(f"node {node.name!r} ({node.op}) failed: {reason}") from error
            for slot, part in zip(outputs, result if isinstance(result, tuple) else (result,), strict=False):
                if slot >= 0:
                    registers[slot] = part
            for slot in last:
                registers[slot] = None
        return tuple(registers[slot] for slot in self._outputs)

    def trace(self, arguments: Sequence[Any], see: Any) -> tuple[Any, ...]:
        """As `run`, asking `see(node, kernel, inputs)` for each node's results."""
        registers: list[Any] = [None] * (len(self._slots) + 1)
        registers[: len(arguments)] = arguments
        for slot, constant in self._fixed.items():
            registers[slot] = constant
        for node, kernel, inputs, outputs, last in self.steps:
            result = see(node, kernel, [registers[slot] for slot in inputs])
            for slot, part in zip(outputs, result if isinstance(result, tuple) else (result,), strict=False):
                if slot >= 0:
                    registers[slot] = part
            for slot in last:
                registers[slot] = None
        return tuple(registers[slot] for slot in self._outputs)


class Captured:
    """A function of tensors of fixed shapes as a CUDA graph. Runs one at a time, from any thread."""

    def __init__(self, function: Any, inputs: Sequence[Tensor]) -> None:
        self.function = function  # what it holds (weights) must live as long as the graph, which only knows addresses
        self.inputs = [_like(x) for x in inputs]
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self._lock = threading.Lock()
        device = self.inputs[0].device if self.inputs else torch.device("cuda", torch.cuda.current_device())
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            function(*self.inputs)  # libraries and Triton prepare themselves outside of the capture
        torch.cuda.current_stream(device).wait_stream(self._stream)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)
        self.nbytes = torch.cuda.memory_allocated(device) - before

    def replay(self) -> None:
        self.graph.replay()

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the outputs for these inputs, which are copied in (and converted, if need be)."""
        with self._lock:
            for own, given in zip(self.inputs, inputs, strict=True):
                own.copy_(given, non_blocking=True)
            self.graph.replay()
            return [output.clone() for output in self.outputs]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.preserve_format)
