"""In front of a scheduler: requests whose answer is in the response cache don't reach it."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns, time_ns

from trine.server.errors import ServerError
from trine.server.request import InferRequest, InferResponse
from trine.server.scheduling.response_cache import ResponseCache, request_key
from trine.server.statistics import REJECTED, ModelStatistics
from trine.server.tensors import Tensor


class CachedAnswers:
    """Looks requests up, and stores the answers of those that were not found."""

    def __init__(
        self,
        cache: ResponseCache,
        name: str,
        version: str,
        statistics: ModelStatistics,
        enqueue: Callable[[InferRequest], None],
    ) -> None:
        self._cache = cache
        self._name = name
        self._version = version
        self._statistics = statistics
        self._enqueue = enqueue

    def enqueue(self, request: InferRequest) -> None:
        began = monotonic_ns()
        key = request_key(self._name, self._version, request)
        failed: list[ServerError] = []
        returned = False

        def found(outputs: list[Tensor] | None) -> None:
            took = monotonic_ns() - began
            if outputs is not None:
                self._answer(request, outputs, took)
                return
            self._store_answer(request, key, took)
            try:
                self._enqueue(request)
            except ServerError as error:
                if returned:  # the look-up took its time: nobody above is left to raise to
                    self._statistics.failed(monotonic_ns() - request.received_ns, REJECTED)
                    request.fail(error)
                else:
                    failed.append(error)

        self._cache.look_up(key, found)
        returned = True
        if failed:
            raise failed[0]

    def _answer(self, request: InferRequest, outputs: list[Tensor], took: int) -> None:
        now = monotonic_ns()
        statistics = self._statistics
        statistics.cache_hit.add(took)
        statistics.queue.add(max(0, now - took - request.queued_ns))
        statistics.success.add(now - request.received_ns)
        statistics.latency.add(now - request.received_ns)
        statistics.last_inference_ms = time_ns() // 1_000_000
        request.done = True
        request.respond(InferResponse(outputs, model_name=self._name, model_version=self._version))

    def _store_answer(self, request: InferRequest, key: bytes, look_up_ns: int) -> None:
        respond = request.respond

        def store_and_respond(response: InferResponse) -> None:
            if response.error is None and response.final:
                began = monotonic_ns()
                self._cache.insert(key, response.outputs)
                self._statistics.cache_miss.add(look_up_ns + monotonic_ns() - began)
            respond(response)

        request.respond = store_and_respond
