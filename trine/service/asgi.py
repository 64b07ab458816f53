"""Requests and responses straight on ASGI: what the endpoints need, and nothing between them and the socket."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import types
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trine.core.errors import RequestError, TrineError

NewsT = TypeVar("NewsT")
Headers = list[tuple[bytes, bytes]]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Coroutine[Any, Any, None]]

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


@types.coroutine
def _resumed(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """Go on with a coroutine that was begun outside of any task and now waits for `waits_for`."""
    yield waits_for
    yield from coroutine.__await__()


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
        "_headers",
        "_receive",
        "_send",
        "_streaming",
        "_unsent",
        "_writing",
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
        self._writing = asyncio.Lock()
        self._unsent: asyncio.Task[None] | None = None
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

    async def write_events(self, data: bytes, more: bool) -> None:
        """Send a part of an event stream, its head first. Safe to call from several tasks."""
        async with self._writing:
            if self._unsent is not None:
                await self._unsent
            if not self.started:
                await self._start(200, [*EVENT_STREAM_HEADERS])
                self._streaming = True
            self.completed = not more
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def event_sink(self, events_of: Callable[[NewsT], bytes]) -> Callable[[NewsT], bool]:
        """A function that sends what `events_of` makes of its argument without waiting for a task's turn.

        It returns False, having done nothing, while that is not possible: before the head is out, and while the client
        reads more slowly than it is written to.
        """

        def sink(news: NewsT) -> bool:
            if not self._streaming or self._unsent is not None or self._writing.locked():
                return False
            data = events_of(news)
            if data:
                self._write_now(data)
            return True

        return sink

    def _write_now(self, data: bytes) -> None:
        """Runs `send` outside of any task, as it nearly always ends without waiting; else a task takes it over."""
        sending = self._send({"type": "http.response.body", "body": data, "more_body": True})
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return
        self._unsent = asyncio.create_task(self._send_rest(sending, waits_for))

    async def _send_rest(self, sending: Coroutine[Any, Any, None], waits_for: Any) -> None:
        try:
            await _resumed(sending, waits_for)
        finally:
            self._unsent = None

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
