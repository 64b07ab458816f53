"""What calls of every protocol share: the end of a trace, and the one response of those that take one."""

from __future__ import annotations

from typing import Any

from trine.server.errors import Code, ServerError
from trine.server.request import InferRequest, InferResponse


class TracedCall:
    """Finishes the trace of a request. A request that has none is not held: it holds its call already."""

    __slots__ = ("_traced",)

    def __init__(self) -> None:
        self._traced: InferRequest | None = None

    def trace(self, request: InferRequest) -> None:
        """Called once the request is made, before it is submitted."""
        if request.trace is not None:
            self._traced = request

    def finish_trace(self, traces: Any) -> None:
        """The answer has been given."""
        request, self._traced = self._traced, None
        if request is not None:
            traces.finish(request)


class SingleAnswer(TracedCall):
    """Holds back a request's response until its final one says that there is no other."""

    __slots__ = ("_done", "_response")

    def __init__(self) -> None:
        super().__init__()
        self._response: InferResponse | None = None
        self._done = False

    def collect(self, response: InferResponse) -> InferResponse | None:
        """The answer, once: with the final response or the first error. A second response with content is an error."""
        if self._done:
            return None
        if not response.is_empty:
            if self._response is not None and response.error is None:
                error = ServerError("the model gave more than one response to a request that takes one", Code.INTERNAL)
                response = InferResponse(error=error)
            self._response = response
        if not response.final and response.error is None:
            return None
        self._done = True
        return self._response or response
