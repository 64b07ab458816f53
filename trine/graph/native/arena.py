"""Places for buffers that live at different times in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterable

from trine.graph.native.tensor import Buffer

ALIGNMENT = 64


def place(buffers: Iterable[Buffer]) -> int:
    """Set each buffer's offset so that no two that live at the same time overlap; the bytes of the whole.

    The largest first, each into the smallest gap that is free for its whole life (the greedy method by size of
    Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference, 2020).
    """
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=lambda buffer: (-buffer.nbytes, buffer.first)):
        size = aligned(buffer.nbytes)
        best, best_gap, end = -1, -1, 0
        for other in placed:  # in order of offset
            if other.last < buffer.first or other.first > buffer.last:
                continue
            gap = other.offset - end
            if gap >= size and (best < 0 or gap < best_gap):
                best, best_gap = end, gap
            end = max(end, other.offset + aligned(other.nbytes))
        buffer.offset = best if best >= 0 else end
        total = max(total, buffer.offset + size)
        placed.append(buffer)
        placed.sort(key=lambda other: other.offset)
    return total


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
