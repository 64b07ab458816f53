"""Records what kernels a graph's nodes call, on what memory: the making of a tape.

A rule for an operator is a function `(tape, node) -> bool` with the decorator `@native("Op", "variant")`. It looks at
the node's inputs (`tape.tensor`), gives False where it does not apply, and else asks for its result's memory
(`tape.output`, or `tape.alias` for a view of an input), adds steps and gives True. All shapes are known by then.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from trine.graph.dtypes import DType
from trine.graph.ir import Node, Value
from trine.graph.native.arena import place
from trine.graph.native.packed import Packed, constant_tensor
from trine.graph.native.tape import Loop, Step, find_kernel
from trine.graph.native.tensor import (
    NUMBERS,
    Buffer,
    Tensor,
    channels_last_strides,
    contiguous_strides,
)

Rule: TypeAlias = Callable[["Recorder", Node], bool]
RULES: dict[str, dict[str, Rule]] = {}
"""By operator and variant. The first variant that applies is taken where nothing was timed."""


def native(op: str, variant: str = "native") -> Callable[[Rule], Rule]:
    """Register a rule for nodes `op`."""

    def register(rule: Rule) -> Rule:
        RULES.setdefault(op, {})[variant] = rule
        return rule

    return register


@dataclass(frozen=True)
class Joined:
    """A value is the part from `start` on, along `axis`, of a larger one."""

    whole: Value
    start: int
    axis: int = 1


@dataclass(eq=False)
class PythonItem:
    """A node that runs as a call of Python, between steps."""

    node: Node
    time: int


@dataclass(eq=False)
class Recorder:
    """The tape so far. `outputs` are the graph's, with the slots in which the caller hands in their memory."""

    packed: Packed
    outputs: Mapping[Value, int] = field(default_factory=dict)
    slots: int = 1
    steps: list[Step] = field(default_factory=list)
    items: list[Step | PythonItem] = field(default_factory=list)
    tensors: dict[Value, Tensor] = field(default_factory=dict)
    externals: dict[Value, Tensor] = field(default_factory=dict)
    """Values that Python hands in: the graph's inputs, results of nodes that run in Python."""
    variants: dict[Node, str] = field(default_factory=dict)
    """The rule that each native node runs by."""
    deferred: dict[Value, Node] = field(default_factory=dict)
    """Elementwise results whose only reader can compute them itself (elementwise.py)."""
    may_defer: Collection[Node] = ()
    narrow: Collection[Value] = ()
    """Values of float32 that lie in bfloat16 between kernels (narrow.py)."""
    joined: dict[Value, Joined] = field(default_factory=dict)
    """Images that kernels may write to where a concatenation wants them (structure.py)."""
    loop: Loop | None = None
    """That steps belong to which are added now."""
    node: Node | None = None
    copies: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    _direct: dict[Value, Buffer] = field(default_factory=dict)
    _constants: dict[Value, Tensor] = field(default_factory=dict)
    _wholes: dict[Value, Tensor] = field(default_factory=dict)

    def record(self, node: Node, rule: Rule) -> bool:
        """Apply a rule; whether it did. Nothing is left of one that gave up."""
        if any(0 in (value.shape or ()) for value in (*node.inputs, *node.outputs) if value is not None):
            return False  # empty tensors, which kernels would divide by
        self.node = node
        steps, items, copies, deferred = len(self.steps), len(self.items), dict(self.copies), dict(self.deferred)
        try:
            applies = rule(self, node)
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
            applies = False  # a node that makes no sense: the operator's own meaning says why
        if applies:
            return True
        self.deferred = deferred
        del self.steps[steps:]
        del self.items[items:]
        self.copies = copies
        for value in node.outputs:
            self.tensors.pop(value, None)
        return False

    def python(self, node: Node) -> None:
        """The node runs in Python."""
        for value in node.reads():
            self.materialise(value)
        self.items.append(PythonItem(node, len(self.items)))

    def materialise(self, value: Value) -> None:
        """Compute a deferred value after all."""
        from trine.graph.native.elementwise import compute

        node = self.deferred.pop(value, None)
        if node is not None:
            before, self.node = self.node, node
            compute(self, node)
            self.node = before

    def tensor(self, value: Value | None) -> Tensor | None:
        """Where a value lies; None if it is left out, or kernels can't take it (its type, an unknown shape)."""
        if value is None or value.dtype not in NUMBERS or value.static_shape is None:
            return None
        self.materialise(value)
        if value in self.tensors:
            return self.tensors[value]
        if value.is_constant:
            if not isinstance(value.data, torch.Tensor):
                return None
            if value not in self._constants:
                self._constants[value] = constant_tensor(value.data.contiguous())
            return self._constants[value]
        shape = value.static_shape
        tensor = self._new(value.dtype, shape, contiguous_strides(shape), self.slots)
        self.slots += 1
        self.tensors[value] = self.externals[value] = tensor
        return tensor

    def float_tensor(self, value: Value | None) -> Tensor | None:
        """As `tensor`, for float32 only."""
        tensor = self.tensor(value)
        return tensor if tensor is not None and tensor.dtype is DType.FLOAT32 else None

    def real_tensor(self, value: Value | None) -> Tensor | None:
        """As `tensor`, for values of float32, which may lie in bfloat16 (`narrow`)."""
        tensor = self.tensor(value)
        return tensor if value is not None and value.dtype is DType.FLOAT32 else None

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor in row-major order without holes: itself, or a copy."""
        return tensor if tensor.is_contiguous else self.copied(tensor, contiguous_strides(tensor.shape))

    def channels_last(self, tensor: Tensor) -> Tensor:
        """[N, C, …] with the channels innermost, without holes: itself, or a copy."""
        return tensor if tensor.is_channels_last else self.copied(tensor, channels_last_strides(tensor.shape))

    def copied(self, tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
        """A copy with other strides; one copy serves all who ask."""
        from trine.graph.native.structure import copy

        key = (tensor.buffer, tensor.offset, tensor.shape, tensor.strides, tensor.dtype, strides)
        if key not in self.copies:
            made = self._new(tensor.dtype, tensor.shape, strides)
            copy(self, tensor, made)
            self.copies[key] = made
        return self.copies[key]

    def output(self, value: Value, *, channels_last: bool = False, order: Sequence[int] | None = None) -> Tensor:
        """Memory for a result of the node. `order` are its axes as they shall lie, the outermost first."""
        shape = value.static_shape
        assert shape is not None
        assert value.dtype is not None
        rows = contiguous_strides(shape)
        strides = channels_last_strides(shape) if channels_last and len(shape) >= 3 else rows
        if order is not None:
            own = contiguous_strides([shape[axis] for axis in order])
            strides = tuple(own[list(order).index(axis)] for axis in range(len(shape)))
        slot = self.outputs.get(value, 0)
        made = self._new(DType.BFLOAT16 if value in self.narrow else value.dtype, shape, strides)
        if slot and made.is_contiguous and value not in self._direct:
            made = self._new(value.dtype, shape, strides, slot)
            self._direct[value] = made.buffer
        self.tensors[value] = made
        return made

    def image_output(self, value: Value) -> Tensor:
        """As `output`, channels innermost, for a kernel that writes each pixel where its strides say."""
        if value not in self.joined:
            return self.output(value, channels_last=True)
        self.tensors[value] = self.whole(value)
        return self.tensors[value]

    def whole(self, value: Value) -> Tensor:
        """Memory for a value that is joined to another, or for all that is joined to this one."""
        shape, place = value.static_shape, self.joined.get(value)
        assert shape is not None
        if place is not None:
            return self.whole(place.whole).slice(place.axis, place.start, shape[place.axis])
        if value not in self._wholes:
            self._wholes[value] = self._new(DType.FLOAT32, shape, channels_last_strides(shape))
        return self._wholes[value]

    def alias(self, value: Value, tensor: Tensor) -> None:
        """A result of the node is a view of memory that is there already."""
        self.tensors[value] = tensor

    def scratch(self, dtype: DType, shape: Sequence[int], *, channels_last: bool = False) -> Tensor:
        """Memory that only steps of this node use."""
        own = tuple(shape)
        return self._new(dtype, own, channels_last_strides(own) if channels_last else contiguous_strides(own))

    def constant(self, weight: Value, layout: str, make: Callable[[], torch.Tensor]) -> Tensor:
        """A constant in the layout of a kernel, which `make` makes if the plan has not got it yet.

        `layout` says all that the result depends on besides the constant.
        """
        return constant_tensor(self.packed.get(weight, layout, make))

    def address(self, structure: ctypes.Structure) -> Tensor:
        """A structure that a kernel takes by its address, as it is now."""
        size = ctypes.sizeof(structure)
        buffer = Buffer(size, address=ctypes.addressof(structure), owner=structure)
        return Tensor(buffer, DType.UINT8, (size,), (1,))

    def step(
        self,
        kernel: str,
        args: ctypes.Structure,
        pointers: Mapping[str, Tensor | None] | Mapping[str | int, Tensor | None],
        *,
        in_place: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Add a call. `pointers` says what each pointer of the arguments names, by its field or its place in bytes.

        A tensor says what the kernel touches: it must lie inside its buffer. (operand, result) of `in_place` may share
        memory, if nobody needs the operand any more.
        """
        found: dict[int, Tensor] = {}
        for name, tensor in pointers.items():
            if tensor is None:
                continue
            first, end = tensor.extent
            if first < 0 or end * tensor.itemsize > tensor.buffer.nbytes:
                raise RuntimeError(f"{kernel}: {name} reaches outside of its memory")
            found[name if isinstance(name, int) else getattr(type(args), name).offset] = tensor
        allowed = tuple(pair for pair in in_place if _may_share(pair[0], pair[1], found.values()))
        assert self.node is not None
        time = len(self.items)
        step = Step(kernel, find_kernel(kernel, type(args)), args, found, self.node, allowed, time, self.loop)
        self.steps.append(step)
        self.items.append(step)

    def finish(self, graph_outputs: Sequence[Value]) -> int:
        """Put results where the caller wants them, and every buffer into the arena: its size in bytes."""
        from trine.graph.native.structure import copy

        for value in dict.fromkeys(graph_outputs):
            tensor = self.tensors.get(value)
            slot = self.outputs.get(value, 0)
            if tensor is not None and slot and tensor.buffer is not self._direct.get(value):
                self.node = value.producer
                copy(self, tensor, self._new(tensor.dtype, tensor.shape, contiguous_strides(tensor.shape), slot))
        buffers = self._lifetimes()
        self._merge()
        return place(buffer for buffer in buffers if buffer.parent is None)

    def _new(self, dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...], slot: int = 0) -> Tensor:
        tensor = Tensor(Buffer(0, slot), dtype, shape, strides)
        tensor.buffer.nbytes = tensor.extent[1] * tensor.itemsize
        return tensor

    def _lifetimes(self) -> list[Buffer]:
        buffers: dict[Buffer, None] = {}
        for item in self.items:
            for buffer in self._touched(item):
                if buffer.in_arena:
                    buffer.first = item.time if buffer not in buffers else buffer.first
                    buffer.last = item.time
                    buffers.setdefault(buffer)
        for step in self.steps:  # what holds all images is needed from the first one's begin to the last one's end
            for buffer in () if step.loop is None else step.loop.moving:
                if buffer in buffers:
                    buffer.first, buffer.last = min(buffer.first, step.time), max(buffer.last, step.time)
        return list(buffers)

    def _touched(self, item: Step | PythonItem) -> list[Buffer]:
        if isinstance(item, Step):
            return [tensor.buffer for tensor in item.pointers.values()]
        return [self.tensors[value].buffer for value in item.node.reads() if value in self.tensors]

    def _merge(self) -> None:
        """Results that may take their operand's place do."""
        for step in self.steps:
            moving = {} if step.loop is None else step.loop.moving
            for read, written in step.in_place:
                source, target = read.buffer.root, written.buffer
                if (
                    source not in moving
                    and target not in moving
                    and source.in_arena
                    and target.in_arena
                    and target.parent is None
                    and source is not target
                    and source.last == step.time == target.first
                    and target.nbytes <= source.nbytes
                ):
                    target.parent = source
                    source.last = target.last
                    break


def _may_share(read: Tensor, written: Tensor, touched: Any) -> bool:
    """Element by element the same place, and no other operand of the step looks at that memory in another way."""
    same = (read.shape, read.strides, read.offset, read.itemsize) == (
        written.shape,
        written.strides,
        written.offset,
        written.itemsize,
    )
    return same and all(
        tensor.buffer is not read.buffer or (tensor.strides, tensor.offset) == (read.strides, read.offset)
        for tensor in touched
    )
