"""Where values lie while a tape runs: buffers, and tensors that are views of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from trine.graph.dtypes import DType

NUMBERS: dict[DType, int] = {
    DType.FLOAT32: 0,
    DType.BFLOAT16: 1,
    DType.FLOAT16: 2,
    DType.INT8: 3,
    DType.UINT8: 4,
    DType.BOOL: 4,
    DType.INT32: 5,
    DType.INT64: 6,
}
"""DType of csrc/runtime.h. Kernels see a bool as a byte that is 0 or 1."""


@dataclass(eq=False)
class Buffer:
    """Memory of `nbytes` bytes: in the arena (`slot` 0), at a constant address, or handed in at run (`slot` > 0).

    From time `first` to `last` somebody needs it: outside of that others may lie in its place. One that is written
    where another lay, in place, has that as its `parent`.
    """

    nbytes: int
    slot: int = 0
    address: int = 0
    owner: Any = None
    first: int = -1
    last: int = -1
    offset: int = 0
    parent: Buffer | None = None

    @property
    def in_arena(self) -> bool:
        return self.slot == 0 and not self.address

    @property
    def root(self) -> Buffer:
        """What it lies in: itself, unless it is written in place."""
        buffer = self
        while buffer.parent is not None:
            buffer = buffer.parent
        return buffer


@dataclass(frozen=True)
class Tensor:
    """Elements of a buffer: `offset` and `strides` count elements."""

    buffer: Buffer
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.torch.itemsize

    @property
    def number(self) -> int:
        """The dtype as kernels know it."""
        return NUMBERS[self.dtype]

    @property
    def extent(self) -> tuple[int, int]:
        """The first element, and the one after the last."""
        if not self.count:
            return self.offset, self.offset
        steps = [(size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)]
        return self.offset + sum(min(step, 0) for step in steps), self.offset + sum(max(step, 0) for step in steps) + 1

    @property
    def is_contiguous(self) -> bool:
        """Row-major, without holes."""
        return _dense(self.shape, self.strides)

    @property
    def is_channels_last(self) -> bool:
        """[N, C, …] with the channels innermost, without holes."""
        return len(self.shape) >= 3 and _dense(_turned(self.shape), _turned(self.strides))

    @property
    def is_image(self) -> bool:
        """[N, C, …] with its channels, at least two, side by side, and perhaps holes between its pixels."""
        if len(self.shape) < 3 or self.shape[1] < 2 or self.strides[1] != 1:
            return False
        others = zip(self.shape[2:], self.strides[2:], strict=True)
        return all(stride >= self.shape[1] for size, stride in others if size > 1)

    def permute(self, order: Sequence[int]) -> Tensor:
        return replace(self, shape=tuple(self.shape[i] for i in order), strides=tuple(self.strides[i] for i in order))

    def expand(self, shape: Sequence[int]) -> Tensor:
        """Broadcast to `shape`."""
        lead = len(shape) - len(self.shape)
        strides = [0] * lead + [
            stride if size == wanted else 0
            for size, wanted, stride in zip(self.shape, shape[lead:], self.strides, strict=True)
        ]
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def slice(self, axis: int, start: int, count: int, step: int = 1) -> Tensor:
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + (start * strides[axis] if count else 0)
        shape[axis], strides[axis] = count, strides[axis] * step
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=offset)

    def view(self, shape: Sequence[int]) -> Tensor | None:
        """The same elements in another shape; None where that needs a copy."""
        strides = view_strides(self.shape, self.strides, tuple(shape))
        return None if strides is None else replace(self, shape=tuple(shape), strides=strides)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = contiguous_strides(_turned(tuple(shape)))
    return (strides[0], strides[-1], *strides[1:-1])


def _turned(items: tuple[int, ...]) -> tuple[int, ...]:
    return (items[0], *items[2:], items[1])


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 0:
            return True
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


def collapse(shape: Sequence[int], operands: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Shape and strides of each operand with neighbouring dimensions merged wherever all operands allow it.

    Dimensions of size 1 vanish; at least one dimension is left.
    """
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in operands]
    for axis in range(len(shape)):
        if shape[axis] == 1:
            continue
        steps = [strides[axis] for strides in operands]
        if sizes and all(own[-1] == step * shape[axis] for own, step in zip(merged, steps, strict=True)):
            sizes[-1] *= shape[axis]
            for own, step in zip(merged, steps, strict=True):
                own[-1] = step
            continue
        sizes.append(shape[axis])
        for own, step in zip(merged, steps, strict=True):
            own.append(step)
    if not sizes:
        return [1], [[0] for _ in operands]
    return sizes, merged


def view_strides(old: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides with which shape `new` covers what `old` with `strides` does, in order; None if there are none."""
    if prod(old) != prod(new):
        return None
    if prod(old) == 0:
        return contiguous_strides(new)
    sizes, [steps] = collapse(old, [strides])
    result: list[int] = []
    group = len(sizes) - 1
    left, step = sizes[group], steps[group]
    for size in reversed(new):
        if size == 1:
            result.append(step)
            continue
        if left == 1:
            group -= 1
            left, step = sizes[group], steps[group]
        if left % size:
            return None
        result.append(step)
        step *= size
        left //= size
    return tuple(reversed(result))
