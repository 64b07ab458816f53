"""`trine serve`: the socket, the event loop, and the order in which things start and end.

HTTP answers from the first moment (readiness says 503 until a request would be served). SIGTERM or SIGINT drains: new
requests get 503 with Retry-After, running ones finish, up to a timeout; a second signal ends at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import uvloop

from trine.server.application import Server, ServerSettings
from trine.server.repository import Repository
from trine.service.banner import banner
from trine.service.openai.app import Application, create_app
from trine.service.repository import OneModelRepository, RepositoryService, ServiceGuest
from trine.service.settings import ServiceSettings

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM
    from trine.llm.embedding import EmbeddingModel


def serve(
    model: str | None,
    settings: ServiceSettings,
    engine_options: Mapping[str, Any] | None = None,
    *,
    engine_process: bool = True,
    ports: ServerSettings | None = None,
) -> int:
    """Serve `model` (None: only settings.embedding_model) until a signal; returns the exit code.

    engine_options: those of `EngineOptions`. ports: gRPC, metrics and what else the v2 protocol has besides HTTP (None:
    only HTTP). An encoder is served for embeddings. Raises TrineErrors: a port in use, a model that can't be loaded.
    """
    from trine.llm.loading import is_encoder

    if model is not None and settings.embedding_model is None and is_encoder(model):
        model, settings = None, replace(settings, embedding_model=model)
    ports = replace(ports or ServerSettings(grpc_port=None, metrics_port=None), host=settings.host)
    ports = replace(ports, http_port=settings.port, drain_seconds=settings.drain_timeout)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(model, settings, dict(engine_options or {}), engine_process, ports))


def serve_repository(repository: Repository, ports: ServerSettings, settings: ServiceSettings) -> int:
    """Serve a repository until a signal: its language models also under OpenAI's routes; returns the exit code.

    Raises TrineErrors: a port in use, a model that can't be loaded.
    """

    async def run() -> int:
        app = Application(RepositoryService(repository, settings))
        return await Server(repository, ports, ServiceGuest(app, _nothing, Server.own_summary)).serve()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


async def _nothing() -> None:
    """All there is to load is in the repository."""


async def _serve(
    model: str | None,
    settings: ServiceSettings,
    engine_options: dict[str, Any],
    engine_process: bool,
    ports: ServerSettings,
) -> int:
    engine: AsyncLLM | None = None
    if model is not None:
        from trine.llm.api import AsyncLLM

        engine = AsyncLLM(model, engine_process=engine_process, **engine_options)
    app = create_app(engine, settings=settings)
    service = app.service

    async def load_embedding_model() -> None:
        if settings.embedding_model is not None:
            service.embedding = await asyncio.to_thread(load_embedding, settings.embedding_model)

    name = service.model_names[0] if engine is not None else ""
    repository = OneModelRepository(engine, name, settings.drain_timeout)
    guest = ServiceGuest(app, load_embedding_model, lambda server: banner(service, server.ports["http"]))
    try:
        return await Server(repository, ports, guest).serve()
    finally:
        if engine is not None:
            await engine.close()


def load_embedding(model: str) -> EmbeddingModel:
    """The encoder at a directory or of a hub name."""
    from trine.llm.embedding import EmbeddingModel
    from trine.llm.loading import resolve_model

    return EmbeddingModel(resolve_model(model))
