"""What comes out of a model: responses handed over, counted, and remembered for `trine explain`."""

from __future__ import annotations

import logging
from time import monotonic_ns, time_ns

from trine.server.assembly import Assembler
from trine.server.errors import Code, ServerError
from trine.server.instances import Batch
from trine.server.journal import Journal
from trine.server.request import InferRequest, InferResponse
from trine.server.statistics import BACKEND, CANCELED, OTHER, REJECTED, ModelStatistics

logger = logging.getLogger("trine.server")


class Answers:
    """Answers the requests of one version of one model. All of it runs in the event loop's thread."""

    def __init__(
        self, name: str, version: str, assembler: Assembler, statistics: ModelStatistics, journal: Journal
    ) -> None:
        self.name = name
        self.version = version
        self.assembler = assembler
        self.statistics = statistics
        self.journal = journal
        self.decoupled = False
        self.open = 0
        """Requests accepted and not yet answered for good."""

    def accept(self) -> None:
        self.open += 1
        self.statistics.pending += 1

    def begin(self) -> None:
        """A request is accepted and does not wait."""
        self.open += 1

    def finish(self, batch: Batch) -> None:
        """A batch was computed: cut its outputs apart, answer, count."""
        if batch.outputs is None and batch.error is None:
            self._finish_requests(batch)
            return
        answers = None
        if batch.error is None:
            assert batch.outputs is not None
            try:
                answers = self.assembler.scatter(batch.requests, batch.rows, batch.outputs)
            except ServerError as error:
                batch.error = error
        if batch.error is not None:
            self._fail_batch(batch, batch.error)
            return
        assert answers is not None
        now = batch.end_ns = monotonic_ns()
        self._count(batch, batch.requests, now)
        name, version = self.name, self.version
        for request, outputs in zip(batch.requests, answers, strict=True):
            request.done = True
            try:
                request.respond(InferResponse(outputs, model_name=name, model_version=version))
            except Exception:
                logger.exception("a response of model %s can't be handed over", name)
        batch.outputs = None
        self.journal.record(self, batch)

    def _count(self, batch: Batch, requests: list[InferRequest], now: int) -> None:
        """Statistics of an execution whose requests are all answered."""
        statistics = self.statistics
        size = len(requests)
        start = batch.start_ns
        input_ns = batch.input_end_ns - start
        infer_ns = batch.output_start_ns - batch.input_end_ns
        output_ns = now - batch.output_start_ns
        total_ns = queue_ns = 0
        add, add_queue = statistics.latency.add, statistics.queue_latency.add
        for request in requests:
            took, waited = now - request.received_ns, start - request.queued_ns
            total_ns += took
            queue_ns += waited
            add(took)
            add_queue(waited)
            if request.trace is not None:
                mark(request, batch, now)
        statistics.pending -= size
        self.open -= size
        statistics.executed(batch.rows, input_ns, infer_ns, output_ns)
        statistics.succeeded(size, total_ns, queue_ns, input_ns, infer_ns, output_ns)

    def _finish_requests(self, batch: Batch) -> None:
        """An instance that answers by itself has returned; what it has not answered yet comes later."""
        statistics = self.statistics
        input_ns = batch.input_end_ns - batch.start_ns
        infer_ns = batch.output_start_ns - batch.input_end_ns
        output_ns = batch.end_ns - batch.output_start_ns
        statistics.pending -= batch.size
        for request in batch.requests:
            if request.trace is not None:
                mark(request, batch, batch.end_ns)
            queue_ns = batch.start_ns - request.queued_ns
            statistics.queue.add(queue_ns)
            statistics.queue_latency.add(queue_ns)
            statistics.compute_input.add(input_ns)
            statistics.compute_infer.add(infer_ns)
            statistics.compute_output.add(output_ns)
        statistics.executed(batch.rows, input_ns, infer_ns, output_ns)
        self.journal.record(self, batch)

    def deliver(self, request: InferRequest, response: InferResponse) -> None:
        """A response of an instance that answers by itself."""
        if request.done:
            return
        response.model_name, response.model_version = self.name, self.version
        if self.decoupled:
            self._count_response(request, response)
        if response.final:
            request.done = True
            self.open -= 1
            took = monotonic_ns() - request.received_ns
            if response.error is not None:
                self.statistics.failed(took, CANCELED if response.error.error_code is Code.CANCELLED else BACKEND)
            else:
                self.statistics.success.add(took)
                self.statistics.latency.add(took)
                self.statistics.last_inference_ms = time_ns() // 1_000_000
        request.respond(response)

    def _count_response(self, request: InferRequest, response: InferResponse) -> None:
        """One of the responses of a decoupled model: by its index, with the time since the one before."""
        now = monotonic_ns()
        statistics = self.statistics
        counted = statistics.response(request.responses)
        took = now - (request.responses_ns or request.queued_ns)
        if response.error is not None:
            cancelled = response.error.error_code is Code.CANCELLED
            (counted.cancel if cancelled else counted.fail).add(took)
        elif response.is_empty:
            counted.empty_response.add(took)
        else:
            counted.success.add(took)
            counted.compute_infer.add(took)
            counted.compute_output.add(0)
        if not request.responses:
            statistics.first_response.add(now - request.received_ns)
        request.responses += 1
        request.responses_ns = now

    def _fail_batch(self, batch: Batch, error: ServerError) -> None:
        self.statistics.pending -= batch.size
        for request in batch.requests:
            if not request.done:
                self._fail(request, error, BACKEND)
        batch.outputs = None
        self.journal.record(self, batch)

    def reject(self, request: InferRequest, error: ServerError, reason: str = REJECTED) -> None:
        """Answer a request that waited and is not going to be computed."""
        self.statistics.pending -= 1
        self.journal.refused(self.name, self.version, request, error.message)
        self._fail(request, error, reason)

    def drop_cancelled(self, request: InferRequest) -> None:
        """A request that waited is not wanted any more."""
        self.reject(request, ServerError("Request cancelled", Code.CANCELLED), CANCELED)

    def end(self, request: InferRequest, response: InferResponse) -> None:
        """The final response of a request that was begun: not of an execution of this model's own."""
        request.done = True
        self.open -= 1
        took = monotonic_ns() - request.received_ns
        statistics = self.statistics
        if response.error is None:
            statistics.executed(request.batch_size, 0, monotonic_ns() - request.queued_ns, 0)
            statistics.succeeded(1, took, 0, 0, monotonic_ns() - request.queued_ns, 0)
            statistics.latency.add(took)
            statistics.queue_latency.add(0)
        elif response.error.error_code is Code.CANCELLED:
            statistics.failed(took, CANCELED)
        else:
            statistics.failed(took, OTHER)
            statistics.failures[OTHER] += 1  # Triton counts an ensemble's failure twice, and dashboards divide by two
        response.model_name, response.model_version = self.name, self.version
        self._hand_over(request, response)

    def send(self, request: InferRequest, response: InferResponse) -> None:
        """One of several responses, not the final one."""
        response.model_name, response.model_version = self.name, self.version
        self._hand_over(request, response)

    def _hand_over(self, request: InferRequest, response: InferResponse) -> None:
        try:
            request.respond(response)
        except Exception:
            logger.exception("a response of model %s can't be handed over", self.name)

    def _fail(self, request: InferRequest, error: ServerError, reason: str) -> None:
        request.done = True
        self.open -= 1
        self.statistics.failed(monotonic_ns() - request.received_ns, reason)
        self._hand_over(request, InferResponse(error=error, model_name=self.name, model_version=self.version))


def mark(request: InferRequest, batch: Batch, end_ns: int) -> None:
    """The times of its batch, for the request's trace."""
    request.compute_start_ns = batch.start_ns
    request.compute_input_end_ns = batch.input_end_ns
    request.compute_output_start_ns = batch.output_start_ns
    request.compute_end_ns = end_ns
