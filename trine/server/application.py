"""The server as a whole: a repository, HTTP, gRPC and metrics in one event loop, from start to drained end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import trine
from trine.core.errors import ConfigurationError
from trine.server.grpc.server import GrpcServer
from trine.server.grpc.service import GrpcApi
from trine.server.http.api import HttpApi
from trine.server.http.asgi import AsgiApplication
from trine.server.http.exchange import Exchange
from trine.server.http.management import METRICS_TYPE
from trine.server.http.server import HttpServer, v2_server
from trine.server.listening import listen
from trine.server.metrics import MetricsPage, MetricsSettings
from trine.server.repository import Repository
from trine.server.settings import LogSettings, TraceSettings
from trine.server.shared_memory import SharedMemory
from trine.server.tracing import Tracer

logger = logging.getLogger("trine.server")


@dataclass(frozen=True, slots=True)
class GrpcSettings:
    """Settings of the gRPC port.

    certificate, key, root: files of TLS; mutual: clients must show a certificate that root signed. compression: zlib's
    level for answers, 0 for none. Times in seconds; max_age None: connections may grow as old as they like.
    """

    certificate: str = ""
    key: str = ""
    root: str = ""
    mutual: bool = False
    compression: int = 0
    keepalive: float = 7200.0
    keepalive_timeout: float = 20.0
    max_age: float | None = None
    age_grace: float = 5.0
    max_message: int = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of the server's edges. A port is None where that protocol is off; 0 takes a free one.

    restricted_*: API group to the header (metadata key) and value that open it. forward_*: regular expression; headers
    that fit become request parameters. http_tls: certificate and key file. drain_seconds: what running requests get at
    the end. optional_ports: of "grpc" and "metrics", those without which it starts where they are in use.
    """

    server_id: str = "triton"
    host: str = "127.0.0.1"
    http_port: int | None = 8000
    grpc_port: int | None = 8001
    metrics_port: int | None = 8002
    grpc_host: str = ""
    metrics_host: str = ""
    reuse_http_port: bool = False
    reuse_grpc_port: bool = False
    max_body: int = 64 << 20
    http_tls: tuple[str, str] | None = None
    restricted_http: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    restricted_grpc: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    forward_http: str = ""
    forward_grpc: str = ""
    client_shared_memory: bool = False
    grpc: GrpcSettings = field(default_factory=GrpcSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    trace_file: str = ""
    trace_mode: str = "triton"
    trace_url: str = ""
    trace: Mapping[str, Any] = field(default_factory=dict)
    log_file: str = ""
    drain_seconds: float = 30.0
    optional_ports: frozenset[str] = frozenset()


class Edges:
    """The protocols over one repository: what `Server` and the service both put on their sockets."""

    def __init__(self, repository: Repository, settings: ServerSettings) -> None:
        self.repository = repository
        self.settings = settings
        self.memory = SharedMemory(allowed=settings.client_shared_memory)
        trace_settings = TraceSettings(file=settings.trace_file, mode=settings.trace_mode, given=settings.trace)
        self.tracer = Tracer(trace_settings, url=settings.trace_url, service=settings.server_id)
        shared: dict[str, Any] = {
            "server_name": settings.server_id,
            "server_version": trine.__version__,
            "memory": self.memory,
            "trace_settings": trace_settings,
            "log_settings": LogSettings(file=settings.log_file),
            "traces": self.tracer,
        }
        page = MetricsPage(repository, settings.metrics)
        self.exposition = page.render
        self.more_metrics: Callable[[], bytes] = lambda: b""
        self.http = HttpApi(
            repository,
            **shared,
            restricted=settings.restricted_http,
            forward_headers=settings.forward_http,
            exposition=page.render if settings.metrics_port is not None else None,
            max_body=settings.max_body,
        )
        grpc = settings.grpc
        self.grpc = GrpcApi(
            repository, **shared, restricted=settings.restricted_grpc, forward_headers=settings.forward_grpc
        )
        self.grpc_server = GrpcServer(
            self.grpc.methods(),
            max_message=grpc.max_message,
            compression=grpc.compression,
            allow=self.grpc.allow if settings.restricted_grpc else None,
            max_age=grpc.max_age,
            age_grace=grpc.age_grace,
            keepalive=grpc.keepalive,
            keepalive_timeout=grpc.keepalive_timeout,
        )

    def allow_grpc(self, allow: Callable[[Mapping[str, str]], None]) -> None:
        """A check of every call's metadata, before that of restricted groups. It raises CallError."""
        inner = self.grpc_server.allow

        def check(group: str, metadata: Mapping[str, str]) -> None:
            if group != "health":
                allow(metadata)
            if inner is not None:
                inner(group, metadata)

        self.grpc_server.allow = check

    def metrics_page(self, exchange: Exchange) -> None:
        """A handler for the metrics port: everything there is."""
        if exchange.path not in ("/metrics", "/v2/metrics"):
            exchange.respond(404, parts=(b'{"error":"Not Found"}',))
        elif exchange.method not in ("GET", "HEAD"):
            exchange.respond(405, parts=(b'{"error":"Method Not Allowed"}',))
        else:
            exchange.respond(200, METRICS_TYPE, (self.exposition(), self.more_metrics()))

    def metrics_server(self) -> HttpServer:
        return HttpServer(AsgiApplication(self.metrics_page, max_body=1 << 16))

    async def close(self, timeout: float) -> None:
        await self.grpc_server.close(timeout)
        await self.tracer.close()
        self.memory.close()


def grpc_tls(settings: GrpcSettings) -> ssl.SSLContext | None:
    """TLS for the gRPC port; None where no certificate is given. ConfigurationError names the file that is wrong."""
    if not settings.certificate:
        return None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.certificate, settings.key or None)
        context.set_alpn_protocols(["h2"])
        if settings.root:
            context.load_verify_locations(settings.root)
        if settings.mutual:
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"gRPC over TLS: {settings.certificate}, {settings.key} or {settings.root} can't be used: {error}",
            param="grpc_server_cert",
        ) from error
    return context


