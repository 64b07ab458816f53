"""A gRPC call: messages out of DATA frames, answers into them, its deadline and its end."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import TYPE_CHECKING

import numpy as np

from trine.server.grpc import status
from trine.server.grpc.frames import END_HEADERS, END_STREAM, HEADERS, RESPONSE_BLOCK, frame, literal, status_block

if TYPE_CHECKING:
    from trine.server.grpc.connection import GrpcConnection
    from trine.server.grpc.heads import RequestHead

Buffer = bytes | memoryview
_EMPTY = b""
_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
ACCEPTED = "identity,deflate,gzip"


class CallError(Exception):
    """Ends a call with a gRPC status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Method:
    """What a path calls.

    begin  for calls with a stream of messages: called with the stream when the call begins; it sets `on_message` …
    unary  for calls with one message: called with the stream and the message
    """

    __slots__ = ("begin", "group", "unary")

    def __init__(
        self,
        *,
        unary: Callable[[Stream, Buffer], None] | None = None,
        begin: Callable[[Stream], None] | None = None,
        group: str = "",
    ) -> None:
        self.unary = unary
        self.begin = begin
        self.group = group


class Stream:
    """One call on a connection. It ends with `finish` (or `reply`, which does everything for a unary call).

    on_message, on_half_close: the client's messages and their end, of calls with a stream of them
    on_cancel: the client called it off, hung up, or its deadline passed
    """

    __slots__ = (
        "_buffer",
        "_compressed",
        "_filled",
        "_message",
        "_prefix",
        "_size",
        "_timer",
        "closed",
        "connection",
        "consumed",
        "deadline_ns",
        "half_closed",
        "head",
        "headers_sent",
        "id",
        "method",
        "on_cancel",
        "on_half_close",
        "on_message",
        "queue",
        "trailers",
        "window",
    )

    def __init__(self, connection: GrpcConnection, number: int, head: RequestHead, method: Method) -> None:
        self.connection = connection
        self.id = number
        self.head = head
        self.method = method
        self.window = connection.peer_window
        self.queue: deque[Buffer] | None = None  # what flow control holds back
        self.trailers = _EMPTY
        self.consumed = 0
        self.half_closed = False
        self.headers_sent = False
        self.closed = False
        self.on_message: Callable[[Buffer], None] | None = None
        self.on_half_close: Callable[[], None] | None = None
        self.on_cancel: Callable[[], None] | None = None
        self.deadline_ns: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._message: Buffer | None = None
        self._buffer: memoryview | None = None
        self._filled = 0
        self._size = 0
        self._prefix = _EMPTY
        self._compressed = False
        if head.timeout_ns is not None:
            self.deadline_ns = monotonic_ns() + head.timeout_ns
            self._timer = asyncio.get_running_loop().call_later(head.timeout_ns / 1e9, self._expire)

    @property
    def metadata(self) -> dict[str, str]:
        return self.head.metadata

    # What comes in.

    def feed(self, data: Buffer) -> None:
        """The payload of a DATA frame, or a part of it."""
        if self._buffer is None and not self._prefix and len(data) >= 5:
            size = int.from_bytes(data[1:5], "big")
            if size == len(data) - 5:  # a message in a frame of its own
                self._check_size(size)
                self._deliver(data[5:], data[0])
                return
        self._assemble(memoryview(data))

    def _assemble(self, data: memoryview) -> None:
        while len(data) and not self.closed:
            if self._buffer is None:
                taken = 5 - len(self._prefix)
                self._prefix += bytes(data[:taken])
                data = data[taken:]
                if len(self._prefix) < 5:
                    return
                self._size = int.from_bytes(self._prefix[1:], "big")
                self._check_size(self._size)
                self._compressed = bool(self._prefix[0])
                self._prefix = _EMPTY
                self._filled = 0
                self._buffer = np.empty(self._size, dtype=np.uint8).data
            taken = min(len(data), self._size - self._filled)
            self._buffer[self._filled : self._filled + taken] = data[:taken]
            data = data[taken:]
            self.filled(taken)

    def room(self, wanted: int) -> memoryview | None:
        """Where the next bytes of the message in progress go; None unless `wanted` or more are missing."""
        if self._buffer is None or self._size - self._filled < wanted:
            return None
        return self._buffer[self._filled : self._filled + wanted]

    def filled(self, count: int) -> None:
        """So many bytes have been put there."""
        self._filled += count
        if self._filled == self._size and self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            self._deliver(buffer, self._compressed)

    def _check_size(self, size: int) -> None:
        limit = self.connection.server.max_message
        if size > limit:
            raise CallError(
                status.RESOURCE_EXHAUSTED, f"Received message larger than max ({size} vs. {limit}): raise the limit"
            )

    def _deliver(self, message: Buffer, compressed: int) -> None:
        if compressed:
            message = self._decompress(message)
        if self.on_message is not None:
            self.on_message(message)
        elif self._message is not None:
            raise CallError(status.INVALID_ARGUMENT, "more than one message in a call that takes one")
        else:
            self._message = message

    def _decompress(self, message: Buffer) -> bytes:
        window = _WINDOW.get(self.head.encoding)
        if window is None:
            raise CallError(
                status.UNIMPLEMENTED,
                f"grpc-encoding {self.head.encoding!r} is not known to this server: use one of {ACCEPTED}",
            )
        limit = self.connection.server.max_message
        decoder = zlib.decompressobj(window)
        try:
            data = decoder.decompress(message, limit + 1)
        except zlib.error as error:
            raise CallError(status.INVALID_ARGUMENT, f"a message is not {self.head.encoding} data: {error}") from error
        if not decoder.eof:
            if len(data) > limit:
                raise CallError(status.RESOURCE_EXHAUSTED, f"Received message larger than max ({limit}) in all")
            raise CallError(status.INVALID_ARGUMENT, f"a message is {self.head.encoding} data that ends too early")
        return data

    def end(self) -> None:
        """The client has sent everything."""
        self.half_closed = True
        if self._prefix or self._buffer is not None:
            raise CallError(status.INVALID_ARGUMENT, "the call ended within a message")
        if self.on_half_close is not None:
            self.on_half_close()
        elif self.method.unary is not None:
            if self._message is None:
                raise CallError(status.INVALID_ARGUMENT, "the call has no message")
            message, self._message = self._message, None
            self.method.unary(self, message)

    # What goes out.

    def reply(self, parts: Sequence[Buffer], length: int) -> None:
        """The only message, and status OK. Of the parts none must change from here on."""
        if self.closed:
            return
        if not self.head_plain():
            self.send(parts, length)
            self.finish()
            return
        self.connection.send_reply(self, parts, length)

    def head_plain(self) -> bool:
        """Whether answers go out as they are."""
        return self.connection.server.compression == 0

    def send_head(self) -> str:
        """The head of the answer, if it is not out; returns how messages are compressed."""
        connection = self.connection
        encoding = ""
        if connection.server.compression:
            encoding = next((name for name in ("gzip", "deflate") if name in self.head.accepts), "")
        if not self.headers_sent:
            self.headers_sent = True
            block = RESPONSE_BLOCK + literal("grpc-encoding", encoding) if encoding else RESPONSE_BLOCK
            connection.send(frame(HEADERS, END_HEADERS, self.id, block))
        return encoding

    def send(self, parts: Sequence[Buffer], length: int) -> None:
        """A message; its head before the first."""
        if self.closed:
            return
        connection = self.connection
        encoding = self.send_head()
        prefix = b"\0"
        if encoding:
            encoder = zlib.compressobj(connection.server.compression, zlib.DEFLATED, _WINDOW[encoding])
            data = encoder.compress(b"".join(parts)) + encoder.flush()
            parts, length, prefix = (data,), len(data), b"\1"
        connection.send_data(self, (prefix + length.to_bytes(4, "big"), *parts), length + 5)

    def finish(self, code: int = 0, message: str = "") -> None:
        """The call's status; nothing follows."""
        if self.closed:
            return
        self.on_cancel = None
        block = status_block(code, message)
        if not self.headers_sent:
            self.headers_sent = True
            block = RESPONSE_BLOCK + block
        trailers = frame(HEADERS, END_HEADERS | END_STREAM, self.id, block)
        self.connection.send_trailers(self, trailers)

    def fail(self, error: CallError) -> None:
        self.finish(error.code, error.message)

    # How it ends otherwise.

    def _expire(self) -> None:
        self._timer = None
        if self.closed:
            return
        self.cancelled()
        self.finish(status.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def cancelled(self) -> None:
        """Nobody waits for the answer."""
        callback, self.on_cancel = self.on_cancel, None
        if callback is not None:
            callback()

    def close(self) -> None:
        """Let go of everything; the connection has forgotten this stream."""
        self.closed = True
        self.on_message = self.on_half_close = None
        self.queue = None
        self._buffer = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
