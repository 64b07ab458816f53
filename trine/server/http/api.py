"""The routes under /v2: which function answers which method and path, and who may ask."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

from trine.core.errors import TrineError
from trine.server.errors import Code, ServerError
from trine.server.http import dashboard, generate, infer, management
from trine.server.http.compression import UnsupportedEncodingError
from trine.server.http.exchange import JSON, TEXT, Exchange, HeaderBlock
from trine.server.plan import Plan, Remembered
from trine.server.request import InferRequest
from trine.server.settings import LogSettings, TraceSettings
from trine.server.shared_memory import SharedMemory
from trine.server.traffic import KEY_HEADER, VERSION_HEADER

logger = logging.getLogger("trine.server.http")

Endpoint = Callable[["HttpApi", Exchange, str, str], "Awaitable[None] | None"]
_ENCODINGS: HeaderBlock = ((b"Accept-Encoding", b"gzip, deflate"), *TEXT)
API_GROUPS = (
    "health",
    "metadata",
    "inference",
    "shared-memory",
    "model-config",
    "model-repository",
    "statistics",
    "trace",
    "logging",
)
_OF_MODELS = ("inference", "metadata", "model-config")  # what loads a model on demand
_CONTEXT = (b"traceparent", KEY_HEADER.encode(), VERSION_HEADER.encode())
_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[0-9]+))?"
_REGION = r"(?:/region/(?P<model>[^/]+))?"

_PATTERNS: tuple[tuple[str, str, dict[str, Endpoint]], ...] = (
    (_MODEL + "/infer", "inference", {"POST": infer.infer}),
    (_MODEL + "/generate", "inference", {"POST": generate.generate}),
    (_MODEL + "/generate_stream", "inference", {"POST": generate.generate_stream}),
    ("/v2/health/live", "health", {"GET": management.live}),
    ("/v2/health/ready", "health", {"GET": management.ready}),
    (_MODEL + "/ready", "health", {"GET": management.model_ready}),
    ("/v2", "metadata", {"GET": management.server_metadata}),
    ("/v2/dashboard", "metadata", {"GET": dashboard.page}),
    ("/v2/dashboard/data", "statistics", {"GET": dashboard.data}),
    ("/v2/models/stats", "statistics", {"GET": management.statistics}),
    (_MODEL + "/stats", "statistics", {"GET": management.statistics}),
    (_MODEL + "/config", "model-config", {"GET": management.model_config}),
    (_MODEL, "metadata", {"GET": management.model_metadata}),
    (r"/v2/repository(?:/[^/]+)?/index", "model-repository", {"POST": management.repository_index}),
    (
        r"/v2/repository(?:/[^/]+)?/models/(?P<model>[^/]+)/load",
        "model-repository",
        {"POST": management.repository_load},
    ),
    (
        r"/v2/repository(?:/[^/]+)?/models/(?P<model>[^/]+)/unload",
        "model-repository",
        {"POST": management.repository_unload},
    ),
    (f"/v2/systemsharedmemory{_REGION}/status", "shared-memory", {"GET": management.system_status}),
    (f"/v2/systemsharedmemory{_REGION}/register", "shared-memory", {"POST": management.system_register}),
    (f"/v2/systemsharedmemory{_REGION}/unregister", "shared-memory", {"POST": management.system_unregister}),
    (f"/v2/cudasharedmemory{_REGION}/status", "shared-memory", {"GET": management.cuda_status}),
    (f"/v2/cudasharedmemory{_REGION}/register", "shared-memory", {"POST": management.cuda_register}),
    (f"/v2/cudasharedmemory{_REGION}/unregister", "shared-memory", {"POST": management.cuda_unregister}),
    (
        r"/v2(?:/models/(?P<model>[^/]+))?/trace/setting",
        "trace",
        {"GET": management.trace_settings, "POST": management.update_trace_settings},
    ),
    ("/v2/logging", "logging", {"GET": management.log_settings, "POST": management.update_log_settings}),
    (r"/v2/explain/(?P<model>[^/]+)", "statistics", {"GET": management.explain}),
    (
        r"/v2/models/(?P<model>[^/]+)/traffic",
        "model-repository",
        {"GET": management.traffic, "POST": management.update_traffic},
    ),
    ("/v2/metrics", "statistics", {"GET": management.metrics}),
)
_COMPILED = [(re.compile(pattern), group, endpoints) for pattern, group, endpoints in _PATTERNS]


class Route:
    """What a path leads to."""

    __slots__ = ("endpoints", "group", "model", "version")

    def __init__(self, group: str, endpoints: dict[str, Endpoint], model: str, version: str) -> None:
        self.group = group
        self.endpoints = endpoints
        self.model = model
        self.version = version


class HttpApi:
    """Answers exchanges. It is a handler: `api(exchange)`.

    restricted       API group to the header and the value that open it
    forward_headers  headers that fit become parameters of requests
    exposition       Prometheus' text
    """

    def __init__(
        self,
        repository: Any,
        *,
        server_name: str = "triton",
        server_version: str = "",
        memory: SharedMemory | None = None,
        trace_settings: TraceSettings | None = None,
        log_settings: LogSettings | None = None,
        traces: Any = None,
        restricted: Mapping[str, tuple[str, str]] | None = None,
        forward_headers: str = "",
        exposition: Callable[[], bytes] | None = None,
        max_body: int = 64 << 20,
    ) -> None:
        self.repository = repository
        self.server_name = server_name
        self.server_version = server_version
        self.memory = memory if memory is not None else SharedMemory()
        self.trace_settings = trace_settings if trace_settings is not None else TraceSettings()
        self.log_settings = log_settings if log_settings is not None else LogSettings()
        self.traces = traces
        self.restricted = dict(restricted or {})
        self.exposition = exposition
        self.max_body = max_body
        self.plans: Remembered[Plan] = Remembered()
        self._forward = re.compile(forward_headers.encode(), re.IGNORECASE) if forward_headers else None
        self._routes: dict[str, Route | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, exchange: Exchange) -> None:
        """Answer, now or later, whatever happens."""
        try:
            route = self._route(exchange.path)
            if route is None:
                exchange.respond(404, TEXT, (b'{"error":"Not Found"}',))
                return
            endpoint = route.endpoints.get(exchange.method)
            if endpoint is None:
                exchange.respond(405, TEXT, (b'{"error":"Method Not Allowed"}',))
                return
            if self.restricted:
                self._check_allowed(route.group, exchange)
            if route.model and route.group in _OF_MODELS and self.repository.wants_load(route.model):
                self.repository.load_then(route.model, lambda: self(exchange))
                return
            waiting = endpoint(self, exchange, route.model, route.version)
            if waiting is not None:
                task = asyncio.ensure_future(self._finish(waiting, exchange))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except Exception as error:
            self._fail(exchange, error)

    async def _finish(self, waiting: Awaitable[None], exchange: Exchange) -> None:
        try:
            await waiting
        except Exception as error:
            self._fail(exchange, error)

    def _fail(self, exchange: Exchange, error: Exception) -> None:
        if isinstance(error, UnsupportedEncodingError):
            exchange.respond_error(error, _ENCODINGS)
        elif isinstance(error, RestrictedError):
            exchange.respond(403, JSON, (management.error_text(error.message),))
        elif isinstance(error, TrineError):
            exchange.respond_error(error)
        else:
            logger.error("%s %s failed", exchange.method, exchange.path, exc_info=error)
            exchange.respond_error(
                ServerError(f"an error of the server itself ({type(error).__name__}); its log says more", Code.INTERNAL)
            )

    def _route(self, path: str) -> Route | None:
        try:
            return self._routes[path]
        except KeyError:
            pass
        if len(self._routes) >= 4096:
            self._routes.clear()
        found = self._routes[path] = resolve(path)
        return found

    def _check_allowed(self, group: str, exchange: Exchange) -> None:
        needed = self.restricted.get(group)
        if needed is not None:
            header, value = needed
            given = exchange.headers.get(header.lower().encode("latin-1"), b"").decode("latin-1")
            if given != value:
                raise RestrictedError(header)

    def prepare(self, request: InferRequest, exchange: Exchange) -> None:
        """What the headers add to a request: forwarded ones, the trace that it belongs to."""
        headers = exchange.headers
        if self._forward is not None:
            for name, value in headers.items():
                if self._forward.fullmatch(name):
                    request.parameters[name.decode("latin-1")] = value.decode("latin-1")
        for name in _CONTEXT:
            if name in headers:
                request.context = {**(request.context or {}), name.decode(): headers[name].decode("latin-1")}
        if self.traces is not None and self.traces.enabled:
            self.traces.start(request)


class RestrictedError(ServerError):
    """An API that needs a header."""

    def __init__(self, header: str) -> None:
        super().__init__(f"This API is restricted, expecting header '{header}'", Code.UNAVAILABLE)


def resolve(path: str) -> Route | None:
    """The route of a path; None where there is nothing. A trailing slash does not matter."""
    if len(path) > 1 and path.endswith("/"):
        path = path[:-1]
    for pattern, group, endpoints in _COMPILED:
        match = pattern.fullmatch(path)
        if match is not None:
            named = match.groupdict()
            return Route(group, endpoints, unquote(named.get("model") or ""), named.get("version") or "")
    return None
