"""The protocol as an ASGI application: the slow twin of `connection.py`, and the way to mount it anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from trine.server.http.connection import Handler, too_large
from trine.server.http.exchange import JSON, Buffer, Exchange, HeaderBlock, error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AsgiExchange(Exchange):
    """Its answer comes out as ASGI messages, in a queue."""

    __slots__ = ("_open", "messages")

    def __init__(self, method: str, path: str, headers: dict[bytes, bytes], body: Buffer) -> None:
        super().__init__(method, path, headers, body)
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self._open = True

    def respond(self, status: int, headers: HeaderBlock = JSON, parts: Sequence[Buffer] = ()) -> None:
        if not self._open:
            return
        self._open = False
        self.on_disconnect = None
        body = b"".join(parts)
        length = (b"Content-Length", str(len(body)).encode())
        self.messages.put_nowait({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        self.messages.put_nowait({"type": "http.response.body", "body": body, "more_body": False})

    def begin(self, status: int, headers: HeaderBlock) -> None:
        self.messages.put_nowait({"type": "http.response.start", "status": status, "headers": [*headers]})

    def write(self, data: bytes) -> None:
        self.messages.put_nowait({"type": "http.response.body", "body": data, "more_body": True})

    def end(self) -> None:
        if self._open:
            self._open = False
            self.on_disconnect = None
            self.messages.put_nowait({"type": "http.response.body", "body": b"", "more_body": False})


class AsgiApplication:
    """ASGI over a handler of exchanges. `max_body`: bytes of the largest request body."""

    def __init__(self, handler: Handler, *, max_body: int) -> None:
        self.handler = handler
        self.max_body = max_body

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await self._body(receive)
        if body is None:
            return
        headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        exchange = AsgiExchange(scope["method"], scope["path"], headers, body)
        if len(body) > self.max_body:
            exchange.respond(400, JSON, (error_body(too_large(len(body), self.max_body)),))
        else:
            self.handler(exchange)
        watcher = asyncio.create_task(_watch(receive, exchange))
        try:
            more = True
            while more:
                message = await exchange.messages.get()
                await send(message)
                more = message["type"] == "http.response.start" or message["more_body"]
        finally:
            watcher.cancel()

    async def _body(self, receive: Receive) -> bytes | None:
        """None: the client hung up. Of a body above the limit no more is read than shows that it is."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body", False) or size > self.max_body:
                return parts[0] if len(parts) == 1 else b"".join(parts)


async def _watch(receive: Receive, exchange: AsgiExchange) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    if exchange.on_disconnect is not None:
        exchange.on_disconnect()
    exchange.end()


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
