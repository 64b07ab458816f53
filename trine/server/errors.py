"""Errors of the inference server: what the KServe v2 protocol's two transports answer with."""

from __future__ import annotations

import logging
from enum import Enum

from trine.core.errors import TrineError

logger = logging.getLogger("trine.server")


class Code(Enum):
    """Triton's error codes: HTTP status and gRPC status code of each."""

    UNKNOWN = (400, 2)
    INVALID_ARGUMENT = (400, 3)
    ALREADY_EXISTS = (400, 6)
    CANCELLED = (400, 1)
    NOT_FOUND = (404, 5)
    INTERNAL = (500, 13)
    UNSUPPORTED = (501, 12)
    UNAVAILABLE = (503, 14)

    @property
    def http_status(self) -> int:
        return self.value[0]

    @property
    def grpc_status(self) -> int:
        return self.value[1]


class ServerError(TrineError):
    """What the server refuses or fails at; `error_code` decides the status on each protocol."""

    def __init__(self, message: str, error_code: Code = Code.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.error_code = error_code
        self.status = error_code.http_status


def answerable(error: Exception) -> TrineError:
    """An error that a client can be told: a mistake of the server's own goes to its log, and is INTERNAL."""
    if isinstance(error, TrineError):
        return error
    logger.error("a request could not be answered", exc_info=error)
    return ServerError(f"an error of the server itself ({type(error).__name__}); its log says more", Code.INTERNAL)
