"""Requests and responses straight on ASGI: what the endpoints need, and nothing between them and the socket."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from trine.core.errors import RequestError, TrineError

Headers = list[tuple[bytes, bytes]]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = b"application/json"
EVENT_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # reverse proxies: pass events on at once
)
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,256}")


class PayloadTooLargeError(RequestError):
    """A body above the limit; the connection is closed rather than read to its end."""

    status = 413
    code = "request_too_large"


class ClientDisconnectedError(Exception):
    """The client hung up: there is nobody to answer."""


@dataclass(slots=True)
class Response:
    """An answer that is known as a whole."""

    body: bytes
    status: int = 200
    content_type: bytes = JSON
    headers: Headers = field(default_factory=list)


class Request:
    """One HTTP request and the way to answer it.

    `response_headers` are added to whatever the answer is. `notes` are logged with the request's line; the endpoint may
    add to them (tokens, finish reason). `failure` is an error that came when the answer had begun.
    """

    __slots__ = (
        "_body",
        "_head_lock",
        "_headers",
        "_receive",
        "_send",
        "_streaming",
        "arrival",
        "completed",
        "failure",
        "id",
        "notes",
        "response_headers",
        "scope",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.arrival = time.monotonic()
        self.status = 0
        self.completed = False
        self.failure: TrineError | None = None
        self._body: bytes | None = None
        self._streaming = False
        self._head_lock = asyncio.Lock()
        self.notes: dict[str, Any] = {}
        self.response_headers: Headers = []
        self._receive = receive
        self._send = send
        self._headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # the first of several wins
        given = self._headers.get(b"x-request-id", b"")
        self.id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    @property
    def method(self) -> str:
        method: str = self.scope["method"]
        return method

    @property
    def path(self) -> str:
        path: str = self.scope["path"]
        return path

    @property
    def started(self) -> bool:
        """Whether the status line is out, so that the answer can't become another."""
        return self.status != 0

    def header(self, name: bytes) -> str | None:
        """A header's value; `name` in lower case."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def body(self, limit: int) -> bytes:
        """The whole body, also when asked for again. PayloadTooLargeError as soon as it is known to exceed `limit`."""
        if self._body is None:
            self._body = await self._read_body(limit)
        return self._body

    async def _read_body(self, limit: int) -> bytes:
        announced = self.header(b"content-length")
        if announced is not None and announced.isdigit() and int(announced) > limit:
            raise _too_large(limit)
        message = await self._receive()
        body: bytes = message.get("body", b"")
        if message["type"] == "http.request" and not message.get("more_body", False) and len(body) <= limit:
            return body
        parts, size = [body], len(body)
        while message["type"] == "http.request" and message.get("more_body", False) and size <= limit:
            message = await self._receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        if size > limit:
            raise _too_large(limit)
        return b"".join(parts)

    async def _disconnected(self) -> None:
        """Returns when the client has hung up (or has the whole answer). Only after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    @contextlib.asynccontextmanager
    async def cancelled_by_disconnect(self) -> AsyncIterator[None]:
        """Within, a client that hangs up cancels the task, which ends as ClientDisconnectedError."""
        task = asyncio.current_task()
        assert task is not None
        hung_up = False

        async def watch() -> None:
            nonlocal hung_up
            await self._disconnected()
            if not self.completed:
                hung_up = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if not hung_up:
                raise
            task.uncancel()
            raise ClientDisconnectedError from None
        finally:
            watcher.cancel()

    async def respond(self, response: Response) -> None:
        """Send a whole answer."""
        headers: Headers = [
            (b"content-type", response.content_type),
            (b"content-length", str(len(response.body)).encode()),
            *response.headers,
        ]
        await self._start(response.status, headers)
        self.completed = True
        await self._send({"type": "http.response.body", "body": response.body})

    def write_events(self, data: bytes, more: bool) -> Awaitable[None]:
        """Send a part of an event stream, its head first. Safe to call from several tasks."""
        if self._streaming and more:  # a token's way: no coroutine of ours in between
            return self._send({"type": "http.response.body", "body": data, "more_body": True})
        return self._write_edge(data, more)

    async def _write_edge(self, data: bytes, more: bool) -> None:
        """The first or the last part of an event stream."""
        if not self._streaming:
            async with self._head_lock:
                if not self.started:
                    await self._start(200, [*EVENT_STREAM_HEADERS])
                self._streaming = True
        if not more:
            self.completed = True
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def record(self) -> list[MutableMapping[str, Any]]:
        """From now on, what is sent is also appended to the list returned."""
        messages: list[MutableMapping[str, Any]] = []
        send = self._send

        async def record_and_send(message: MutableMapping[str, Any]) -> None:
            messages.append(message)
            await send(message)

        self._send = record_and_send
        return messages

    async def replay(self, messages: list[MutableMapping[str, Any]]) -> None:
        """Answer with what another request recorded, in one piece and under this request's id."""
        start, *parts = messages
        headers = dict(start["headers"])
        body = b"".join(part["body"] for part in parts)
        again = Response(body, start["status"], headers[b"content-type"], [(b"idempotent-replayed", b"true")])
        await self.respond(again)

    async def _start(self, status: int, headers: Headers) -> None:
        self.status = status
        milliseconds = round((time.monotonic() - self.arrival) * 1000)
        headers += [
            (b"x-request-id", self.id.encode()),
            (b"openai-processing-ms", str(milliseconds).encode()),
            *self.response_headers,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is larger than {limit} bytes, the most that this service takes: send less")
