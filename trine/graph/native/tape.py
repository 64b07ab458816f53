"""Tapes as the native library takes them (csrc/tape.h), and memory to run them on."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch

from trine.core.errors import InsufficientMemoryError
from trine.graph.ir import Node
from trine.graph.native.arena import aligned
from trine.graph.native.tensor import Buffer, Tensor
from trine.kernels.cpu.native import load

_ALIGNMENT = 64


@dataclass(eq=False)
class Step:
    """One call of a kernel: its arguments, and the tensors that its pointers name."""

    kernel_name: str
    kernel: int
    args: ctypes.Structure
    pointers: dict[int, Tensor]
    """By place in the arguments, in bytes."""
    node: Node
    """That it works for."""
    in_place: tuple[tuple[Tensor, Tensor], ...] = ()
    """(read, written): the result may lie where the operand lies."""
    time: int = 0
    loop: Loop | None = None


@dataclass(eq=False)
class Loop:
    """Steps that run `count` times; buffers in `moving` move on by so many bytes each time."""

    count: int
    moving: dict[Buffer, int] = field(default_factory=dict)


class _Step(ctypes.Structure):
    """TapeStep in csrc/tape.h."""

    _fields_ = (("kernel", c_int64), ("args", c_int64))


class _Pointer(ctypes.Structure):
    """TapePointer in csrc/tape.h."""

    _fields_ = (("place", c_int64), ("base", c_int64), ("offset", c_int64), ("advance", c_int64))


class _Loop(ctypes.Structure):
    """TapeLoop in csrc/tape.h."""

    _fields_ = tuple((name, c_int64) for name in ("first", "end", "count", "first_pointer", "end_pointer"))


class _Tape(ctypes.Structure):
    """Tape in csrc/tape.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("steps", "pointers", "loops")),
        *((name, c_int64) for name in ("step_count", "pointer_count", "loop_count")),
    )


def library() -> ctypes.CDLL:
    found, status = load()
    if found is None:
        raise RuntimeError(f"the native CPU kernels are not there: {status}")
    return found


def native_is_available() -> bool:
    """Whether this machine runs native kernels."""
    return load()[0] is not None


def find_kernel(name: str, args: type[ctypes.Structure]) -> int:
    """The kernel's number in this build. RuntimeError when there is none, or it takes arguments of another size."""
    size = c_int64(0)
    number: int = library().trine_step_find(name.encode(), ctypes.byref(size))
    if number < 0 or size.value != ctypes.sizeof(args):
        raise RuntimeError(
            f"kernel {name!r} takes {size.value} bytes of arguments, {args.__name__} has {ctypes.sizeof(args)}"
        )
    return number


class Tape:
    """Steps, frozen. Several threads may run it at once, each on a context of its own."""

    def __init__(self, steps: Sequence[Step], arena_bytes: int, slots: int) -> None:
        self.steps = list(steps)
        self.arena_bytes, self.slots = arena_bytes, slots
        places, size = [], 0
        for step in steps:
            places.append(size)
            size += -(-ctypes.sizeof(step.args) // _ALIGNMENT) * _ALIGNMENT
        self.args = bytearray(size)
        pointers: list[tuple[int, int, int, int]] = []
        loops: dict[Loop, _Loop] = {}
        for index, (step, start) in enumerate(zip(steps, places, strict=True)):
            moving = {} if step.loop is None else step.loop.moving
            if step.loop is not None and step.loop not in loops:
                loops[step.loop] = _Loop(index, index, step.loop.count, len(pointers))
            self.args[start : start + ctypes.sizeof(step.args)] = bytes(step.args)
            for place, tensor in step.pointers.items():
                offset = tensor.offset * tensor.itemsize
                if tensor.buffer.address:
                    self.args[start + place : start + place + 8] = (tensor.buffer.address + offset).to_bytes(
                        8, "little"
                    )
                else:
                    buffer = tensor.buffer
                    pointers.append((start + place, buffer.slot, buffer.root.offset + offset, moving.get(buffer, 0)))
            if step.loop is not None:
                loops[step.loop].end, loops[step.loop].end_pointer = index + 1, len(pointers)
        self._steps = (_Step * max(1, len(steps)))(
            *(_Step(step.kernel, start) for step, start in zip(steps, places, strict=True))
        )
        self._pointers = (_Pointer * max(1, len(pointers)))(*(_Pointer(*pointer) for pointer in pointers))
        self._loops = (_Loop * max(1, len(loops)))(*loops.values())
        arrays = (ctypes.addressof(array) for array in (self._steps, self._pointers, self._loops))
        self._tape = _Tape(*arrays, len(steps), len(pointers), len(loops))
        self._run = library().trine_tape_run

    def run(self, context: Context, first: int, end: int, times: Any = None) -> int:
        """Steps [first, end). -1, or the step that failed on its inputs."""
        result: int = self._run(ctypes.byref(self._tape), first, end, context.args, context.bases, times)
        return result


class Arena:
    """A piece of memory for the intermediate values of one run."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = max(1, nbytes)
        address = library().trine_pages_new(self.nbytes)
        if not address:
            raise InsufficientMemoryError(
                f"no memory for {self.nbytes} bytes of intermediate values: use a smaller batch"
            )
        memory = (ctypes.c_uint8 * self.nbytes).from_address(address)
        weakref.finalize(memory, library().trine_pages_delete, address, self.nbytes)
        self.data: torch.Tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.address: int = address


class Arenas:
    """Arenas that nobody uses now, for programs of all shapes: as many as ran at once, each as large as was needed."""

    def __init__(self) -> None:
        self._free: list[Arena] = []
        self._lock = Lock()

    def take(self, nbytes: int) -> Arena:
        """The smallest that is large enough; where none is, a new one in the place of the largest."""
        with self._lock:
            fitting = [arena for arena in self._free if arena.nbytes >= nbytes]
            chosen = min(
                fitting or self._free, key=lambda arena: arena.nbytes if fitting else -arena.nbytes, default=None
            )
            if chosen is not None:
                self._free.remove(chosen)
        return chosen if chosen is not None and fitting else Arena(nbytes)

    def give(self, arena: Arena) -> None:
        with self._lock:
            self._free.append(arena)


class Context:
    """What one thread needs to run a tape: the arguments with its pointers, the addresses of its slots, an arena."""

    def __init__(self, tape: Tape) -> None:
        self.args = (ctypes.c_uint8 * max(1, len(tape.args))).from_buffer_copy(bytes(tape.args) or b"\0")
        self.bases = (c_void_p * tape.slots)()
        self.arena: Arena

    def use(self, arena: Arena) -> None:
        """Run on this arena from now on; it is as large as the tape needs."""
        self.arena = arena
        self.bases[0] = arena.address

    def view(self, tensor: Tensor) -> torch.Tensor:
        """The tensor in the arena, as torch sees it."""
        start = tensor.buffer.root.offset
        flat = self.arena.data[start : start + aligned(tensor.buffer.nbytes)].view(tensor.dtype.torch)
        return flat.as_strided(tensor.shape, tensor.strides, flat.storage_offset() + tensor.offset)
