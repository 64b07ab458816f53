"""The fast path of HTTP/1.1: requests under /v2 with their head and length known, straight from the socket.

Why not the ASGI server alone: of the 0.09 ms that one core has for a request at Triton's rate, it takes 0.04, and it
copies a large body three times. Here the head of a request that came before is found in a table by its bytes, a body
lies where the socket wrote it, and no task is made. What is not plain (chunked bodies, `Expect`, HTTP/1.0, upgrades,
paths outside /v2) goes to the ASGI server's own protocol, on the same connection, from that request on; it reaches
the same functions through `asgi.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import httptools
import numpy as np

from trine.server.http.exchange import JSON, Buffer, Exchange, HeaderBlock, error_body

Handler = Callable[[Exchange], None]
MAX_HEAD = 64 << 10
_SCRATCH = 256 << 10
_REMEMBERED_HEADS = 1024
_REMEMBERED_HEAD_SIZE = 2048
_JOIN_BELOW = 32 << 10  # smaller answers go out as one piece of memory
_LINGER = 2.0  # seconds in which a client may read a refusal while it still sends
SLOW_READER_LIMIT = 64 << 20  # bytes of an event stream that wait for a client before it counts as gone


class Head:
    """The head of a request. `plain`: this module can take it."""

    __slots__ = ("content_length", "headers", "keep_alive", "method", "path", "plain")

    def __init__(self, method: str, path: str, headers: dict[bytes, bytes], keep_alive: bool, plain: bool) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.keep_alive = keep_alive
        self.plain = plain
        self.content_length = int(headers.get(b"content-length", b"0"))


class _Reader:
    """Collects what the parser finds."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.keep_alive = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        self.keep_alive = self.parser.should_keep_alive()


def parse_head(data: bytes) -> Head:
    """The request line and headers, up to the empty line. Raises httptools.HttpParserError."""
    reader = _Reader()
    parser = reader.parser
    with contextlib.suppress(httptools.HttpParserUpgrade):
        parser.feed_data(data)
    path = httptools.parse_url(reader.url).path or b"/"
    headers = reader.headers
    plain = (
        parser.get_http_version() == "1.1"
        and not parser.should_upgrade()
        and b"transfer-encoding" not in headers
        and b"expect" not in headers
        and (path == b"/v2" or path.startswith(b"/v2/"))
    )
    text = unquote(path.decode("latin-1")) if b"%" in path else path.decode("latin-1")
    return Head(parser.get_method().decode("ascii"), text, headers, reader.keep_alive, plain)


class NativeExchange(Exchange):
    """A request of a connection."""

    __slots__ = ("_chunked", "_connection", "_open")

    def __init__(self, connection: Connection, head: Head, body: Buffer) -> None:
        self.method = head.method
        self.path = head.path
        self.headers = head.headers
        self.body = body
        self.on_disconnect = None
        self._connection = connection
        self._open = True
        self._chunked = False

    def respond(self, status: int, headers: HeaderBlock = JSON, parts: Sequence[Buffer] = ()) -> None:
        connection = self._connection
        if not self._open or connection.exchange is not self:
            return
        self._open = False
        self.on_disconnect = None
        length = 0
        for part in parts:
            length += len(part)
        head = response_head(status, headers, connection.keep_alive) + b"Content-Length: %d\r\n\r\n" % length
        transport = connection.transport
        if self.method == "HEAD":
            transport.write(head)
        elif length < _JOIN_BELOW:
            transport.write(b"".join((head, *parts)))
        else:
            transport.writelines((head, *parts))
        connection.finished()

    def begin(self, status: int, headers: HeaderBlock) -> None:
        if self._open and self._connection.exchange is self:
            self._chunked = True
            head = response_head(status, headers, self._connection.keep_alive)
            self._connection.transport.write(head + b"Transfer-Encoding: chunked\r\n\r\n")

    def write(self, data: bytes) -> None:
        if not self._open or self._connection.exchange is not self or not data:
            return
        transport = self._connection.transport
        transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        if transport.get_write_buffer_size() > SLOW_READER_LIMIT:
            transport.abort()

    def end(self) -> None:
        if self._open and self._connection.exchange is self:
            self._open = False
            self.on_disconnect = None
            self._connection.transport.write(b"0\r\n\r\n")
            self._connection.finished()


