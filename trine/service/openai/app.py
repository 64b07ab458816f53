"""The application: finds the endpoint, checks the key, turns errors into answers, counts and logs."""

from __future__ import annotations

import hmac
import logging
import time
from typing import TYPE_CHECKING

from trine.core.errors import NotFoundError, TrineError
from trine.service.asgi import ClientDisconnectedError, Headers, Receive, Request, Response, Scope, Send
from trine.service.openai.context import Service
from trine.service.openai.errors import (
    AuthenticationError,
    MethodNotAllowedError,
    UnsupportedMediaTypeError,
    error_body,
    error_headers,
)
from trine.service.openai.idempotency import IdempotencyStore
from trine.service.openai.routes import ENDPOINTS, Endpoint
from trine.service.settings import ServiceSettings

if TYPE_CHECKING:
    from trine.llm.api import AsyncLLM
    from trine.llm.embedding import EmbeddingModel

logger = logging.getLogger("trine.service")
CLIENT_CLOSED = 499
"""In logs and metrics, the status of a request whose client hung up."""
_EXPOSED = b"x-request-id, openai-processing-ms, retry-after, retry-after-ms"


def create_app(
    engine: AsyncLLM | None,
    *,
    embedding: EmbeddingModel | None = None,
    settings: ServiceSettings | None = None,
) -> Application:
    """An ASGI application that serves `engine`, which its caller starts and closes, and `embedding`."""
    return Application(Service(engine, embedding, settings or ServiceSettings()))


class Application:
    """ASGI. One object a process; `service` holds its state."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._exact: dict[str, dict[str, Endpoint]] = {}
        self._by_prefix: list[tuple[str, dict[str, Endpoint]]] = []
        for endpoint in ENDPOINTS:
            prefix, brace, _ = endpoint.path.partition("{")
            if brace:
                self._by_prefix.append((prefix, {endpoint.method: endpoint}))
            else:
                self._exact.setdefault(endpoint.path, {})[endpoint.method] = endpoint
        self._keys = [key.encode() for key in service.settings.api_keys]
        self._origins = frozenset(service.settings.cors_origins)
        self._idempotency = IdempotencyStore()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._handle(Request(scope, receive, send))
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _handle(self, request: Request) -> None:
        """Answer one request, whatever happens; count and log it."""
        service = self.service
        service.active += 1
        endpoint: Endpoint | None = None
        try:
            request.response_headers += self._cors(request)
            if request.method == "OPTIONS" and request.header(b"access-control-request-method"):
                await request.respond(Response(b"", status=204, headers=_preflight(request)))
                return
            endpoint = self._find(request)
            await self._answer(endpoint, request)
        except ClientDisconnectedError:
            request.status = CLIENT_CLOSED
        except TrineError as error:
            await self._fail(request, error)
        except Exception:
            logger.exception("an endpoint failed", extra={"request_id": request.id, "path": request.path})
            message = f"an error of the service itself; its log says more under request id {request.id}"
            await self._fail(request, TrineError(message, code="internal_error"))
        finally:
            service.active -= 1
            self._account(endpoint, request)

    async def _answer(self, endpoint: Endpoint, request: Request) -> None:
        service = self.service
        if endpoint.needs_key and self._keys:
            self._check_key(request)
        if endpoint.inference:
            if service.draining:
                service.check_ready()
            _check_content_type(request)
            request.response_headers += service.limit_headers()
            key = request.header(b"idempotency-key")
            if key is not None:
                await self._idempotency.run(key, service, endpoint.handler, request)
                return
        response = await endpoint.handler(service, request)
        if response is not None:
            await request.respond(response)

    def _find(self, request: Request) -> Endpoint:
        methods = self._exact.get(request.path)
        if methods is None:
            for prefix, candidates in self._by_prefix:
                if request.path.startswith(prefix) and len(request.path) > len(prefix):
                    methods = candidates
        if methods is None:
            raise NotFoundError(
                f"there is nothing at {request.method} {request.path}: /docs lists what is there", code="unknown_url"
            )
        method = "GET" if request.method == "HEAD" else request.method
        endpoint = methods.get(method)
        if endpoint is None:
            allowed = ", ".join(methods)
            raise MethodNotAllowedError(f"{request.path} does not take {method}: use {allowed}", allowed=allowed)
        return endpoint

    def _check_key(self, request: Request) -> None:
        scheme, _, token = (request.header(b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise AuthenticationError(
                "no API key was given: send it as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        given = token.strip().encode("latin-1")
        # Every key is compared, in constant time, so that the time taken tells nothing.
        if not any([hmac.compare_digest(given, key) for key in self._keys]):  # noqa: C419
            raise AuthenticationError("the API key is not known to this service")

    def _cors(self, request: Request) -> Headers:
        origin = request.header(b"origin")
        if not self._origins or origin is None:
            return []
        if "*" in self._origins:
            allowed = b"*"
        elif origin in self._origins:
            allowed = origin.encode("latin-1")
        else:
            return []
        return [
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"origin"),
        ]

    async def _fail(self, request: Request, error: TrineError) -> None:
        request.failure = error
        if request.started:
            return  # the endpoint has said what it could
        await request.respond(Response(error_body(error), status=error.status, headers=error_headers(error)))

    def _account(self, endpoint: Endpoint | None, request: Request) -> None:
        """One count and one line for the whole request."""
        service = self.service
        status = request.failure.status if request.failure is not None else request.status
        path = endpoint.path if endpoint is not None else "other"
        service.metrics.http.labels(service.model_name or "", path, str(status)).inc()
        # Probes and scrapes come every few seconds: they are worth a line only when looking closely.
        level = logging.DEBUG if endpoint is not None and endpoint.tag == "Management" else logging.INFO
        if not service.settings.access_log or not logger.isEnabledFor(level):
            return
        notes = dict(request.notes)
        if request.failure is not None:
            notes["error"] = request.failure.message
        seconds = time.monotonic() - request.arrival
        logger.log(
            level,
            "%s %s %d in %.3f s",
            request.method,
            request.path,
            status,
            seconds,
            extra={"request_id": request.id, **notes},
        )


def _check_content_type(request: Request) -> None:
    content_type = request.header(b"content-type")
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"content-type {kind!r} is not understood: send JSON with 'Content-Type: application/json'"
        )


def _preflight(request: Request) -> Headers:
    """What a browser asks before it calls from another origin; without an allowed origin it means nothing."""
    asked = request.header(b"access-control-request-headers") or "authorization, content-type"
    return [
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (b"access-control-allow-headers", asked.encode("latin-1")),
        (b"access-control-max-age", b"600"),
    ]


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
