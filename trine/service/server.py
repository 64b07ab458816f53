"""`trine serve`: the socket, the event loop, and the order in which things start and end.

HTTP answers from the first moment (readiness says 503 until a request would be served). SIGTERM or SIGINT drains: new
requests get 503 with Retry-After, running ones finish, up to a timeout; a second signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop

from trine.core.errors import ConfigurationError
from trine.service.banner import banner
from trine.service.openai.app import Application, create_app
from trine.service.settings import ServiceSettings

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM
    from trine.llm.embedding import EmbeddingModel

logger = logging.getLogger("trine.service")
_BACKLOG = 2048


def serve(
    model: str | None,
    settings: ServiceSettings,
    engine_options: Mapping[str, Any] | None = None,
    *,
    engine_process: bool = True,
) -> int:
    """Serve `model` (None: only settings.embedding_model) until a signal; returns the exit code.

    engine_options: those of `EngineOptions`. An encoder is served for embeddings. Raises TrineErrors: a port in use, a
    model that can't be loaded.
    """
    from trine.llm.loading import is_encoder

    with (
        contextlib.closing(listen(settings.host, settings.port)) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        if model is not None and settings.embedding_model is None and is_encoder(model):
            model, settings = None, replace(settings, embedding_model=model)
        return runner.run(_serve(model, settings, dict(engine_options or {}), engine_process, listener))


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. ConfigurationError says who or what is in the way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigurationError(
            f"host={host!r} is not an address of this machine: {error.strerror}", param="host"
        ) from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _bind_error(host, port, error) from error
    return listener


def _bind_error(host: str, port: int, error: OSError) -> ConfigurationError:
    if error.errno == errno.EADDRINUSE:
        remedy = f"port {port} on {host} is in use: stop what listens there, or choose another with --port"
    elif error.errno == errno.EACCES:
        remedy = f"port {port} needs privileges: choose one from 1024 on with --port"
    else:
        remedy = f"can't listen on {host}:{port}: {error.strerror}"
    return ConfigurationError(remedy, param="port")


async def _serve(
    model: str | None,
    settings: ServiceSettings,
    engine_options: dict[str, Any],
    engine_process: bool,
    listener: socket.socket,
) -> int:
    engine: AsyncLLM | None = None
    if model is not None:
        from trine.llm.api import AsyncLLM

        engine = AsyncLLM(model, engine_process=engine_process, **engine_options)
    app = create_app(engine, settings=settings)
    server = HttpServer(app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    signalled = _on_signals()
    loading = asyncio.create_task(_load(app, listener))
    try:
        waiting = asyncio.create_task(signalled.wait())
        await asyncio.wait({loading, waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()  # raises what went wrong
        await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
        signalled.clear()
        await _drain(app, signalled)
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        if engine is not None:
            await engine.close()
        server.should_exit = True
        await serving
    return 0


async def _load(app: Application, listener: socket.socket) -> None:
    """Load what is to be served, then say so."""
    service = app.service
    if service.settings.embedding_model is not None:
        service.embedding = await asyncio.to_thread(load_embedding, service.settings.embedding_model)
    if service.engine is not None:
        await service.engine.start()
    _settle_memory()
    print(banner(service, listener.getsockname()[1]), flush=True)


def _settle_memory() -> None:
    """Keep the garbage collector off what was imported and loaded: it took a third of a streamed token's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def load_embedding(model: str) -> EmbeddingModel:
    """The encoder at a directory or of a hub name."""
    from trine.llm.embedding import EmbeddingModel
    from trine.llm.loading import resolve_model

    return EmbeddingModel(resolve_model(model))


async def _drain(app: Application, again: asyncio.Event) -> None:
    """Wait until no request is left, for as long as the settings allow, or until the signal comes again."""
    service = app.service
    service.draining = True
    if not service.active:
        return
    timeout = service.settings.drain_timeout
    logger.info("shutting down: %d requests may finish, for up to %g s", service.active, timeout)
    deadline = asyncio.get_running_loop().time() + timeout
    while service.active and not again.is_set() and asyncio.get_running_loop().time() < deadline:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(again.wait(), 0.05)
    if service.active:
        logger.warning("shutting down with %d requests unfinished", service.active)


def _on_signals() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


class HttpServer(uvicorn.Server):
    """uvicorn, without its own handling of signals, logs and headers."""

    def __init__(self, app: Application) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            loop="none",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            date_header=True,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=5,
            backlog=_BACKLOG,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The caller decides what a signal means."""
        yield
