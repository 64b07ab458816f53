"""The response cache: answers of models that allow it, by model, version and inputs."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from trine.core.errors import ConfigurationError
from trine.server.request import InferRequest
from trine.server.tensors import Tensor

logger = logging.getLogger("trine.server")

Stored = tuple[tuple[str, str, tuple[int, ...], bytes], ...]
"""Name, datatype, shape and bytes of each output."""
_OVERHEAD = 256  # bytes an entry takes besides its tensors


class ResponseCache(Protocol):
    """Its methods are called in the event loop's thread."""

    def look_up(self, key: bytes, found: Callable[[list[Tensor] | None], None]) -> None:
        """Call `found` with the outputs, or None: at once or later."""

    def insert(self, key: bytes, outputs: Sequence[Tensor]) -> None: ...

    async def close(self) -> None: ...


def request_key(model: str, version: str, request: InferRequest) -> bytes:
    """What two requests share that have the same answer."""
    digest = hashlib.blake2b(f"{model}\0{version}\0".encode(), digest_size=20)
    for name in sorted(request.inputs):
        tensor = request.inputs[name]
        digest.update(f"{name}\0{tensor.datatype}\0{tensor.shape}\0".encode())
        digest.update(tensor.raw)
    if request.outputs is not None:
        digest.update(repr([output.name for output in request.outputs]).encode())
    return digest.digest()


def _stored(outputs: Sequence[Tensor]) -> Stored:
    """Copies: the tensors may be views into a batch that would live as long as they do."""
    return tuple((tensor.name, tensor.datatype, tensor.shape, bytes(tensor.raw)) for tensor in outputs)


def _restored(stored: Stored) -> list[Tensor]:
    return [Tensor(name, datatype, shape, None, raw) for name, datatype, shape, raw in stored]


class LocalCache:
    """In this process, up to `size` bytes; the answer used least recently makes room."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._entries: OrderedDict[bytes, tuple[Stored, int]] = OrderedDict()

    def look_up(self, key: bytes, found: Callable[[list[Tensor] | None], None]) -> None:
        entry = self._entries.get(key)
        if entry is None:
            found(None)
            return
        self._entries.move_to_end(key)
        found(_restored(entry[0]))

    def insert(self, key: bytes, outputs: Sequence[Tensor]) -> None:
        size = _OVERHEAD + sum(len(tensor.raw) for tensor in outputs)
        if key in self._entries or size > self._size:
            return
        while self._used + size > self._size:
            _, (_, freed) = self._entries.popitem(last=False)
            self._used -= freed
        self._entries[key] = (_stored(outputs), size)
        self._used += size

    async def close(self) -> None:
        self._entries.clear()


class RedisCache:
    """In a Redis server, shared between servers. While that does not answer, every look-up is a miss."""

    def __init__(self, url: str) -> None:
        try:
            from redis.asyncio import Redis
        except ImportError as error:
            raise ConfigurationError("--cache-config=redis needs the package redis: pip install redis") from error
        self._client: Any = Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0)
        self._tasks: set[asyncio.Task[None]] = set()

    def look_up(self, key: bytes, found: Callable[[list[Tensor] | None], None]) -> None:
        async def ask() -> None:
            import msgspec

            outputs = None
            try:
                answer = await self._client.get(b"trine:" + key)
                if answer is not None:
                    outputs = _restored(msgspec.msgpack.decode(answer, type=Stored))
            except Exception as error:
                logger.warning("the response cache does not answer: %s", error)
            found(outputs)

        self._spawn(ask())

    def insert(self, key: bytes, outputs: Sequence[Tensor]) -> None:
        stored = _stored(outputs)

        async def put() -> None:
            import msgspec

            try:
                await self._client.set(b"trine:" + key, msgspec.msgpack.encode(stored))
            except Exception as error:
                logger.warning("the response cache takes no answer: %s", error)

        self._spawn(put())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()


def make_cache(size: int, url: str) -> ResponseCache | None:
    """The cache that the settings ask for: in Redis where there is a URL, else local; None where there is none."""
    if url:
        return RedisCache(url)
    return LocalCache(size) if size > 0 else None