class Guest(Protocol):
    """An application that shares the HTTP port: it gets what is outside of /v2.

    guarded: whether callers have to show a key. allow_http, allow_grpc: who may call /v2 and gRPC then; the first
    returns what is wrong, the second raises CallError.
    """

    guarded: bool

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    def allow_http(self, exchange: Exchange) -> str | None: ...

    def allow_grpc(self, metadata: Mapping[str, str]) -> None: ...

    async def started(self, server: Server) -> None:
        """The repository has loaded its models."""

    async def drain(self, timeout: float) -> None:
        """Take no more requests, and let running ones finish."""

    def summary(self, server: Server) -> str:
        """What to print when everything is ready."""

    def metrics(self) -> bytes:
        """Metrics of its own, for the metrics port: Prometheus' text."""


class Server:
    """A repository served. `serve` runs until a signal; a test calls `start` and `close`."""

    def __init__(self, repository: Repository, settings: ServerSettings, guest: Guest | None = None) -> None:
        self.repository = repository
        self.settings = settings
        self.guest = guest
        self.edges = Edges(repository, settings)
        if guest is not None:
            self.edges.more_metrics = guest.metrics
        self.ports: dict[str, int] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._http: list[tuple[HttpServer, asyncio.Task[None]]] = []

    def bind(self) -> None:
        """Take the ports. ConfigurationError where one is taken that is not optional."""
        settings = self.settings
        wanted = (
            ("http", settings.host, settings.http_port, settings.reuse_http_port),
            ("grpc", settings.grpc_host or settings.host, settings.grpc_port, settings.reuse_grpc_port),
            ("metrics", settings.metrics_host or settings.host, settings.metrics_port, False),
        )
        for name, host, port, reuse in wanted:
            if port is None:
                continue
            flag = "--http-port or --port" if name == "http" else f"--{name}-port"
            try:
                self._sockets[name] = listen(host, port, flag, reuse_port=reuse)
            except ConfigurationError as error:
                if name not in settings.optional_ports:
                    raise
                logger.warning("%s is not served: %s", name, error.message)
            else:
                self.ports[name] = self._sockets[name].getsockname()[1]

    async def start(self) -> None:
        """Listen, then load the models: health answers from the first moment. ModelLoadError where one fails."""
        if not self._sockets:
            self.bind()
        settings, edges = self.settings, self.edges
        if "http" in self._sockets:
            self._run(self._http_server(), self._sockets["http"])
        if "metrics" in self._sockets:
            self._run(edges.metrics_server(), self._sockets["metrics"])
        if "grpc" in self._sockets:
            await edges.grpc_server.listen(sock=self._sockets["grpc"], ssl=grpc_tls(settings.grpc))
        await self.repository.start()
        if self.guest is not None:
            await self.guest.started(self)
        gc.collect()
        gc.freeze()
        if self.guest is not None:
            gc.set_threshold(20_000, 20, 20)  # collecting took a third of a streamed token's time

    def _http_server(self) -> HttpServer:
        settings, guest = self.settings, self.guest
        if guest is None:
            return v2_server(self.edges.http, max_body=settings.max_body, tls=settings.http_tls)
        if guest.guarded:
            self.edges.allow_grpc(guest.allow_grpc)

        def guarded(exchange: Exchange) -> None:
            refusal = guest.allow_http(exchange)
            if refusal is None:
                self.edges.http(exchange)
            else:
                exchange.respond_json({"error": refusal}, 401)

        handler = guarded if guest.guarded else self.edges.http
        own = AsgiApplication(handler, max_body=settings.max_body)

        async def both(scope: Any, receive: Any, send: Any) -> None:
            path = scope.get("path", "")
            await (own if path == "/v2" or path.startswith("/v2/") else guest)(scope, receive, send)

        return HttpServer(both, handler, max_body=settings.max_body, tls=settings.http_tls)

    def _run(self, server: HttpServer, listener: socket.socket) -> None:
        self._http.append((server, asyncio.ensure_future(server.serve(sockets=[listener]))))

    async def close(self) -> None:
        """Take no new requests, let running ones finish, end everything."""
        timeout = self.settings.drain_seconds
        if self.guest is not None:
            await self.guest.drain(timeout)
        await self.repository.close(timeout)
        await self.edges.close(1.0)
        for server, _ in self._http:
            server.should_exit = True
        await asyncio.gather(*(task for _, task in self._http), return_exceptions=True)
        for listener in self._sockets.values():
            listener.close()

    async def serve(self) -> int:
        """Until SIGTERM or SIGINT; a second one ends without waiting. Returns the exit code."""
        self.bind()
        signalled = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, signalled.set)
        starting = asyncio.ensure_future(self.start())
        waiting = asyncio.ensure_future(signalled.wait())
        try:
            await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()  # raises what went wrong
                print(self.summary(), flush=True)
            await waiting
            signalled.clear()
            logger.info("shutting down: running requests may finish, for up to %g s", self.settings.drain_seconds)
        finally:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await starting
            closing = asyncio.ensure_future(self.close())
            again = asyncio.ensure_future(signalled.wait())
            await asyncio.wait({closing, again}, return_when=asyncio.FIRST_COMPLETED)
            again.cancel()
            if not closing.done():
                closing.cancel()
        return 0

    def summary(self) -> str:
        """Where the server listens."""
        if self.guest is not None:
            return self.guest.summary(self)
        return self.own_summary()

    def own_summary(self) -> str:
        ready = sum(1 for _ in self.repository.models())
        where = ", ".join(f"{name} {self.settings.host}:{port}" for name, port in self.ports.items())
        return f"Trine {trine.__version__} serves {ready} model{'s' if ready != 1 else ''}: {where}"
