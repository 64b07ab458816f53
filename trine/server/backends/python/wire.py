"""Messages between the server and a model's process: plain tuples, in one datagram each; tensors lie in shared memory.

Every message is (kind, …). A tensor is described by (name, datatype, shape, start, size): where its bytes lie within
the content of the message's block.
"""

from __future__ import annotations

import marshal
import socket
from typing import Any

import numpy as np

from trine.server.backends.python.memory import HEADER, Reader, Writer

Message = tuple[Any, ...]
TensorEntry = tuple[str, str, tuple[int, ...], int, int]
Block = tuple[int, int]
"""Offset and size of a block's content; (0, 0) is none."""

NO_BLOCK: Block = (0, 0)
LARGEST_DATAGRAM = 128 * 1024
_VERSION = 4  # marshal's format that every Python from 3.4 on reads

# from the server, on the main channel
INITIALIZE = 0  # (_, arguments: dict)
EXECUTE = 1  # (_, block, requests)
FINALIZE = 2  # (_,)
LARGE = 3  # (_, block): the block's content is the message

# from the server, on the side channel
REPLY = 10  # (_, call, result, error: str | None)
BLS_RESPONSE = 11  # (_, call, block, response, final)
IS_READY = 12  # (_, call)

# from the model's process
HELLO = 20  # (_,)
READY = 21  # (_, has is_ready, result)
FAILED = 22  # (_, message)
DONE = 23  # (_, block, responses | None, error: str | None)
RESPONSE = 24  # (_, slot, block, response | None, final)
BLS = 25  # (_, call, block, request)
BLS_CANCEL = 26  # (_, call)
CALL = 27  # (_, call, function, arguments)
METRIC = 28  # (_, metric, operation, value)
LOG = 29  # (_, level, text)
READINESS = 30  # (_, call, ready)
FINALIZED = 31  # (_,)

RESCHEDULED = 1
"""In place of a response in DONE: the request is to be executed again. None: its sender answers."""

NUMPY_TO_DATATYPE = {
    "?": "BOOL",
    "B": "UINT8",
    "H": "UINT16",
    "I": "UINT32",
    "L": "UINT64",
    "Q": "UINT64",
    "b": "INT8",
    "h": "INT16",
    "i": "INT32",
    "l": "INT64",
    "q": "INT64",
    "e": "FP16",
    "f": "FP32",
    "d": "FP64",
    "O": "BYTES",
    "S": "BYTES",
}
"""numpy's character of a dtype to the protocol's datatype."""

DATATYPE_TO_NUMPY = {
    datatype: np.dtype(character) for character, datatype in NUMPY_TO_DATATYPE.items() if character not in "SLl"
} | {"UINT64": np.dtype(np.uint64), "INT64": np.dtype(np.int64)}


def datagram(message: Message, memory: Writer) -> bytes:
    """The datagram of a message; a message too long for one goes into a block of `memory`."""
    data = marshal.dumps(message, _VERSION)
    if len(data) > LARGEST_DATAGRAM:
        offset = memory.allocate(len(data))
        memory.map[offset + HEADER : offset + HEADER + len(data)] = data
        data = marshal.dumps((LARGE, (offset, len(data))), _VERSION)
    return data


class Receiver:
    """Reads messages of one channel, whose blocks lie in `memory`."""

    def __init__(self, channel: socket.socket, memory: Reader) -> None:
        self._channel = channel
        self._memory = memory
        self._buffer = memoryview(bytearray(LARGEST_DATAGRAM + 1024))

    def receive(self) -> Message | None:
        """The next message; None when the other side is gone."""
        size = self._channel.recv_into(self._buffer)
        if not size:
            return None
        message: Message = marshal.loads(self._buffer[:size])
        if message[0] == LARGE:
            message = marshal.loads(self._memory.take(*message[1]))
        return message


def write_tensors(
    memory: Writer, tensors: list[tuple[str, str, tuple[int, ...], Any]]
) -> tuple[Block, list[TensorEntry]]:
    """Copy tensors (name, datatype, shape, content) into one block. Content: bytes-like, or an array of numbers."""
    entries: list[TensorEntry] = []
    size = 0
    for name, datatype, shape, content in tensors:
        length = content.nbytes if isinstance(content, np.ndarray | memoryview) else len(content)
        entries.append((name, datatype, shape, size, length))
        size += -(-length // HEADER) * HEADER
    if not size:
        return NO_BLOCK, entries
    offset = memory.allocate(size)
    start, region = offset + HEADER, memory.map
    for (_, _, _, position, length), (_, _, _, content) in zip(entries, tensors, strict=True):
        if not length:
            continue
        if isinstance(content, np.ndarray) and not content.flags.c_contiguous:
            np.ndarray(content.shape, content.dtype, region, start + position)[...] = content
        else:
            region[start + position : start + position + length] = content
    return (offset, size), entries
