"""Errors a user can act on.

Every error that Trine raises on purpose is a `TrineError`. Its message names the key, the value, what was expected
and what to do; `status` is the HTTP status that the protocols answer with, `param` the offending field if there is one.
"""

from __future__ import annotations


class TrineError(Exception):
    """Base of Trine's errors. `status` is an HTTP status code, `kind` OpenAI's error type, `code` its error code."""

    status = 500
    kind = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ConfigurationError(TrineError):
    """A setting (command line, file, keyword argument) that can't be right."""

    status = 400
    kind = "configuration_error"


class ModelLoadError(TrineError):
    """A checkpoint that can't be loaded: files missing, weights missing or unused, unknown architecture."""


class InsufficientMemoryError(TrineError):
    """The model or its cache does not fit; the message says what would."""


class RequestError(TrineError):
    """A request that can't be served as it is: the client must change it."""

    status = 400
    kind = "invalid_request_error"


class NotFoundError(RequestError):
    """A model, file or endpoint that is not there."""

    status = 404


class OverloadedError(TrineError):
    """The queue is full: try again after `retry_after` seconds."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceededError(TrineError):
    """The request's deadline passed before it was done."""

    status = 504
    kind = "timeout_error"
    code = "deadline_exceeded"


class EngineDeadError(TrineError):
    """The engine's process ended or failed while the request was in it. A retry may succeed."""

    status = 503
    kind = "server_error"
    code = "engine_unavailable"
