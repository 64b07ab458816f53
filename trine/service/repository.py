"""The service over a repository: language models answer OpenAI's routes, all models the v2 protocol, on one port."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from trine.core.errors import RequestError
from trine.server.backends.base import Device
from trine.server.backends.llm import engine_model
from trine.server.backends.llm.instance import LlmInstance
from trine.server.grpc import status
from trine.server.grpc.stream import CallError
from trine.server.http.exchange import Exchange
from trine.server.model import LoadedModel, PlacedInstance, Placement
from trine.server.repository import Repository, RepositorySettings
from trine.service.asgi import Receive, Scope, Send
from trine.service.openai.app import Application
from trine.service.openai.context import Service
from trine.service.openai.errors import unknown_model
from trine.service.settings import ServiceSettings

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM
    from trine.server.application import Server

logger = logging.getLogger("trine.service")
_OPEN_PATHS = ("/v2/health/live", "/v2/health/ready", "/v2/dashboard")
_POLL_SECONDS = 0.05
_NO_KEY = "this service asks for an API key: send it as 'Authorization: Bearer KEY'"


class OneModelRepository(Repository):
    """A repository with one language model in it, whose engine the service starts and ends."""

    def __init__(self, engine: AsyncLLM | None, name: str, drain_seconds: float) -> None:
        super().__init__(RepositorySettings(drain_seconds=drain_seconds))
        self._engine = engine
        self._name = name
        self._loaded = engine is None

    async def start(self) -> None:
        await super().start()
        if self._engine is None:
            return
        await self._engine.start()
        config, model = engine_model(self._name, self._engine)
        place = Placement(f"{self._name}_0", Device("cpu"), 0)
        instances = [PlacedInstance(place, model.instance(place.device, place.index))]
        await self.register_model(LoadedModel(config, "1", None, model, instances))
        self._loaded = True

    @property
    def ready(self) -> bool:
        return self._loaded and super().ready


class RepositoryService(Service):
    """The language models of a repository. A request's `model` is the name of one that has the back end `llm`."""

    def __init__(self, repository: Repository, settings: ServiceSettings) -> None:
        self._repository = repository
        super().__init__(None, None, settings)

    @property
    def engines(self) -> dict[str, AsyncLLM]:
        """By name, those that are loaded now."""
        found: dict[str, AsyncLLM] = {}
        for model in self._repository.models():
            workers = model.pool.workers
            if workers and isinstance(workers[0].instance, LlmInstance):
                found[model.name] = workers[0].instance.engine
        return found

    @property
    def engine(self) -> AsyncLLM | None:
        return next(iter(self.engines.values()), None)

    def engine_named(self, name: str) -> AsyncLLM | None:
        return self.engines.get(name)

    @property
    def model_names(self) -> tuple[str, ...]:
        return tuple(self.engines)

    def language_model(self, name: str | None) -> AsyncLLM:
        engines = self.engines
        if not engines:
            raise RequestError("no model of this repository has the back end llm: /v2 serves the others", param="model")
        if name is not None and name not in engines:
            raise unknown_model(name, list(engines))
        self.check_ready()
        return engines[name] if name is not None else next(iter(engines.values()))

    @property
    def unavailable(self) -> str | None:
        if self.draining:
            return "the service is shutting down: send the request to another"
        return None if self._repository.ready else "models are loading"


class ServiceGuest:
    """The service beside the v2 protocol: OpenAI's routes and pages, and the same keys for both."""

    def __init__(
        self, app: Application, load: Callable[[], Awaitable[None]], describe: Callable[[Server], str]
    ) -> None:
        self._app = app
        self._load = load
        self._describe = describe
        self._keys = [key.encode() for key in app.service.settings.api_keys]
        self.guarded = bool(self._keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def allow_http(self, exchange: Exchange) -> str | None:
        """What is wrong with a request's key, or None."""
        if exchange.path in _OPEN_PATHS:
            return None
        return None if self._is_key(exchange.headers.get(b"authorization", b"")) else _NO_KEY

    def allow_grpc(self, metadata: Mapping[str, str]) -> None:
        if not self._is_key(metadata.get("authorization", "").encode()):
            raise CallError(status.UNAUTHENTICATED, _NO_KEY)

    def _is_key(self, authorization: bytes) -> bool:
        scheme, _, token = authorization.partition(b" ")
        # Every key is compared, in constant time, so that the time taken tells nothing.
        matches = [hmac.compare_digest(token.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)

    async def started(self, server: Server) -> None:
        await self._load()

    async def drain(self, timeout: float) -> None:
        service = self._app.service
        service.draining = True
        if not service.active:
            return
        logger.info("shutting down: %d requests may finish, for up to %g s", service.active, timeout)
        deadline = asyncio.get_running_loop().time() + timeout
        while service.active and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        if service.active:
            logger.warning("shutting down with %d requests unfinished", service.active)

    def summary(self, server: Server) -> str:
        return self._describe(server)

    def metrics(self) -> bytes:
        return self._app.service.metrics.registry.exposition()
