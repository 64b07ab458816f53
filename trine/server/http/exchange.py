"""One HTTP request and the way to answer it, whatever carried it here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import msgspec

from trine.core.errors import TrineError

Buffer = bytes | memoryview
HeaderBlock = tuple[tuple[bytes, bytes], ...]
"""Headers of an answer, without its length. The same block again and again costs nothing: carriers remember it."""

JSON: HeaderBlock = ((b"Content-Type", b"application/json"),)
TEXT: HeaderBlock = ((b"Content-Type", b"text/plain"),)
EVENTS: HeaderBlock = (
    (b"Content-Type", b"text/event-stream; charset=utf-8"),
    (b"Cache-Control", b"no-cache"),
    (b"X-Accel-Buffering", b"no"),
)
_NOTHING: tuple[Buffer, ...] = ()


class Exchange(ABC):
    """A request with its whole body. It is answered once: by `respond`, or by `begin`, `write` …, `end`.

    headers        names in lower case; of several with one name the first
    on_disconnect  called when the client hangs up before its answer is complete
    """

    __slots__ = ("body", "headers", "method", "on_disconnect", "path")

    def __init__(self, method: str, path: str, headers: dict[bytes, bytes], body: Buffer) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.on_disconnect: Callable[[], None] | None = None

    @abstractmethod
    def respond(self, status: int, headers: HeaderBlock = JSON, parts: Sequence[Buffer] = _NOTHING) -> None:
        """The whole answer; the body is the parts one after the other."""

    @abstractmethod
    def begin(self, status: int, headers: HeaderBlock) -> None:
        """The head of an answer whose length nobody knows yet."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """The next piece, at once."""

    @abstractmethod
    def end(self) -> None:
        """The answer is complete."""

    def respond_json(self, value: object, status: int = 200) -> None:
        self.respond(status, JSON, (msgspec.json.encode(value),))

    def respond_error(self, error: TrineError, headers: HeaderBlock = JSON) -> None:
        """`{"error": …}` under the error's status."""
        self.respond(error.status, headers, (error_body(error.message),))


def error_body(message: str) -> bytes:
    """The protocol's error object. Whatever a client sent can be quoted in it."""
    return msgspec.json.encode({"error": message.encode("utf-8", "replace").decode()})
