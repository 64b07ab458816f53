"""Errors as OpenAI's clients know them: a status, headers and `{"error": {...}}`."""

from __future__ import annotations

import math

import msgspec

from trine.core.errors import (
    ConfigurationError,
    EngineDeadError,
    NotFoundError,
    OverloadedError,
    RequestError,
    TrineError,
)
from trine.service.asgi import Headers
from trine.service.openai.structs.base import ErrorDetail, ErrorResponse

RETRY_SECONDS = 1.0
"""What a client is told to wait when the service is starting, restarting or about to end."""


class AuthenticationError(RequestError):
    """No key, or one that is not known."""

    status = 401
    code = "invalid_api_key"


class MethodNotAllowedError(RequestError):
    """The path is there, but not for this method. `allowed` goes into the `Allow` header."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class UnavailableError(TrineError):
    """The service does not take requests at the moment: starting, restarting or draining."""

    status = 503
    code = "service_unavailable"


class UnsupportedMediaTypeError(RequestError):
    """A body that does not say that it is JSON."""

    status = 400
    code = "unsupported_content_type"


def error_body(error: TrineError) -> bytes:
    """The JSON body of an error."""
    kind = "server_error" if isinstance(error, ConfigurationError) else error.kind
    return msgspec.json.encode(
        ErrorResponse(error=ErrorDetail(message=error.message, type=kind, param=error.param, code=error.code))
    )


def error_headers(error: TrineError) -> Headers:
    """`Retry-After` where trying again makes sense, `Allow`, `WWW-Authenticate`."""
    if isinstance(error, OverloadedError):
        return retry_headers(error.retry_after)
    if isinstance(error, (EngineDeadError, UnavailableError)):
        return retry_headers(RETRY_SECONDS)
    if isinstance(error, MethodNotAllowedError):
        return [(b"allow", error.allowed.encode())]
    if isinstance(error, AuthenticationError):
        return [(b"www-authenticate", b"Bearer")]
    return []


def retry_headers(seconds: float) -> Headers:
    """Whole seconds for HTTP, milliseconds for OpenAI's clients."""
    return [
        (b"retry-after", str(max(1, math.ceil(seconds))).encode()),
        (b"retry-after-ms", str(max(1, round(seconds * 1000))).encode()),
    ]


def unknown_model(name: str, served: list[str]) -> NotFoundError:
    names = ", ".join(served) or "none yet"
    return NotFoundError(
        f"the model {name!r} does not exist here: this service has {names}", param="model", code="model_not_found"
    )