_HEADS: dict[tuple[int, HeaderBlock, bool], bytes] = {}


def response_head(status: int, headers: HeaderBlock, keep_alive: bool) -> bytes:
    """Status line and headers as bytes, without the body's length and the empty line."""
    key = (status, headers, keep_alive)
    found = _HEADS.get(key)
    if found is None:
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, HTTPStatus(status).phrase.encode())]
        lines += [b"%b: %b\r\n" % header for header in headers]
        if not keep_alive:
            lines.append(b"Connection: close\r\n")
        found = b"".join(lines)
        if len(_HEADS) >= _REMEMBERED_HEADS:
            _HEADS.clear()
        _HEADS[key] = found
    return found


class Listener:
    """What the connections of one server share. `fallback` makes the ASGI server's protocol for a connection."""

    def __init__(
        self,
        handler: Handler,
        fallback: Callable[[], asyncio.Protocol],
        *,
        max_body: int,
        idle_timeout: float = 75.0,
        connections: set[Any] | None = None,
    ) -> None:
        self.handler = handler
        self.fallback = fallback
        self.max_body = max_body
        self.idle_timeout = idle_timeout
        self.connections: set[Any] = connections if connections is not None else set()
        self.own: set[Connection] = set()
        self.heads: dict[bytes, Head] = {}
        self.scratch = memoryview(bytearray(_SCRATCH))
        self._sweeping: asyncio.TimerHandle | None = None

    def head(self, data: bytes) -> Head:
        """The parsed head: most clients send the same one again and again. Raises httptools.HttpParserError."""
        found = self.heads.get(data)
        if found is None:
            found = parse_head(data)
            if len(data) <= _REMEMBERED_HEAD_SIZE:
                if len(self.heads) >= _REMEMBERED_HEADS:
                    self.heads.clear()
                self.heads[data] = found
        return found

    def add(self, connection: Connection) -> None:
        self.connections.add(connection)
        self.own.add(connection)
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(self.idle_timeout / 2, self._sweep)

    def remove(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.own.discard(connection)
        if not self.own and self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None

    def _sweep(self) -> None:
        """Close what has been silent since the last but one sweep: one timer for all connections."""
        self._sweeping = asyncio.get_running_loop().call_later(self.idle_timeout / 2, self._sweep)
        for connection in list(self.own):
            connection.sweep()


class Connection(asyncio.BufferedProtocol):
    """One client. Requests of a connection are answered one at a time, in order."""

    __slots__ = (
        "_body",
        "_closing",
        "_discard",
        "_fallback",
        "_filled",
        "_head",
        "_listener",
        "_paused",
        "_pending",
        "_quiet",
        "_running",
        "exchange",
        "keep_alive",
        "transport",
    )

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.transport: Any = None
        self.exchange: NativeExchange | None = None
        self.keep_alive = True
        self._fallback: asyncio.Protocol | None = None
        self._pending = b""  # bytes that no request has taken yet
        self._head: Head | None = None  # of the request whose body is being read
        self._body: memoryview | None = None
        self._filled = 0
        self._quiet = 0  # sweeps since something was read or answered
        self._discard = False
        self._closing = False
        self._running = False
        self._paused = False

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._listener.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._body is not None:
            return self._body[self._filled :]
        return self._listener.scratch

    def buffer_updated(self, nbytes: int) -> None:
        self._quiet = 0
        if self._body is not None:
            self._filled += nbytes
            if self._filled == len(self._body):
                self._body_complete()
        elif not self._discard:
            data = bytes(self._listener.scratch[:nbytes])
            if self._fallback is not None:
                self._fallback.data_received(data)
                return
            self._pending = self._pending + data if self._pending else data
            if self.exchange is None:
                self._take_requests()
            elif len(self._pending) > _SCRATCH and not self._paused:
                self._paused = True
                self.transport.pause_reading()

    def eof_received(self) -> bool:
        if self._fallback is not None:
            return bool(self._fallback.eof_received())
        if self.exchange is None:
            return False
        # A client that closes and one that only has nothing more to say look alike: the second gets a moment.
        self.keep_alive = False
        exchange = self.exchange
        asyncio.get_running_loop().call_later(0.25, self._hung_up, exchange)
        return True

    def _hung_up(self, exchange: NativeExchange) -> None:
        if self.exchange is exchange:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.remove(self)
        if self._fallback is not None:
            self._fallback.connection_lost(exc)
            return
        exchange, self.exchange = self.exchange, None
        self._closing = True
        self._body = None
        if exchange is not None and exchange.on_disconnect is not None:
            exchange.on_disconnect()

    def pause_writing(self) -> None:
        if self._fallback is not None:
            self._fallback.pause_writing()

    def resume_writing(self) -> None:
        if self._fallback is not None:
            self._fallback.resume_writing()

    # What the server calls.

    def shutdown(self) -> None:
        """Close when the request in progress, if there is one, has been answered."""
        if self._fallback is not None:
            return  # the ASGI server knows its own protocol and tells it itself
        self.keep_alive = False
        if self.exchange is None:
            self.transport.close()

    def sweep(self) -> None:
        self._quiet += 1
        if self._quiet > 2 and self.exchange is None and self._fallback is None:
            self.transport.close()

    def finished(self) -> None:
        """The exchange has been answered: the next request may come, or lie here already."""
        self.exchange = None
        self._quiet = 0
        if not self.keep_alive:
            self._closing = True
            self.transport.close()
        elif self._pending and not self._running:
            if self._paused:
                self._paused = False
                self.transport.resume_reading()
            asyncio.get_running_loop().call_soon(self._take_requests)

    # Requests out of bytes.

    def _take_requests(self) -> None:
        """Start the requests that lie in `_pending`, as far as they are answered at once."""
        self._running = True
        while self._pending and self.exchange is None and self._body is None and not self._closing:
            if not self._take_request():
                break
        self._running = False

    def _take_request(self) -> bool:
        """Whether bytes were taken."""
        data = self._pending
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD:
                self._refuse(431, "the request's head is too large")
            elif not data.startswith((b"GET /v2", b"POST /v2")) and len(data) > 8:
                self._hand_over()
            return False
        end += 4
        try:
            head = self._listener.head(data[:end])
        except (httptools.HttpParserError, ValueError):
            self._refuse(400, "the request is not valid HTTP/1.1")
            return False
        if not head.plain:
            self._hand_over()
            return False
        length = head.content_length
        self.keep_alive = head.keep_alive
        if length > self._listener.max_body:
            self._refuse(400, too_large(length, self._listener.max_body))
            return False
        if len(data) - end >= length:
            self._pending = data[end + length :]
            self._start(head, memoryview(data)[end : end + length] if length else b"")
            return True
        self._head = head
        # Not zeroed, and no more of it than arrives is ever real memory.
        body = np.empty(length, dtype=np.uint8).data
        self._filled = len(data) - end
        body[: self._filled] = data[end:]
        self._body = body
        self._pending = b""
        return True

    def _body_complete(self) -> None:
        head, body = self._head, self._body
        self._head = self._body = None
        assert head is not None
        assert body is not None
        self._start(head, body)

    def _start(self, head: Head, body: Buffer) -> None:
        exchange = self.exchange = NativeExchange(self, head, body)
        self._listener.handler(exchange)

    def _hand_over(self) -> None:
        """Let the ASGI server's protocol have this connection from here on."""
        fallback = self._fallback = self._listener.fallback()
        fallback.connection_made(self.transport)
        data, self._pending = self._pending, b""
        fallback.data_received(data)

    def _refuse(self, status: int, message: str) -> None:
        """Answer, and close: what follows on this connection can't be understood or is not wanted."""
        body = error_body(message)
        head = response_head(status, JSON, False) + b"Content-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)
        self._pending = b""
        self._discard = self._closing = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
            asyncio.get_running_loop().call_later(_LINGER, self.transport.close)
        else:
            self.transport.close()


def too_large(size: int, limit: int) -> str:
    """The message about a body above the limit."""
    return (
        f"request of {size} bytes exceeds the maximum allowed input size of {limit} bytes. Use "
        "--http-max-input-size to increase the limit."
    )
