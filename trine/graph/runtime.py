"""Runs a graph: a flat list of bound calls on a list of registers, each emptied after its last reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from trine.graph.errors import ExecutionError, InputError
from trine.graph.ir import Graph, Node, Value
from trine.graph.operators import find

Kernel = Callable[..., Any]
_ABSENT = 0  # the register that always holds None: inputs that were left out, outputs that nobody wants


class Program:
    """A graph bound to kernels; `kernels` has those that a tactic chose, all others are the operators' own meaning.

    A subgraph's program takes what it captures before its own inputs. `run` may be called from several threads at once.
    """

    def __init__(self, graph: Graph, kernels: Mapping[Node, Kernel] | None = None) -> None:
        self.graph = graph
        self.captures = graph.captures()
        self._slots: dict[Value, int] = {}
        self._template: list[Any] = [None]
        for value in (*self.captures, *graph.inputs):
            self._slot(value)
        self._steps = [self._step(node, kernels or {}) for node in graph.nodes]
        self._outputs = [self._slot(value) for value in graph.outputs]
        self._steps = self._with_releases()

    def _slot(self, value: Value | None) -> int:
        if value is None:
            return _ABSENT
        if value not in self._slots:
            self._slots[value] = len(self._template)
            self._template.append(value.data)
        return self._slots[value]

    def _step(
        self, node: Node, kernels: Mapping[Node, Kernel]
    ) -> tuple[Kernel, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        kernel = kernels.get(node)
        captures: list[Value] = []
        if kernel is None:
            kernel, captures = bind(node, kernels)
        inputs = tuple(self._slot(value) for value in (*node.inputs, *captures))
        outputs = tuple(self._slot(value) if value.name else -1 for value in node.outputs)
        return kernel, inputs, outputs, ()

    def _with_releases(self) -> list[tuple[Kernel, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Each step with the registers that nobody reads after it."""
        constant = {slot for value, slot in self._slots.items() if value.is_constant}
        alive = {*self._outputs, *constant, _ABSENT, -1}
        steps = []
        for kernel, inputs, outputs, _ in reversed(self._steps):
            last = tuple({*inputs, *outputs} - alive)
            alive.update(last)
            steps.append((kernel, inputs, outputs, last))
        return steps[::-1]

    def run(self, *arguments: Any) -> tuple[Any, ...]:
        """Captured values and inputs in order to outputs in order. ExecutionError names the node that failed."""
        registers = self._template.copy()
        registers[1 : 1 + len(arguments)] = arguments
        step = 0
        try:
            for kernel, inputs, outputs, last in self._steps:
                result = kernel(*[registers[slot] for slot in inputs])
                if len(outputs) == 1 and not isinstance(result, tuple):
                    registers[outputs[0]] = result
                else:
                    for slot, part in zip(outputs, result, strict=False):
                        if slot >= 0:
                            registers[slot] = part
                for slot in last:
                    registers[slot] = None
                step += 1
        except ExecutionError:
            raise
        except MemoryError:
            raise
        except Exception as error:
            node = self.graph.nodes[step]
            shapes = ", ".join(_describe(value) for value in (registers[slot] for slot in self._steps[step][1]))
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ExecutionError(f"node {node.name!r} ({node.op}) failed on inputs {shapes}: {reason}") from error
        return tuple(registers[slot] for slot in self._outputs)

    def trace(
        self,
        arguments: Sequence[Any],
        see: Callable[[Node, list[Any], tuple[Any, ...]], None] | None = None,
        choose: Callable[[Node, list[Any]], Kernel | None] | None = None,
    ) -> tuple[Any, ...]:
        """As `run`, telling `see` each node with its inputs and outputs: for profiles and calibration.

        `choose`, given a node and its inputs, may name the kernel to run instead: for tuning.
        """
        registers = self._template.copy()
        registers[1 : 1 + len(arguments)] = arguments
        for node, (kernel, inputs, outputs, last) in zip(self.graph.nodes, self._steps, strict=True):
            given = [registers[slot] for slot in inputs]
            chosen = None if choose is None else choose(node, given)
            result = (chosen or kernel)(*given)
            results = result if isinstance(result, tuple) else (result,)
            if see is not None:
                see(node, given, results)
            for slot, part in zip(outputs, results, strict=False):
                if slot >= 0:
                    registers[slot] = part
            for slot in last:
                registers[slot] = None
        return tuple(registers[slot] for slot in self._outputs)


def bind(node: Node, kernels: Mapping[Node, Kernel] | None = None) -> tuple[Kernel, list[Value]]:
    """The node's meaning as a call on its inputs followed by the values (returned, too) that its subgraphs capture."""
    operator = find(node.op, node.name)
    options = {key: value for key, value in node.attributes.items() if not isinstance(value, Graph)}
    if operator.counts_outputs:
        options["_outputs"] = max((i + 1 for i, value in enumerate(node.outputs) if value.name), default=1)
    function = partial(operator.function, **options) if options else operator.function
    programs = {key: Program(graph, kernels) for key, graph in node.attributes.items() if isinstance(graph, Graph)}
    if not programs:
        return function, []
    captures = list(dict.fromkeys(value for program in programs.values() for value in program.captures))
    places = {key: [captures.index(value) for value in program.captures] for key, program in programs.items()}
    own = len(node.inputs)

    def call(*arguments: Any) -> Any:
        captured = arguments[own:]
        bodies = {
            key: partial(program.run, *(captured[place] for place in places[key])) for key, program in programs.items()
        }
        return function(*arguments[:own], **bodies)

    return call, captures


def _describe(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"a sequence of {len(value)}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def check_input(value: Value, given: Any, symbols: dict[str, int]) -> None:
    """That a tensor (or object array) has the declared dtype and shape. InputError says what was expected."""
    actual = tuple(given.shape)
    if value.dtype is not None and getattr(given, "dtype", None) not in (value.dtype.numpy, _stored(value)):
        raise InputError(f"input {value.name!r} is {_describe(given)}; it must be {value.dtype}", param=value.name)
    if value.shape is None:
        return
    fits = len(actual) == len(value.shape)
    for dim, size in zip(value.shape, actual, strict=False):
        fits = fits and (symbols.setdefault(dim, size) if isinstance(dim, str) else dim) == size
    if not fits:
        wanted = ", ".join(
            str(dim) if isinstance(dim, int) or not dim.startswith("?") else "any" for dim in value.shape
        )
        known = {name: size for name, size in symbols.items() if name in value.shape and not name.startswith("?")}
        where = f" with {', '.join(f'{name}={size}' for name, size in known.items())}" if known else ""
        raise InputError(
            f"input {value.name!r} has shape {list(actual)}; it must be [{wanted}]{where}", param=value.name
        )


def _stored(value: Value) -> Any:
    try:
        return value.dtype.torch if value.dtype is not None else None
    except KeyError:
        return None
