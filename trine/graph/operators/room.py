"""A size that a model only computes when it runs is refused before memory is taken for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from math import prod

import torch

from trine.core.machine import memory_bytes
from trine.core.sizes import format_bytes


@cache
def largest() -> int:
    """Bytes that one tensor may take: all of the memory that this machine, or its container, has."""
    return memory_bytes()[0] or sys.maxsize


def bytes_of(shape: Sequence[int], itemsize: int) -> int:
    """Of a tensor; an empty one counts as if its empty dimensions were 1, since work may follow the others."""
    return prod(max(size, 1) for size in shape) * itemsize


def room_for(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    """ValueError where a tensor would not fit this machine, or has a negative dimension."""
    if any(size < 0 for size in shape):
        raise ValueError(f"a tensor can't have the shape {list(shape)}")
    wanted = bytes_of(shape, dtype.itemsize)
    if wanted > largest():
        room = f"{format_bytes(wanted)}, and there are {format_bytes(largest())}"
        raise ValueError(f"a tensor of shape {list(shape)} would take {room}")
