"""What goes wrong in a model, as its author sees and raises it."""

from __future__ import annotations

import traceback
from enum import IntEnum


class TritonModelException(Exception):  # noqa: N818 - the name is the interface
    """Raised by models, and by this module's functions when they are misused."""


class ErrorCode(IntEnum):
    """Triton's error codes."""

    UNKNOWN = 0
    INTERNAL = 1
    NOT_FOUND = 2
    INVALID_ARG = 3
    UNAVAILABLE = 4
    UNSUPPORTED = 5
    ALREADY_EXISTS = 6
    CANCELLED = 7


class TritonError:
    """An error in place of a response's tensors."""

    UNKNOWN = ErrorCode.UNKNOWN
    INTERNAL = ErrorCode.INTERNAL
    NOT_FOUND = ErrorCode.NOT_FOUND
    INVALID_ARG = ErrorCode.INVALID_ARG
    UNAVAILABLE = ErrorCode.UNAVAILABLE
    UNSUPPORTED = ErrorCode.UNSUPPORTED
    ALREADY_EXISTS = ErrorCode.ALREADY_EXISTS
    CANCELLED = ErrorCode.CANCELLED

    def __init__(self, message: str, code: int = ErrorCode.INTERNAL) -> None:
        self._message = str(message)
        self._code = ErrorCode(code)

    def message(self) -> str:
        return self._message

    def code(self) -> ErrorCode:
        return self._code


def describe(error: BaseException) -> str:
    """An exception as one text: its type, its message, and the lines of the model that it came from."""
    lines = [f"{type(error).__name__}: {error}"]
    frames = [
        f"  {frame.filename}({frame.lineno}): {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "/trine/server/backends/python/" not in frame.filename and not frame.filename.startswith("<frozen")
    ]
    if frames:
        lines += ["", "At:", *reversed(frames)]
    return "\n".join(lines)
