"""Runs a graph natively for whatever shapes come: a program each, the latest few kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch

from trine.graph.ir import Graph, Node
from trine.graph.native.narrow import narrow_values
from trine.graph.native.packed import Packed
from trine.graph.native.program import Array, NativeProgram, UnfitSlicesError
from trine.graph.native.slices import Slices, in_slices, worth_slicing
from trine.graph.native.specialise import clone, specialise
from trine.graph.native.tape import Arenas
from trine.graph.runtime import Kernel

_KEPT = 16
Shapes: TypeAlias = tuple[tuple[int, ...] | None, ...]


class Executor:
    """`variants` names the native rule of nodes, `kernel_of` gives the Python kernel of those that have none."""

    def __init__(
        self,
        graph: Graph,
        variants: Mapping[Node, str],
        kernel_of: Callable[[Node], Kernel | None],
        packed: Mapping[str, torch.Tensor],
    ) -> None:
        self.graph, self.variants, self.kernel_of = graph, variants, kernel_of
        self.packed = Packed(graph, packed)
        self._programs: OrderedDict[Shapes, NativeProgram] = OrderedDict()
        self._arenas = Arenas()
        self._lock = Lock()
        self._types = [(value.name, value.dtype.numpy if value.dtype else None) for value in graph.inputs]
        values = [value for node in graph.nodes for value in node.outputs if value.name]
        self._is_static = all(value.static_shape is not None for value in (*graph.inputs, *values))

    def run(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Inputs in order to outputs in order, which are the caller's own."""
        return self.program(shapes_of(arguments)).run(*arguments)

    def run_arrays(self, inputs: Mapping[str, Any]) -> list[Array] | None:
        """The outputs, by the shortest way; None where that is not open: for shapes not seen before, for instance."""
        if len(inputs) != len(self._types):
            return None
        arrays = []
        for name, dtype in self._types:
            array = inputs.get(name)
            if type(array) is not np.ndarray or array.dtype != dtype or not array.flags.c_contiguous:
                return None
            arrays.append(array)
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self._programs:
            return None
        program = self.program(shapes)
        return program.run_arrays(arrays) if program.is_one_call else None

    def program(self, shapes: Shapes) -> NativeProgram:
        """The program for these shapes of the inputs."""
        with self._lock:
            program = self._programs.get(shapes)
            if program is not None:
                self._programs.move_to_end(shapes)
                return program
        program = self._make(shapes)
        with self._lock:
            self._programs[shapes] = program
            if len(self._programs) > _KEPT:
                self._programs.popitem(last=False)
        return program

    def packed_weights(self, shapes: Sequence[tuple[int, ...] | None]) -> dict[str, torch.Tensor]:
        """What the kernels have packed, at least for these shapes of the inputs."""
        self.program(tuple(shapes))
        return self.packed.entries

    def _make(self, shapes: Shapes) -> NativeProgram:
        with suppress(UnfitSlicesError):
            return self._bound(shapes, sliced=True)
        return self._bound(shapes, sliced=False)

    def _bound(self, shapes: Shapes, *, sliced: bool) -> NativeProgram:
        graph, origins = self.graph, {node: node for node in self.graph.nodes}
        if not self._is_static:
            try:
                graph, origins = specialise(self.graph, shapes)
            except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError):
                sliced = False  # the node that fails will say why
        slices: list[Slices] = []
        if sliced and not narrow_values(graph) and worth_slicing(graph):
            graph, copies = clone(graph)
            slices, parts = in_slices(graph)
            copies |= {part: copies[node] for part, node in parts.items()}
            origins = {node: origins[old] for node, old in copies.items() if old in origins}
        if graph is self.graph:
            return NativeProgram(graph, self.packed, self.variants, self.kernel_of, arenas=self._arenas)
        variants = {node: self.variants[old] for node, old in origins.items() if old in self.variants}

        def kernel_of(node: Node) -> Kernel | None:
            old = origins.get(node)
            return None if old is None else self.kernel_of(old)

        return NativeProgram(graph, self.packed, variants, kernel_of, origins, self._arenas, slices)


def shapes_of(arguments: Sequence[Any]) -> Shapes:
    """What a program depends on. Sequences and strings have no shape that counts."""
    return tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in arguments)
