"""The dynamic batcher: requests that arrived while the instances were busy, or within a delay, are computed together.

Models without `dynamic_batching` use it too, with one request a batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

from trine.server.answers import Answers
from trine.server.errors import Code, ServerError
from trine.server.instances import Batch, InstancePool
from trine.server.request import InferRequest
from trine.server.scheduling.queue import RequestQueue

ModelConfig = Any

_ALONE_AGAIN = 4  # requests in a row that were the only one: then nothing is gained by doing something else meanwhile
_TURN_NS = 2_000_000  # computing in the event loop, a model gives others a turn after so long

ALONE = "computed alone: the model does not batch"
FREE = "an instance was free: what waited went at once"
FULL = "the batch was full"
PREFERRED = "a preferred batch size was reached"
DELAY = "the queue delay had passed"
DIFFERS = "the next request in the queue does not fit into the batch (rows, shapes or inputs)"


class DynamicScheduler:
    """Queue and batch forming of one model. Everything runs in the event loop's thread."""

    def __init__(self, config: ModelConfig, pool: InstancePool, answers: Answers, *, signed: bool) -> None:
        batching = config.dynamic_batching if config.HasField("dynamic_batching") else None
        self._pool = pool
        self._answers = answers
        self._loop = pool.bridge.loop
        self._signed = signed
        self._max_rows: int = config.max_batch_size if batching is not None and config.max_batch_size else 0
        self._delay_ns: int = batching.max_queue_delay_microseconds * 1000 if batching is not None else 0
        preferred = set(batching.preferred_batch_size) if batching is not None else set()
        self._preferred: frozenset[int] = frozenset(preferred)
        self._largest_preferred = max(preferred, default=self._max_rows)
        self._waits = bool(self._max_rows) and (self._delay_ns > 0 or self._preferred != {self._max_rows})
        self._queue = RequestQueue(batching)
        self._simple = self._queue.plain and not self._waits
        self._pump_soon = False
        self._alone = 0
        self._delay_timer: asyncio.TimerHandle | None = None
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._expiry_ns = 0
        self._ordered = batching is not None and batching.preserve_ordering
        if self._ordered:
            from trine.server.scheduling.ordering import InOrder

            order = InOrder(answers)
            self._finish: Callable[[Batch], None] = order.finish
            self._started: Callable[[Batch], None] | None = order.started
            pool.deliver = order.deliver
        else:
            self._finish = answers.finish
            self._started = None
            pool.deliver = answers.deliver
        pool.finish = self._finish
        pool.on_free = self._pump

    def __len__(self) -> int:
        return len(self._queue)

    def enqueue(self, request: InferRequest) -> None:
        """Take a checked request. ServerError (UNAVAILABLE) where the queue is full."""
        queue = self._queue
        if queue.plain:
            queue.only.append(request)
        elif not queue.put(request):
            for gone in queue.take_cancelled():
                self._answers.drop_cancelled(gone)
            if not queue.put(request):
                raise ServerError(
                    f"[request id: {request.id or '<id_unknown>'}] Exceeds maximum queue size", Code.UNAVAILABLE
                )
        self._answers.accept()
        if request.expires_ns and (not self._expiry_ns or request.expires_ns < self._expiry_ns):
            self._watch_expiry(request.expires_ns)
        if not self._pump_soon:
            self._pump_soon = True
            self._loop.call_soon(self._pump_now)

    def reject_all(self, error: ServerError) -> None:
        """Answer everything that waits with an error."""
        for request in self._queue.take_all():
            self._answers.reject(request, error)

    def _pump_now(self) -> None:
        self._pump_soon = False
        self._pump()
        if self._answers.open != 1:
            self._alone = 0
        elif self._alone < _ALONE_AGAIN:
            self._alone += 1
        else:
            self._pool.linger()

    def _pump(self) -> None:
        """Start what can be started now."""
        pool = self._pool
        began = 0
        while self._queue.only or len(self._queue):
            idle = pool.idle
            if not idle and not (self._simple and pool.takes_full() and self._full_batch_waits()):
                return
            batch = self._form_simply() if self._simple else self._form()
            if batch is None:
                return
            if self._started is not None:
                self._started(batch)
            if not idle:
                pool.run_next(batch)
                continue
            pool.run(batch)
            if not began:
                began = batch.start_ns or 1
            elif batch.end_ns - began > _TURN_NS and began > 1:
                self._pump_later()
                return

    def _pump_later(self) -> None:
        if not self._pump_soon:
            self._pump_soon = True
            self._loop.call_soon(self._pump_now)

    def _full_batch_waits(self) -> bool:
        """Whether waiting could not make the next batch any larger. Requests have a row at least."""
        return bool(self._max_rows) and len(self._queue.only) >= self._max_rows

    def _form_simply(self) -> Batch | None:
        """The first requests of the only queue, as many as fit."""
        queue = self._queue.only
        limit = self._max_rows
        requests: list[InferRequest] = []
        rows = 0
        why = FREE
        signature: object = None
        while queue:
            request = queue[0]
            if request.cancelled:
                self._answers.drop_cancelled(queue.popleft())
                continue
            if requests:
                if rows + request.batch_size > limit:
                    why = FULL if rows == limit else DIFFERS
                    break
                if self._signed and request.signature != signature:
                    why = DIFFERS
                    break
            elif self._signed:
                signature = request.signature
            requests.append(queue.popleft())
            rows += request.batch_size
            if not limit:
                why = ALONE
                break
        return Batch(requests, rows, why) if requests else None

    def _form(self) -> Batch | None:
        """A batch under preferred sizes, delay, priorities and timeouts; None: not yet, a timer is set."""
        now = monotonic_ns()
        self._drop(now)
        prefix: list[InferRequest] = []
        rows = best = 0
        closed = FULL
        limit = self._max_rows or 1
        for request in self._queue:
            if prefix and not self._max_rows:
                closed = ALONE
                break
            if prefix and rows + request.batch_size > limit:
                closed = FULL if rows == limit else DIFFERS
                break
            if prefix and self._signed and request.signature != prefix[0].signature:
                closed = DIFFERS
                break
            prefix.append(request)
            rows += request.batch_size
            if rows in self._preferred:
                best = len(prefix)
        else:
            closed = FULL if rows >= limit else ""
        if not prefix:
            return None
        return self._decide(now, prefix, rows, best, closed)

    def _decide(self, now: int, prefix: list[InferRequest], rows: int, best: int, closed: str) -> Batch | None:
        if not self._max_rows:
            return self._take(len(prefix), ALONE)
        if best and self._waits:
            return self._take(best, PREFERRED)
        oldest = min([request.queued_ns for request in prefix])
        if closed or rows >= self._largest_preferred:
            return self._take(len(prefix), closed or FULL)
        if not self._delay_ns:
            return self._take(len(prefix), FREE)
        if now - oldest >= self._delay_ns:
            return self._take(len(prefix), DELAY)
        if self._delay_timer is None:
            self._delay_timer = self._loop.call_later((oldest + self._delay_ns - now) / 1e9, self._delay_passed)
        return None

    def _take(self, count: int, why: str) -> Batch:
        if self._delay_timer is not None:
            self._delay_timer.cancel()
            self._delay_timer = None
        requests = [self._queue.popleft() for _ in range(count)]
        return Batch(requests, sum([request.batch_size for request in requests]), why)

    def _delay_passed(self) -> None:
        self._delay_timer = None
        self._pump()

    def _drop(self, now: int) -> None:
        """Answer what is cancelled or out of time."""
        if any(request.cancelled for request in self._queue):
            for request in self._queue.take_cancelled():
                self._answers.drop_cancelled(request)
        if self._expiry_ns and self._expiry_ns <= now:
            for request in self._queue.take_expired(now):
                self._answers.reject(request, ServerError("Request timeout expired", Code.UNAVAILABLE))
            self._expiry_ns = 0

    def _watch_expiry(self, expires_ns: int) -> None:
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        self._expiry_ns = expires_ns
        delay = max(0, expires_ns - monotonic_ns()) / 1e9
        self._expiry_timer = self._loop.call_later(delay, self._expired)

    def _expired(self) -> None:
        self._expiry_timer = None
        self._drop(monotonic_ns())
        expires = self._queue.next_expiry()
        if expires:
            self._watch_expiry(expires)
        else:
            self._expiry_ns = 0
