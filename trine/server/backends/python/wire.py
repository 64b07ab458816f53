"""Messages between the server and a model's process: plain tuples, in one datagram each; tensors lie in shared memory.

Every message is (kind, …). A tensor is described by (name, datatype, shape, start, size): where its bytes lie within
the content of the message's block. Few bytes are in the message itself.
"""

from __future__ import annotations

import marshal
import os
import select
import socket
from time import monotonic_ns
from typing import Any

import numpy as np

from trine.server.backends.python.memory import HEADER, Reader, Writer

PATIENCE_NS = 100_000 if len(os.sched_getaffinity(0)) > 1 else 0
"""How long to look for a message that is expected at once. Waking a processor that sleeps takes as long again."""

Message = tuple[Any, ...]
TensorEntry = tuple[str, str, tuple[int, ...], int, int]
Block = tuple[int, int] | bytes
"""The content of tensors: offset and size in shared memory, or the content itself."""

NO_BLOCK: Block = b""
LARGEST_DATAGRAM = 128 * 1024
_LARGEST_INLINE = 16 * 1024  # below, copying twice costs less than the bookkeeping of shared memory
_PADDING = bytes(HEADER)
_VERSION = 4  # marshal's format that every Python from 3.4 on reads

# from the server, on the main channel
INITIALIZE = 0  # (_, arguments: dict)
EXECUTE = 1  # (_, block, requests)
FINALIZE = 2  # (_,)
LARGE = 3  # (_, (offset, size)): the content there is the message

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


class Packer:
    """Collects the tensors of a message, each begun at a multiple of HEADER bytes."""

    __slots__ = ("_parts", "_size")

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._size = 0

    def add(self, name: str, datatype: str, shape: tuple[int, ...], content: Any) -> TensorEntry:
        """content: bytes-like, or an array of numbers; it is copied by `place`."""
        size = len(content) if type(content) is bytes else content.nbytes
        start = self._size
        if size:
            self._parts.append(content)
            self._size = start + size
            if size % HEADER:
                rest = HEADER - size % HEADER
                self._parts.append(_PADDING[:rest])
                self._size += rest
        return name, datatype, shape, start, size

    def place(self, memory: Writer) -> Block:
        """The block of all tensors: in `memory`, or itself part of the message where it is small."""
        size = self._size
        if size <= _LARGEST_INLINE:
            try:
                return b"".join(self._parts)
            except TypeError:  # of an array whose elements do not follow each other
                return b"".join([part if type(part) is bytes else np.asarray(part).tobytes() for part in self._parts])
        offset = memory.allocate(size)
        position, region = offset + HEADER, memory.map
        for part in self._parts:
            if type(part) is bytes:
                end = position + len(part)
                region[position:end] = part
            else:
                end = position + part.nbytes
                if isinstance(part, np.ndarray) and not part.flags.c_contiguous:
                    np.ndarray(part.shape, part.dtype, region, position)[...] = part
                else:
                    region[position:end] = part
            position = end
        return offset, size


class Receiver:
    """Reads messages of one channel, whose blocks lie in `memory`."""

    def __init__(self, channel: socket.socket, memory: Reader) -> None:
        self._channel = channel
        self._memory = memory
        self._buffer = memoryview(bytearray(LARGEST_DATAGRAM + 1024))
        self._poller = select.poll()
        self._poller.register(channel, select.POLLIN)

    def await_message(self, patience_ns: int) -> bool:
        """Look for a message again and again, without sleeping, for so long; whether there is one."""
        poll = self._poller.poll
        deadline = monotonic_ns() + patience_ns
        while not poll(0):
            if monotonic_ns() > deadline:
                return False
        return True

    def receive(self) -> Message | None:
        """The next message; None when the other side is gone."""
        size = self._channel.recv_into(self._buffer)
        if not size:
            return None
        message: Message = marshal.loads(self._buffer[:size])
        if message[0] == LARGE:
            message = marshal.loads(self._memory.take(*message[1]))
        return message


def content_of(block: Block, memory: Reader) -> Any:
    """The content of a block, to be cut by the entries: bytes of the message, or a lease that holds the memory."""
    return block if type(block) is bytes else memory.lease(*block)


def free(block: Block, memory: Reader) -> None:
    """Nobody reads the block."""
    if type(block) is not bytes:
        memory.free(block[0])
