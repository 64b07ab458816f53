"""Memory that the server and a model's process share: tensors are written once by one and read in place by the other.

A `Writer` owns a region and hands out blocks of it, a `Reader` in the other process reads them. The first byte of a
block says whether it is in use; the reader clears it when nothing refers to the block's bytes any more, so giving
memory back takes no message. The region is a sparse file in memory without a name: pages exist once they are touched,
and nothing outlives the two processes, however they end.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from typing import Any

import numpy as np

REGION_BYTES = 1 << 36
"""Size of a region's address space; memory is only taken for what is in use."""

HEADER = 64
"""Bytes before a block's content; also the alignment of contents."""

CANCEL_FLAGS = 1 << 20
"""Bytes at the start of the server's region: one for each request in flight, 1 once it is cancelled."""

_TRIM_EVERY = 32
_KEEP_FREE = 2
_PAGE = 4096
_LARGE = 1 << 20


def create_region(name: str) -> int:
    """A new region's file descriptor."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, REGION_BYTES)
    return descriptor


def _map(descriptor: int) -> mmap.mmap:
    return mmap.mmap(descriptor, REGION_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def _rounded(size: int) -> int:
    """`size` up to the next of four steps between powers of two: blocks of few sizes are used again."""
    step = max(1 << max(size.bit_length() - 3, 0), HEADER)
    return -(-size // step) * step


class Writer:
    """Hands out blocks of a region. Not safe for several threads: whoever owns it holds a lock where needed."""

    def __init__(self, descriptor: int, reserved: int = 0) -> None:
        self.map = _map(descriptor)
        self._end = -(-reserved // _PAGE) * _PAGE + _PAGE  # offset 0 is no block
        self._blocks: dict[int, deque[int]] = {}  # by size, the one handed out longest ago first
        self._misses = 0
        self._large = 0

    def allocate(self, size: int) -> int:
        """Offset of a block whose content, `size` bytes, begins HEADER bytes further on."""
        room = _rounded(size + HEADER)
        blocks = self._blocks.get(room)
        if blocks is None:
            blocks = self._blocks[room] = deque()
        elif self.map[blocks[0]] and not self._find_free(blocks):
            blocks.appendleft(self._extend(room))
        if not blocks:
            blocks.append(self._extend(room))
        offset = blocks[0]
        blocks.rotate(-1)
        self.map[offset] = 1
        if room >= _LARGE:
            self._count_large()
        return offset

    def discard(self, offset: int) -> None:
        """Give back a block that was never handed over."""
        self.map[offset] = 0

    @property
    def busy_bytes(self) -> int:
        """Bytes of blocks that the reader still uses."""
        return sum(room for room, blocks in self._blocks.items() for offset in blocks if self.map[offset])

    def _find_free(self, blocks: deque[int]) -> bool:
        """Bring a free block to the front. Looked for seldom enough that many busy ones cost little each time."""
        self._misses += 1
        if self._misses * 4 < len(blocks):
            return False
        self._misses = 0
        for _ in range(len(blocks)):
            if not self.map[blocks[0]]:
                return True
            blocks.rotate(-1)
        return False

    def _extend(self, room: int) -> int:
        """A block at the end of what was in use so far."""
        if room >= _LARGE:
            self._end = -(-self._end // _PAGE) * _PAGE
        offset = self._end
        if offset + room > REGION_BYTES:
            raise MemoryError(f"a model holds more than {REGION_BYTES >> 30} GiB of tensors in shared memory")
        self._end = offset + room
        return offset

    def _count_large(self) -> None:
        """Now and then give back the pages, not the addresses, of all but a few large blocks that are free."""
        self._large += 1
        if self._large % _TRIM_EVERY:
            return
        for room, blocks in self._blocks.items():
            if room < _LARGE:
                continue
            free = [offset for offset in blocks if not self.map[offset]]
            for offset in free[:-_KEEP_FREE]:
                self.map.madvise(mmap.MADV_REMOVE, offset, room // _PAGE * _PAGE)


class Lease(np.ndarray[Any, Any]):
    """A block's content as bytes. The block is free again when the last view of it is gone."""

    region: mmap.mmap | None = None
    offset = 0

    def __del__(self) -> None:
        if self.region is not None:
            self.region[self.offset] = 0


class Reader:
    """Reads the blocks that the other process wrote."""

    def __init__(self, descriptor: int) -> None:
        self.map = _map(descriptor)

    def lease(self, offset: int, size: int) -> Lease:
        """The content of a block: `size` bytes, in place. Tensors made of it are views that keep it."""
        lease: Lease = np.ndarray.__new__(Lease, (size,), np.uint8, self.map, offset + HEADER)
        lease.region, lease.offset = self.map, offset
        return lease

    def take(self, offset: int, size: int) -> bytes:
        """A copy of the content of a block, which is free from now on."""
        start = offset + HEADER
        content = self.map[start : start + size]
        self.map[offset] = 0
        return content

    def free(self, offset: int) -> None:
        self.map[offset] = 0
