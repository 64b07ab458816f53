"""The listening side of gRPC: what all connections share, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from trine.server.grpc.connection import GrpcConnection
from trine.server.grpc.stream import Method

_SCRATCH = 256 << 10


class GrpcServer:
    """What the connections share.

    methods      by path
    max_message  bytes of the largest message that is taken
    compression  zlib's level for answers to clients that accept it; 0: none
    allow        raises CallError for a call that its metadata does not open
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        *,
        max_message: int = 2**31 - 1,
        compression: int = 0,
        allow: Callable[[str, Mapping[str, str]], None] | None = None,
        max_age: float | None = None,
        age_grace: float = 5.0,
        keepalive: float = 7200.0,
        keepalive_timeout: float = 20.0,
    ) -> None:
        self.methods = dict(methods)
        self.max_message = max_message
        self.compression = compression
        self.allow = allow
        self.max_age = max_age
        self.age_grace = age_grace
        self.keepalive = keepalive
        self.keepalive_timeout = keepalive_timeout
        self.connections: set[GrpcConnection] = set()
        self.scratch = memoryview(bytearray(_SCRATCH))
        self._servers: list[asyncio.Server] = []

    async def listen(self, **arguments: Any) -> asyncio.Server:
        """Accept connections; the arguments are those of the loop's `create_server` (sock, host and port, ssl)."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: GrpcConnection(self), **arguments)
        self._servers.append(server)
        return server

    async def close(self, timeout: float) -> None:
        """Take no new calls, let running ones finish for up to `timeout` seconds."""
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.drain()
        deadline = asyncio.get_running_loop().time() + timeout
        while self.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.transport.abort()
