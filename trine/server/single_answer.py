"""Requests that take one response, whatever protocol they came by."""

from __future__ import annotations

from trine.server.errors import Code, ServerError
from trine.server.request import InferResponse


class SingleAnswer:
    """Holds back a request's response until its final one says that there is no other."""

    __slots__ = ("_done", "_response")

    def __init__(self) -> None:
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
