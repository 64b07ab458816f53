"""A server with OpenAI's API as the target of a load, over a small HTTP/1.1 client.

A general client library costs more time a streamed token than a fast server takes to make one; this one reads
`text/event-stream` in chunks and looks into a piece only as far as it must.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from trine.benchmark.load import Answer
from trine.core.errors import ConfigurationError, RequestError

_WORDS = (
    "time",
    "year",
    "people",
    "day",
    "thing",
    "world",
    "school",
    "state",
    "family",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "week",
    "system",
    "question",
    "number",
    "night",
    "water",
    "room",
    "story",
    "month",
    "book",
    "house",
)


class HttpTarget:
    """Requests to `url` (with or without /v1), prompts of about `input_len` words, each its own.

    `chat` asks /v1/chat/completions, else /v1/completions. `ignore_eos` (an extension that Trine and vLLM know) makes
    every answer `output_len` tokens long. Connections are kept and used again.
    """

    def __init__(
        self,
        url: str,
        model: str,
        input_len: int,
        output_len: int,
        *,
        chat: bool = False,
        ignore_eos: bool = True,
        api_key: str | None = None,
        seed: int = 0,
    ) -> None:
        self._address = Address(url)
        self._model = model
        self._input_len = input_len
        self._seed = seed
        self._chat = chat
        self._options: dict[str, Any] = {"max_tokens": output_len, "temperature": 0, "stream": True}
        self._options["stream_options"] = {"include_usage": True}
        if ignore_eos:
            self._options["ignore_eos"] = True
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._idle: list[Connection] = []

    async def stream(self, number: int, answer: Answer) -> AsyncIterator[int]:
        connection = self._idle.pop() if self._idle else await Connection.open(self._address)
        path = "/v1/chat/completions" if self._chat else "/v1/completions"
        try:
            events = connection.post(path, json.dumps(self._body(number)).encode(), self._headers)
            async for event in events:
                if event == b"[DONE]":
                    continue
                if has_token(event):
                    yield 1
                else:
                    _read_usage(json.loads(event), answer)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        # A server that reports no usage: a piece is a token, as far as anybody can tell.
        answer.output_tokens = answer.output_tokens or len(answer.arrivals)

    def _body(self, number: int) -> dict[str, Any]:
        draw = random.Random(f"{self._seed}.{number}")
        text = f"{number} " + " ".join(draw.choices(_WORDS, k=self._input_len))
        prompt = {"messages": [{"role": "user", "content": text}]} if self._chat else {"prompt": text}
        return {"model": self._model, **prompt, **self._options}

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


_TEXT = re.compile(rb'"(?:content|text|reasoning_content|arguments)":\s*"[^"]')


def has_token(event: bytes) -> bool:
    """Whether a piece carries text: by its bytes, for parsing each would cost more than the server's share of it."""
    return _TEXT.search(event) is not None


def _read_usage(event: dict[str, Any], answer: Answer) -> None:
    if "error" in event:
        raise RequestError(str(event["error"].get("message", event["error"])))
    usage = event.get("usage")
    if usage:
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.output_tokens = usage["completion_tokens"]


class Address:
    """Where a URL points, without its /v1."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"url={url!r}: give http://HOST:PORT", param="url")
        self.host = parts.hostname
        self.tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")


class Connection:
    """One HTTP/1.1 connection, used for one request at a time."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._address = address
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, address: Address) -> Connection:
        context = ssl.create_default_context() if address.tls else None
        try:
            reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, limit=1 << 20)
        except OSError as error:
            raise RequestError(f"no connection to {address.host}:{address.port}: {error.strerror or error}") from error
        return cls(address, reader, writer)

    def close(self) -> None:
        self._writer.close()

    async def get(self, path: str, headers: dict[str, str]) -> bytes:
        """The body of a GET; RequestError for a status other than 200."""
        await self._send("GET", path, b"", headers)
        chunked, length = await self._head()
        return b"".join([chunk async for chunk in self._chunks(chunked, length)])

    async def post(self, path: str, body: bytes, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """The data of each server-sent event."""
        await self._send("POST", path, body, {"Content-Type": "application/json", **headers})
        chunked, length = await self._head()
        rest = b""
        async for chunk in self._chunks(chunked, length):
            *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                if event.startswith(b"data:"):
                    yield event[5:].strip()

    async def _send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        lines = [f"{method} {self._address.prefix}{path} HTTP/1.1", f"Host: {self._address.host}:{self._address.port}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
        self._writer.write(head.encode() + body)
        await self._writer.drain()

    async def _head(self) -> tuple[bool, int]:
        """Whether the body is chunked, and its length if not; RequestError, with the body's message, unless 200."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head.strip().split("\r\n")
        status = status_line.split(" ", 2)[1]
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        length = int(fields.get("content-length", 0))
        if status != "200":
            body = b"".join([chunk async for chunk in self._chunks(chunked, length)])
            raise RequestError(f"HTTP {status}: {body[:300].decode(errors='replace')}")
        return chunked, length

    async def _chunks(self, chunked: bool, length: int) -> AsyncIterator[bytes]:
        if not chunked:
            yield await self._reader.readexactly(length)
            return
        while size := int((await self._reader.readline()).partition(b";")[0], 16):
            chunk = await self._reader.readexactly(size + 2)
            yield chunk[:-2]
        await self._reader.readline()


async def first_model(url: str, api_key: str | None = None) -> str:
    """The name of the first model that a server lists."""
    connection = await Connection.open(Address(url))
    try:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        models = json.loads(await connection.get("/v1/models", headers))["data"]
    finally:
        connection.close()
    if not models:
        raise RequestError(f"{url} lists no model: name one with --model")
    return str(models[0]["id"])
