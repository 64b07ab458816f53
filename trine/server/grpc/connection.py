"""HTTP/2 as a gRPC server needs it: frames, streams, flow control.

What comes in is not held back by windows (they are as large as they can be; a message has its own limit). The payload
of a large message is received where it is to stay. `outgoing.py` is the other half: what goes out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from trine.server.grpc import frames, status
from trine.server.grpc.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    ConnectionFailureError,
    frame,
    unpack_header,
)
from trine.server.grpc.heads import MAX_HEADER_LIST, HeadReader
from trine.server.grpc.outgoing import Outgoing
from trine.server.grpc.stream import CallError, Method, Stream

if TYPE_CHECKING:
    from trine.server.grpc.server import GrpcServer

logger = logging.getLogger("trine.server.grpc")

_WINDOW_STEP = 1 << 29
_LINGER = 1.0  # seconds in which a client may read why it is refused
_MAX_UNANSWERED = 10_000  # control frames that a client may make us answer while it does not read
_SETTINGS = frames.settings(
    {
        frames.MAX_CONCURRENT_STREAMS: 100_000,
        frames.INITIAL_WINDOW_SIZE: frames.MAX_WINDOW,
        frames.MAX_FRAME_SIZE: frames.LARGEST_FRAME,
        frames.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST,
    }
) + frames.window_update(0, frames.MAX_WINDOW - 65535)
_ACK = frame(frames.SETTINGS, frames.ACK, 0, b"")


class GrpcConnection(Outgoing):
    """One client."""

    def __init__(self, server: GrpcServer) -> None:
        super().__init__()
        self.server = server
        self._heads = HeadReader()
        self._last_stream = 0
        self._pending = b""
        self._greeted = False
        self._consumed = 0
        self._continued: tuple[int, int, bytearray] | None = None  # a header block that goes on
        self._data_left = 0  # of a DATA frame that has not come whole
        self._data_stream: Stream | None = None
        self._data_ends = False
        self._direct = False
        self._paused = False
        self._unanswered = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._heard = self._loop.time()
        self._asked = 0.0

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.server.connections.add(self)
        self.send(_SETTINGS)
        if self.server.max_age is not None:
            self._timers["age"] = self._loop.call_later(self.server.max_age, self._too_old)
        self._timers["keepalive"] = self._loop.call_later(self.server.keepalive, self._keep_alive)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._data_left and not self._closing and self._data_stream is not None:
            room = self._data_stream.room(self._data_left)
            if room is not None:
                self._direct = True
                return room
        self._direct = False
        return self.server.scratch

    def buffer_updated(self, nbytes: int) -> None:
        if self._closing:
            return
        self._reading = True
        self._heard = self._loop.time()
        try:
            if self._direct:
                self._received(nbytes)
            else:
                self._read(bytes(self.server.scratch[:nbytes]))
        except ConnectionFailureError as failure:
            self._fail(failure)
        finally:
            self._reading = False
            self.flush()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self.server.connections.discard(self)
        for timer in self._timers.values():
            timer.cancel()
        streams, self.streams = list(self.streams.values()), {}
        self._blocked.clear()
        self._data_stream = None
        for stream in streams:
            stream.close()
            stream.cancelled()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._unanswered = 0

    # Frames.

    def _received(self, count: int) -> None:
        """Bytes came straight into the message of the DATA frame in progress."""
        stream = self._data_stream
        assert stream is not None
        self._data_left -= count
        try:
            stream.filled(count)
            self._data_done()
        except CallError as error:
            self._refuse(stream, error)

    def _read(self, data: bytes) -> None:
        if self._pending:
            data = self._pending + data
            self._pending = b""
        if not self._greeted:
            if len(data) < len(frames.PREFACE) and frames.PREFACE.startswith(data):
                self._pending = data
                return
            if not data.startswith(frames.PREFACE):
                raise ConnectionFailureError(
                    frames.PROTOCOL_ERROR, "this port speaks gRPC: HTTP/2 with prior knowledge"
                )
            self._greeted = True
            data = data[len(frames.PREFACE) :]
        position, end = 0, len(data)
        if self._data_left:
            position = min(self._data_left, end)
            self._feed(data[:position] if position < end else data)
        while end - position >= 9 and not self._closing:
            high, low, kind, flags, number = unpack_header(data, position)
            length = high << 8 | low
            start = position + 9
            stop = start + length
            if stop > end:
                if kind != DATA and length > MAX_HEADER_LIST:
                    raise ConnectionFailureError(frames.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
                if kind == DATA and not flags & frames.PADDED:
                    self._begin_data(number & 0x7FFFFFFF, flags, length, data[start:end])
                    return
                break
            self._frame(kind, flags, number & 0x7FFFFFFF, data[start:stop])
            position = stop
        if position < end:
            self._pending = data[position:]

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._continued is not None and kind != CONTINUATION:
            raise ConnectionFailureError(frames.PROTOCOL_ERROR, "a header block was not continued")
        if kind == DATA:
            self._count(len(payload))
            stream = self._stream(number)
            if stream is None:
                return
            data = frames.unpadded(payload, flags)
            try:
                if data:
                    stream.feed(data)
                if flags & END_STREAM and not stream.closed:
                    stream.end()
            except CallError as error:
                self._refuse(stream, error)
            except Exception as error:
                self._broken(stream, error)
        elif kind == HEADERS:
            self._headers(flags, number, payload)
        elif kind == frames.WINDOW_UPDATE:
            self._window_update(number, payload)
        else:
            handler = _CONTROL.get(kind)
            if handler is not None:
                handler(self, flags, number, payload)

    def _stream(self, number: int) -> Stream | None:
        """The stream that may get DATA; None where it has ended already."""
        stream = self.streams.get(number)
        if stream is None:
            if number == 0 or number > self._last_stream:
                raise ConnectionFailureError(frames.PROTOCOL_ERROR, "DATA on a stream that is not open")
            return None
        if stream.half_closed:
            self._reset(stream, frames.STREAM_CLOSED)
            return None
        return stream

    def _begin_data(self, number: int, flags: int, length: int, first: bytes) -> None:
        """A DATA frame whose payload has not come whole."""
        if self._continued is not None:
            raise ConnectionFailureError(frames.PROTOCOL_ERROR, "a header block was not continued")
        self._count(length)
        self._data_stream = self._stream(number)
        self._data_left = length
        self._data_ends = bool(flags & END_STREAM)
        if first:
            self._feed(first)

    def _feed(self, data: bytes) -> None:
        """The next bytes of the DATA frame in progress."""
        self._data_left -= len(data)
        stream = self._data_stream
        try:
            if stream is not None and not stream.closed:
                stream.feed(data)
            self._data_done()
        except CallError as error:
            assert stream is not None
            self._refuse(stream, error)
        except Exception as error:
            assert stream is not None
            self._broken(stream, error)

    def _data_done(self) -> None:
        if self._data_left == 0:
            stream, self._data_stream = self._data_stream, None
            if stream is not None and self._data_ends and not stream.closed:
                stream.end()

    def _count(self, length: int) -> None:
        """Give the client its connection's window back."""
        self._consumed += length
        if self._consumed >= _WINDOW_STEP:
            self.send(frames.window_update(0, self._consumed))
            self._consumed = 0

    def consume(self, stream: Stream, length: int) -> None:
        """Give the client a long-lived stream's window back."""
        stream.consumed += length
        if stream.consumed >= _WINDOW_STEP:
            self.send(frames.window_update(stream.id, stream.consumed))
            stream.consumed = 0

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        block = frames.unpadded(payload, flags)
        if flags & frames.PRIORITIZED:
            if len(block) < 5:
                raise ConnectionFailureError(frames.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            block = block[5:]
        if flags & END_HEADERS:
            self._open(number, flags, block)
        else:
            self._continued = (number, flags, bytearray(block))

    def _continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._continued is None or self._continued[0] != number or not payload:
            raise ConnectionFailureError(frames.PROTOCOL_ERROR, "CONTINUATION out of place")
        _, first_flags, block = self._continued
        block += payload
        if len(block) > MAX_HEADER_LIST:
            raise ConnectionFailureError(
                frames.ENHANCE_YOUR_CALM, f"a header block of more than {MAX_HEADER_LIST} bytes"
            )
        if flags & END_HEADERS:
            self._continued = None
            self._open(number, first_flags, bytes(block))

    def _open(self, number: int, flags: int, block: bytes) -> None:
        """A call begins (or, on an open stream, its trailers came)."""
        head = self._heads.read(block)
        known = self.streams.get(number)
        if known is not None:
            if not flags & END_STREAM:
                raise ConnectionFailureError(frames.PROTOCOL_ERROR, "trailers that don't end the stream")
            self._end(known)
            return
        if number <= self._last_stream:
            return  # of a stream that has been reset
        if number % 2 == 0:
            raise ConnectionFailureError(frames.PROTOCOL_ERROR, "a client's stream has an odd number")
        self._last_stream = number
        if self._draining:
            self.send(frames.rst_stream(number, frames.REFUSED_STREAM))
            return
        if head.problem is not None:
            self._not_grpc(number, *head.problem)
            return
        method = self.server.methods.get(head.path)
        stream = Stream(self, number, head, method or _UNKNOWN)
        self.streams[number] = stream
        try:
            if method is None:
                raise CallError(status.UNIMPLEMENTED, f"there is no method {head.path}")
            if self.server.allow is not None:
                self.server.allow(method.group, head.metadata)
            if method.begin is not None:
                method.begin(stream)
        except CallError as error:
            self._refuse(stream, error)
            return
        if flags & END_STREAM:
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        try:
            stream.end()
        except CallError as error:
            self._refuse(stream, error)
        except Exception as error:
            self._broken(stream, error)

    def _not_grpc(self, number: int, code: int, message: str) -> None:
        block = frames.literal(":status", str(code)) + frames.literal("content-type", "text/plain")
        self.send(frame(HEADERS, END_HEADERS, number, block) + frame(DATA, END_STREAM, number, message.encode()))

    def _refuse(self, stream: Stream, error: CallError) -> None:
        """End a call early: the status, and that the rest of it is not wanted."""
        stream.cancelled()
        stream.fail(error)
        if not stream.half_closed and not self._closing:
            self.send(frames.rst_stream(stream.id, frames.NO_ERROR))

    def _broken(self, stream: Stream, error: Exception) -> None:
        logger.error("gRPC call %s failed", stream.head.path, exc_info=error)
        self._refuse(stream, CallError(status.INTERNAL, f"an error of the server itself ({type(error).__name__})"))

    def _reset(self, stream: Stream, code: int) -> None:
        self.send(frames.rst_stream(stream.id, code))
        self.forget(stream)
        stream.cancelled()

    # Control frames.

    def _rst_stream(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 4 or number == 0 or number > self._last_stream:
            raise ConnectionFailureError(frames.PROTOCOL_ERROR, "RST_STREAM out of place")
        stream = self.streams.get(number)
        if stream is not None:
            self.forget(stream)
            stream.cancelled()

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number or (flags & frames.ACK and payload):
            raise ConnectionFailureError(frames.PROTOCOL_ERROR, "SETTINGS out of place")
        if flags & frames.ACK:
            return
        values = frames.parse_settings(payload)
        window = values.get(frames.INITIAL_WINDOW_SIZE, self.peer_window)
        if window > frames.MAX_WINDOW:
            raise ConnectionFailureError(frames.FLOW_CONTROL_ERROR, "a window that is too large")
        size = values.get(frames.MAX_FRAME_SIZE, self._frame_size)
        if not 16384 <= size <= frames.LARGEST_FRAME:
            raise ConnectionFailureError(frames.PROTOCOL_ERROR, "a frame size that is not allowed")
        self._frame_size = size
        change, self.peer_window = window - self.peer_window, window
        for stream in self.streams.values():
            stream.window += change
        self._answer(_ACK)
        if change > 0:
            self._resume()

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) != 8:
            raise ConnectionFailureError(frames.PROTOCOL_ERROR, "PING out of place")
        if not flags & frames.ACK:
            self._answer(frame(frames.PING, frames.ACK, 0, payload))

    def _answer(self, data: bytes) -> None:
        """To a control frame. A client that sends them without reading is not kept."""
        if self._paused:
            self._unanswered += 1
            if self._unanswered > _MAX_UNANSWERED:
                raise ConnectionFailureError(frames.ENHANCE_YOUR_CALM, "too many control frames")
        self.send(data)

    def _goaway(self, flags: int, number: int, payload: bytes) -> None:
        """The client opens no more calls; those that run go on."""

    def _push_promise(self, flags: int, number: int, payload: bytes) -> None:
        raise ConnectionFailureError(frames.PROTOCOL_ERROR, "clients don't push")

    def _window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFailureError(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE of another length than 4")
        amount = int.from_bytes(payload, "big") & frames.MAX_WINDOW
        if number == 0:
            self._window += amount
            if not amount or self._window > frames.MAX_WINDOW:
                raise ConnectionFailureError(
                    frames.FLOW_CONTROL_ERROR, "a window that is too large, or grows by nothing"
                )
            self._resume()
            return
        stream = self.streams.get(number)
        if stream is None:
            if number > self._last_stream:
                raise ConnectionFailureError(frames.PROTOCOL_ERROR, "WINDOW_UPDATE on a stream that is not open")
            return
        stream.window += amount
        if not amount or stream.window > frames.MAX_WINDOW:
            self._reset(stream, frames.FLOW_CONTROL_ERROR)
        elif stream.queue is not None:
            self._pump(stream)

    # Its end.

    def _fail(self, failure: ConnectionFailureError) -> None:
        """Say what was wrong, and close."""
        if self._closing:
            return
        logger.debug("gRPC connection closed: %s", failure)
        self.transport.write(b"".join([*self._out, frames.goaway(self._last_stream, failure.code, str(failure))]))
        self._out.clear()
        self._closing = True
        self._pending = b""
        if self.transport.can_write_eof():  # what the client still sends must not make it lose the reason
            self.transport.write_eof()
            self._timers["linger"] = self._loop.call_later(_LINGER, self.transport.close)
        else:
            self.transport.close()

    def drain(self) -> None:
        """Take no new calls; close when the last one has been answered."""
        if self._draining or self._closing:
            return
        self._draining = True
        self.send(frames.goaway(self._last_stream, frames.NO_ERROR, "the server is stopping"))
        self.flush()
        if not self.streams:
            self.transport.close()

    def _too_old(self) -> None:
        self.drain()
        self._timers["age"] = self._loop.call_later(self.server.age_grace, self.transport.abort)

    def _keep_alive(self) -> None:
        """Ask a silent client whether it is still there."""
        now = self._loop.time()
        silent = now - self._heard
        if self._asked and self._heard < self._asked:
            self.transport.abort()
            return
        self._asked = 0.0
        wait = self.server.keepalive - silent
        if wait <= 0:
            self._asked = now
            self.send(frame(frames.PING, 0, 0, b"trine\0\0\0"))
            wait = self.server.keepalive_timeout
        self._timers["keepalive"] = self._loop.call_later(wait, self._keep_alive)


_Control = Callable[[GrpcConnection, int, int, bytes], None]
_CONTROL: dict[int, _Control] = {
    frames.RST_STREAM: GrpcConnection._rst_stream,
    frames.SETTINGS: GrpcConnection._settings,
    frames.PING: GrpcConnection._ping,
    frames.GOAWAY: GrpcConnection._goaway,
    frames.PUSH_PROMISE: GrpcConnection._push_promise,
    CONTINUATION: GrpcConnection._continuation,
}
_UNKNOWN = Method()
