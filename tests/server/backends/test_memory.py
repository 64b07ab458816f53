"""Shared memory between the server and a model's process: blocks are given out, read in place, and used again."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

from trine.server.backends.python import wire
from trine.server.backends.python.memory import CANCEL_FLAGS, HEADER, Reader, Writer, create_region


@pytest.fixture
def region() -> tuple[Writer, Reader, int]:
    descriptor = create_region("test")
    return Writer(descriptor, CANCEL_FLAGS), Reader(descriptor), descriptor


Region = tuple[Writer, Reader, int]


def used_bytes(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def test_blocks_never_overlap_while_they_are_in_use(region: Region) -> None:
    writer, reader, _ = region
    random.seed(1)
    held: list[tuple[int, int, bytes]] = []
    for _ in range(3000):
        size = random.choice([1, 60, 64, 500, 5000, 70_000])
        content = random.randbytes(min(size, 16)).ljust(size, b"x")
        offset = writer.allocate(size)
        writer.map[offset + HEADER : offset + HEADER + size] = content
        held.append((offset, size, content))
        if len(held) > 40:
            offset, size, content = held.pop(random.randrange(len(held)))
            assert reader.take(offset, size) == content
    for offset, size, content in held:
        assert reader.take(offset, size) == content
    assert writer.busy_bytes == 0


def test_a_block_is_free_when_the_last_view_of_it_is_gone(region: Region) -> None:
    writer, reader, _ = region
    packer = wire.Packer()
    *_, start, _ = packer.add("x", "FP32", (4096,), np.arange(4096, dtype=np.float32))
    packer.add("y", "FP32", (1,), b"1234")  # too large for the message itself
    lease = wire.content_of(packer.place(writer), reader)
    tensor = np.ndarray((4096,), np.float32, lease, start)
    part = tensor[1:3]
    del lease, tensor
    assert writer.busy_bytes > 0
    np.testing.assert_array_equal(part, [1, 2])
    del part
    assert writer.busy_bytes == 0


def test_what_is_used_again_takes_no_more_memory(region: Region) -> None:
    writer, reader, descriptor = region
    for round_number in range(200):
        offset = writer.allocate(3 << 20)
        writer.map[offset + HEADER : offset + HEADER + 100] = bytes([round_number % 256]) * 100
        reader.free(offset)
    assert used_bytes(descriptor) < 8 << 20


def test_pages_of_large_blocks_go_back_after_a_rush(region: Region) -> None:
    writer, reader, descriptor = region
    offsets = [writer.allocate(2 << 20) for _ in range(40)]
    for offset in offsets:
        writer.map[offset + HEADER : offset + (2 << 20)] = b"\1" * ((2 << 20) - HEADER)
    rush = used_bytes(descriptor)
    for offset in offsets:
        reader.free(offset)
    for _ in range(64):
        reader.free(writer.allocate(2 << 20))
    assert used_bytes(descriptor) < rush / 4


@pytest.mark.parametrize("before", [b"", b"12345", bytes(20_000)], ids=["alone", "second", "in shared memory"])
@pytest.mark.parametrize("content", [b"abc", np.arange(12).reshape(3, 4).T, np.zeros((0, 3)), memoryview(b"12")])
def test_tensors_arrive_as_they_were(region: Region, content: Any, before: bytes) -> None:
    writer, reader, _ = region
    packer = wire.Packer()
    packer.add("before", "ANY", (len(before),), before)
    *_, start, size = packer.add("x", "ANY", (1,), content)
    assert start % HEADER == 0
    found = bytes(wire.content_of(packer.place(writer), reader)[start : start + size])
    assert found == (np.ascontiguousarray(content).tobytes() if isinstance(content, np.ndarray) else bytes(content))


def test_a_message_too_long_for_a_datagram_goes_through_memory(region: Region) -> None:
    import socket

    writer, reader, _ = region
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver = wire.Receiver(there, reader)
    for size in (10, 1_000_000):
        message = (wire.LOG, 0, "x" * size)
        here.send(wire.datagram(message, writer))
        assert receiver.receive() == message
    assert writer.busy_bytes == 0
    here.close()
    assert receiver.receive() is None
    there.close()
