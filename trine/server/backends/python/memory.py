"""Memory that the server and a model's process share: tensors are written once by one and read in place by the other.

A `Writer` owns a region and hands out blocks of it, a `Reader` in the other process reads them. The first byte of a
block says whether it is in use; the reader clears it when nothing refers to the block's bytes any more, so giving
memory back takes no message. The region is a sparse file in memory without a name: pages exist once they are touched,
and nothing outlives the two processes, however they end.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np

REGION_BYTES = 1 << 36
"""Size of a region's address space; memory is only taken for what is in use."""

HEADER = 64
"""Bytes before a block's content; also the alignment of contents."""

CANCEL_FLAGS = 1 << 20
"""Bytes at the start of the server's region: one for each request in flight, 1 once it is cancelled."""

_KEEP_BYTES = 64 << 20
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
        self._free: dict[int, list[int]] = {}
        self._busy: list[tuple[int, int]] = []
        self._since_scan = 0
        self._free_bytes = 0
        self.keep_bytes = _KEEP_BYTES

    def allocate(self, size: int) -> int:
        """Offset of a block whose content, `size` bytes, begins HEADER bytes further on."""
        room = _rounded(size + HEADER)
        free = self._free.get(room)
        self._since_scan += 1
        if not free and self._since_scan > len(self._busy) >> 2:
            self._reclaim()
            free = self._free.get(room)
        if free:
            offset = free.pop()
            self._free_bytes -= room
        else:
            offset = self._extend(room)
        self.map[offset] = 1
        self._busy.append((offset, room))
        return offset

    def discard(self, offset: int) -> None:
        """Give back a block that was never handed over."""
        self.map[offset] = 0

    @property
    def busy_bytes(self) -> int:
        """Bytes of blocks that the reader still uses."""
        self._reclaim()
        return sum(room for _, room in self._busy)

    def _extend(self, room: int) -> int:
        if room >= _LARGE:
            self._end = -(-self._end // _PAGE) * _PAGE
        offset = self._end
        if offset + room > REGION_BYTES:
            raise MemoryError(f"a model holds more than {REGION_BYTES >> 30} GiB of tensors in shared memory")
        self._end = offset + room
        return offset

    def _reclaim(self) -> None:
        self._since_scan = 0
        busy = []
        for block in self._busy:
            offset, room = block
            if self.map[offset]:
                busy.append(block)
                continue
            self._free.setdefault(room, []).append(offset)
            self._free_bytes += room
            if room >= _LARGE and self._free_bytes > self.keep_bytes:
                self.map.madvise(
                    mmap.MADV_REMOVE, offset, room // _PAGE * _PAGE
                )  # the pages go back, not the addresses
        self._busy = busy


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
