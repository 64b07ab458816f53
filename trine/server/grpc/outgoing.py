"""The sending half of an HTTP/2 connection: frames that fit the client's windows, written once a turn of the loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from trine.server.grpc import frames
from trine.server.grpc.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    OK_BLOCK,
    RESPONSE_BLOCK,
    frame,
)
from trine.server.grpc.stream import Buffer, Stream

_JOIN_BELOW = 64 << 10
_RESPONSE_FLAGS = END_HEADERS
_TRAILER_FLAGS = END_HEADERS | END_STREAM
_pack_frame = frames.header


class Outgoing(asyncio.BufferedProtocol):
    """What streams send through. Streams that a window holds back go on when the client widens it."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.streams: dict[int, Stream] = {}
        self.peer_window = 65535  # of a new stream
        self._window = 65535  # of the connection
        self._frame_size = 16384
        self._blocked: dict[int, Stream] = {}  # streams that wait for a window
        self._out: list[Buffer] = []
        self._out_size = 0
        self._reading = False
        self._scheduled = False
        self._draining = False
        self._closing = False
        self._loop = asyncio.get_running_loop()

    def send(self, data: Buffer) -> None:
        self._out.append(data)
        self._out_size += len(data)
        if not self._reading and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        self._scheduled = False
        if self._reading or not self._out:
            return
        parts, self._out = self._out, []
        size, self._out_size = self._out_size, 0
        if self._closing:
            return
        if size < _JOIN_BELOW:
            self.transport.write(b"".join(parts))
        else:
            self.transport.writelines(parts)

    def send_reply(self, stream: Stream, parts: Sequence[Buffer], length: int) -> None:
        """Head, one message and status of a unary call: as one piece where the windows allow."""
        total = length + 5
        number = stream.id
        if total > self._frame_size or total > stream.window or total > self._window or stream.queue is not None:
            stream.headers_sent = True
            self.send(frame(HEADERS, END_HEADERS, number, RESPONSE_BLOCK))
            self.send_data(stream, (b"\0" + length.to_bytes(4, "big"), *parts), total)
            stream.finish()
            return
        self._window -= total
        head = (
            _pack_frame(len(RESPONSE_BLOCK), HEADERS, _RESPONSE_FLAGS, number)
            + RESPONSE_BLOCK
            + _pack_frame(total, DATA, 0, number)
            + b"\0"
            + length.to_bytes(4, "big")
        )
        out = self._out
        out.append(head)
        out.extend(parts)
        trailers = _pack_frame(len(OK_BLOCK), HEADERS, _TRAILER_FLAGS, number) + OK_BLOCK
        self._out_size += length + len(head)
        self.send(trailers)
        if not stream.half_closed:
            self.send(frames.rst_stream(number, frames.NO_ERROR))
        self.forget(stream)

    def send_data(self, stream: Stream, parts: Sequence[Buffer], length: int) -> None:
        """DATA frames, now or when the client's windows allow."""
        if stream.queue is None and length <= min(stream.window, self._window, self._frame_size):
            stream.window -= length
            self._window -= length
            self.send(frames.header(length, DATA, 0, stream.id))
            for part in parts:
                self.send(part)
            return
        if stream.queue is None:
            stream.queue = deque()
        stream.queue.extend(part for part in parts if len(part))
        self._pump(stream)

    def send_trailers(self, stream: Stream, trailers: bytes) -> None:
        if stream.queue is not None:
            stream.trailers = trailers
            return
        self.send(trailers)
        self.forget(stream)

    def _pump(self, stream: Stream) -> None:
        """Send what flow control held back, as far as it allows now."""
        queue = stream.queue
        assert queue is not None
        while queue:
            room = min(stream.window, self._window, self._frame_size)
            if room <= 0:
                self._blocked[stream.id] = stream
                return
            pieces, size = frames.cut(queue, room)
            stream.window -= size
            self._window -= size
            self.send(frames.header(size, DATA, 0, stream.id))
            for piece in pieces:
                self.send(piece)
        stream.queue = None
        self._blocked.pop(stream.id, None)
        if stream.trailers:
            trailers, stream.trailers = stream.trailers, b""
            self.send_trailers(stream, trailers)

    def _resume(self) -> None:
        for stream in list(self._blocked.values()):
            if self._window <= 0:
                return
            if stream.queue is not None:
                self._pump(stream)

    def forget(self, stream: Stream) -> None:
        self.streams.pop(stream.id, None)
        self._blocked.pop(stream.id, None)
        stream.close()
        if self._draining and not self.streams:
            self.flush()
            self.transport.close()
