"""HTTP servers: uvicorn's sockets and life, our connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trine.server.http.asgi import AsgiApplication
from trine.server.http.connection import Connection, Handler, Listener

_BACKLOG = 2048
IDLE_SECONDS = 75


class HttpServer(uvicorn.Server):
    """uvicorn, without its own handling of signals, logs and headers.

    app      an ASGI application; of requests that `handler` takes natively it only gets the unusual ones
    handler  answers /v2 on the connection itself; None: everything is the application's
    tls      certificate file and key file
    """

    def __init__(
        self,
        app: Any,
        handler: Handler | None = None,
        *,
        max_body: int = 64 << 20,
        tls: tuple[str, str] | None = None,
    ) -> None:
        self._handler = handler
        self._max_body = max_body
        self._listener: Listener | None = None
        config = uvicorn.Config(
            app,
            http="httptools" if handler is None else self._connect,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            loop="none",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            date_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=5,
            backlog=_BACKLOG,
            ssl_certfile=tls[0] if tls else None,
            ssl_keyfile=tls[1] if tls else None,
        )
        super().__init__(config)

    def _connect(self, **arguments: Any) -> asyncio.BufferedProtocol:
        """Called by uvicorn for each connection."""
        if self._listener is None:
            assert self._handler is not None
            self._listener = Listener(
                self._handler,
                lambda: HttpToolsProtocol(**arguments),
                max_body=self._max_body,
                idle_timeout=IDLE_SECONDS,
                connections=self.server_state.connections,
            )
        return Connection(self._listener)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The caller decides what a signal means."""
        yield


def v2_server(handler: Handler, *, max_body: int, tls: tuple[str, str] | None = None) -> HttpServer:
    """A server of /v2 alone."""
    return HttpServer(AsgiApplication(handler, max_body=max_body), handler, max_body=max_body, tls=tls)
