"""Idempotency-Key: a request that is sent again gets the first one's answer instead of a second run."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from trine.core.errors import RequestError
from trine.service.asgi import Request, Response

if TYPE_CHECKING:
    from trine.service.openai.context import Service

KEEP_SECONDS = 3600.0
KEEP_BYTES = 64 << 20
Messages = list[MutableMapping[str, Any]]


class IdempotencyError(RequestError):
    """A key that came with another request before."""

    status = 409
    code = "idempotency_key_reused"


class _Entry:
    """One key's request, and the answer when it is there (None: it failed, the next may try)."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.answer: asyncio.Future[Messages | None] = asyncio.get_running_loop().create_future()
        self.expires = float("inf")
        self.size = 0


class IdempotencyStore:
    """Answers by key, the latest ones, in this process. Streams are kept as well, and come again in one piece.

    Only successes are kept: after a failure, the next request with the key runs.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._size = 0

    async def run(
        self,
        key: str,
        service: Service,
        handler: Callable[[Service, Request], Awaitable[Response | None]],
        request: Request,
    ) -> None:
        """Answer `request` by the kept answer for `key`, or by `handler`. IdempotencyError: another body, same key."""
        body = await request.body(service.settings.max_body_bytes)
        identity = hashlib.sha256(f"{request.header(b'authorization')}\n{key}".encode()).digest()
        digest = hashlib.sha256(request.path.encode() + b"\n" + body).digest()
        while (entry := self._find(identity)) is not None:
            if entry.digest != digest:
                raise IdempotencyError("this Idempotency-Key came with another request before: use a new one")
            kept = await asyncio.shield(entry.answer)
            if kept is not None:
                await request.replay(kept)
                return
        entry = self._entries[identity] = _Entry(digest)
        messages = request.record()
        try:
            response = await handler(service, request)
            if response is not None:
                await request.respond(response)
        finally:
            if request.completed and request.status < 400 and request.failure is None:
                self._keep(entry, messages)
            else:
                del self._entries[identity]
                entry.answer.set_result(None)

    def _find(self, identity: bytes) -> _Entry | None:
        now = time.monotonic()
        while self._entries:
            oldest, entry = next(iter(self._entries.items()))
            if not entry.answer.done() or (entry.expires > now and self._size <= KEEP_BYTES):
                break
            del self._entries[oldest]
            self._size -= entry.size
        return self._entries.get(identity)

    def _keep(self, entry: _Entry, messages: Messages) -> None:
        entry.size = sum(len(message.get("body", b"")) for message in messages)
        entry.expires = time.monotonic() + KEEP_SECONDS
        self._size += entry.size
        entry.answer.set_result(messages)
