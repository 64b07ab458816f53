"""Instances of a model: each computes one batch at a time, in a thread of its own.

A batch whose computation takes less than handing it to another thread does is computed in the event loop instead.
While all instances are busy, full batches lie ready for whichever is done first: it goes on without waiting for the
event loop's turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from time import monotonic_ns

from trine.server.assembly import Assembler
from trine.server.backends.base import AsyncInstance, BatchInstance, Device, RequestInstance, Respond
from trine.server.bridge import LoopBridge
from trine.server.errors import Code, ServerError
from trine.server.request import InferRequest, InferResponse
from trine.server.scheduling.rate_limiter import Claim, RateLimiter
from trine.server.tensors import Array

logger = logging.getLogger("trine.server")

Instance = BatchInstance | RequestInstance | AsyncInstance

_INLINE_NS = 200_000  # computations that take less than this run in the event loop
_TOO_LONG_NS = 1_000_000  # if more than one in nine takes this long there, the next _PROBATION go to a thread
_TOO_LONG_WEIGHT, _TOO_LONG_LIMIT = 8, 24
_PROBATION = 256
_JOIN_SECONDS = 30  # an instance that is closed may go on computing for so long
_SHORT_NS = 20_000_000  # batches wait at one asynchronous instance only if it computes in less
_FIRST_IN_THREAD = 4  # the first executions allocate and tune: they don't count


class Batch:
    """What an instance computes at once, and when it did."""

    __slots__ = (
        "end_ns",
        "error",
        "input_end_ns",
        "instance",
        "output_start_ns",
        "outputs",
        "requests",
        "rows",
        "size",
        "start_ns",
        "why",
    )

    def __init__(self, requests: list[InferRequest], rows: int, why: str) -> None:
        self.requests = requests
        self.size = len(requests)
        self.rows = rows
        self.why = why
        self.start_ns = 0
        self.input_end_ns = 0
        self.output_start_ns = 0
        self.end_ns = 0
        self.outputs: dict[str, Array] | None = None
        self.error: ServerError | None = None
        self.instance = ""


class Worker:
    """One instance with its thread, which starts when it is first needed."""

    def __init__(
        self, name: str, device: Device, instance: Instance, pool: InstancePool, claim: Claim | None = None
    ) -> None:
        self.name = name
        self.device = device
        self.instance = instance
        self.outstanding = 0
        self.retired = False
        self.claim = claim
        self.immediate: bool = getattr(instance, "immediate", False)
        self._pool = pool
        self._inbox: SimpleQueue[Batch | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.on_requests = hasattr(instance, "execute_requests")
        self._begin: Callable[..., None] | None = getattr(instance, "begin", None)
        self._beginning = False
        self.is_async = self._begin is not None
        self.unbounded: bool = getattr(instance, "unbounded", False)
        self.linger: Callable[[], None] | None = getattr(instance, "linger", None)

    async def ask_ready(self) -> bool:
        """Whether the instance would serve a request now, where it can tell."""
        return not self.is_async or await self.instance.is_ready()  # type: ignore[union-attr]

    async def compute_aside(self, batch: Batch, respond: Respond) -> None:
        """Compute a batch that no client has sent, while nothing else is computed here; returns when it is over."""
        if self._begin is None:
            await asyncio.to_thread(self.compute, batch, respond)
            return
        over = asyncio.Event()

        def done(input_end_ns: int, output_start_ns: int) -> None:
            over.set()

        self._begin(batch.requests, respond, done)
        await over.wait()

    async def start(self) -> None:
        """Start an instance that is asynchronous itself."""
        if self._begin is not None:
            await self.instance.start()  # type: ignore[union-attr]

    def hand(self, batch: Batch) -> None:
        """Compute where the instance does: in its thread, or wherever an asynchronous one does it."""
        if self._begin is not None:
            batch.start_ns = batch.input_end_ns = monotonic_ns()
            batch.instance = self.name
            self._beginning = True
            try:
                self._begin(batch.requests, self._pool.deliver, partial(self._done, batch))
            finally:
                self._beginning = False
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()
        self._inbox.put(batch)

    def _run(self) -> None:
        pool = self._pool
        while (batch := self._inbox.get()) is not None:
            following: Batch | None = batch
            while following is not None:
                batch = following
                self.compute(batch, pool.respond)
                following = pool.next_ready()
                if following is None:
                    pool.bridge.post(pool.finished, self, batch)
                else:
                    pool.bridge.post(pool.went_on, self, batch)
            del batch  # its tensors would live until the next one

    def _done(self, batch: Batch, input_end_ns: int, output_start_ns: int) -> None:
        """An asynchronous instance is done with a batch."""
        batch.input_end_ns, batch.output_start_ns = input_end_ns, output_start_ns
        batch.end_ns = monotonic_ns()
        # While a batch is only being begun, whoever began it looks for the next one itself.
        self._pool.finished(self, batch, look_on=not self._beginning)

    def compute(self, batch: Batch, respond: Respond) -> None:
        """Runs the instance; what goes wrong becomes the batch's error."""
        batch.start_ns = monotonic_ns()
        batch.instance = self.name
        try:
            if self.on_requests:
                self._compute_requests(batch, respond)
            else:
                self._compute_batch(batch)
        except ServerError as error:
            batch.error = error
        except Exception as error:
            logger.exception("model %s: instance %s failed", self._pool.assembler.model_name, self.name)
            batch.error = ServerError(f"{type(error).__name__}: {error}", Code.INTERNAL)
        batch.end_ns = monotonic_ns()

    def _compute_batch(self, batch: Batch) -> None:
        assembler = self._pool.assembler
        requests = batch.requests
        inputs = assembler.gather(requests)
        batch.input_end_ns = monotonic_ns()
        batch.outputs = self.instance.execute(inputs, assembler.wanted(requests))  # type: ignore[union-attr]
        batch.output_start_ns = monotonic_ns()

    def _compute_requests(self, batch: Batch, respond: Respond) -> None:
        batch.input_end_ns = batch.start_ns
        self.instance.execute_requests(batch.requests, respond)  # type: ignore[union-attr]
        batch.output_start_ns = monotonic_ns()

    async def close(self) -> None:
        """End the instance, once it has computed what it has."""
        try:
            if self._begin is not None:
                await self.instance.close()  # type: ignore[misc]
            else:
                await asyncio.to_thread(self._close)
        except Exception:
            logger.exception("instance %s can't be closed", self.name)

    def _close(self) -> None:
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join(_JOIN_SECONDS)
            if self._thread.is_alive():
                logger.error("instance %s still computes after %d s: it is left to itself", self.name, _JOIN_SECONDS)
                return
        self.instance.close()


class InstancePool:
    """The instances of a model. `finish` gets each batch that was computed, `on_free` is called before it."""

    def __init__(self, assembler: Assembler, bridge: LoopBridge, limiter: RateLimiter | None = None) -> None:
        self.assembler = assembler
        self.bridge = bridge
        self.workers: list[Worker] = []
        self.finish: Callable[[Batch], None] = _nobody
        self.deliver: Callable[[InferRequest, InferResponse], None] = _nobody_delivers
        self.on_free: Callable[[], None] = _nothing
        self.ahead = limiter is None
        """Whether a full batch may wait at a busy instance."""
        self._limiter = limiter
        self._idle: list[Worker] = []
        self._ready: deque[Batch] = deque()
        self._loop_thread = threading.get_ident()
        self._recent_ns = _INLINE_NS
        self._executions = 0
        self._too_long = 0
        self._probation = 0

    def add(self, worker: Worker) -> None:
        self.workers.append(worker)
        self._idle.append(worker)

    def retire(self, worker: Worker) -> None:
        """Take an instance out; whoever calls closes it once it has nothing left to do."""
        worker.retired = True
        self.workers.remove(worker)
        if self._limiter is not None and worker.claim is not None:
            self._limiter.release_claim(worker.claim)
        if worker in self._idle:
            self._idle.remove(worker)

    @property
    def idle(self) -> bool:
        """Whether an instance can begin a batch now; where one lacks resources, it is woken when there are some."""
        if self._limiter is None or not self._idle:
            return bool(self._idle)
        if self._permitted() is not None:
            return True
        self._limiter.wait(self)
        return False

    def may_run(self, worker: Worker) -> bool:
        """Whether this idle instance can begin a batch now; where it lacks resources, the pool is woken later."""
        if self._limiter is None or worker.claim is None or self._limiter.available(worker.claim):
            return True
        self._limiter.wait(self)
        return False

    @property
    def turns(self) -> int:
        """How often the pool's idle instances have had their turn, weighted by priority."""
        claims = [worker.claim for worker in self._idle if worker.claim is not None]
        return min((claim.executions * claim.priority for claim in claims), default=0)

    def _permitted(self) -> Worker | None:
        """The idle instance whose turn it is, of those with resources at hand."""
        assert self._limiter is not None
        able = [worker for worker in self._idle if worker.claim is None or self._limiter.available(worker.claim)]
        return min(
            able,
            key=lambda worker: worker.claim.executions * worker.claim.priority if worker.claim else 0,
            default=None,
        )

    def takes_full(self) -> bool:
        """Whether a full batch may be made ready while all instances are busy."""
        if not self.ahead or not self.workers:
            return False
        if self.workers[0].is_async:
            return self._recent_ns < _SHORT_NS and any(worker.outstanding == 1 for worker in self.workers)
        return len(self._ready) < len(self.workers)

    def run_next(self, batch: Batch) -> None:
        """Compute a full batch on the instance that is done first."""
        if self.workers[0].is_async:
            worker = next(worker for worker in self.workers if worker.outstanding == 1)
            worker.outstanding += 1
            worker.hand(batch)
        else:
            self._ready.append(batch)

    def linger(self) -> None:
        """Nothing else waits: a batch in another process that will be over at once may be waited for."""
        for worker in self.workers:
            if worker.linger is not None and worker.outstanding == 1:
                worker.linger()

    def next_ready(self) -> Batch | None:
        """A batch that lies ready; called by instances' threads too."""
        try:
            return self._ready.popleft()
        except IndexError:
            return None

    def went_on(self, worker: Worker, batch: Batch) -> None:
        """A thread has computed a batch and goes on with one that lay ready."""
        self._learn(batch, inline=False)
        self.on_free()
        self.finish(batch)

    def run(self, batch: Batch, worker: Worker | None = None) -> None:
        """Compute on `worker`, or on an idle instance: there must be one."""
        if self._limiter is not None:
            worker = self._take_permitted(worker)
        elif worker is None:
            worker = self._idle.pop()
        elif worker in self._idle:
            self._idle.remove(worker)
        worker.outstanding += 1
        if worker.outstanding == 1 and self._inline(worker):
            worker.compute(batch, self.respond)
            worker.outstanding = 0
            if not worker.retired:
                self._idle.append(worker)
            self._learn(batch, inline=True)
            self.finish(batch)
        else:
            worker.hand(batch)
            if worker.unbounded and not worker.retired:
                self._idle.append(worker)

    def _take_permitted(self, worker: Worker | None) -> Worker:
        assert self._limiter is not None
        worker = worker or self._permitted()
        assert worker is not None, "the pool was not idle"
        self._idle.remove(worker)
        if worker.claim is not None:
            self._limiter.take(worker.claim)
        return worker

    def finished(self, worker: Worker, batch: Batch, *, look_on: bool = True) -> None:
        """A batch is computed: the instance's next one goes first, then this one's answers."""
        worker.outstanding -= 1
        if worker.outstanding == 0 and not worker.unbounded:
            following = self.next_ready()  # made ready just after the thread had looked
            if following is not None:
                worker.outstanding = 1
                worker.hand(following)
            elif not worker.retired:
                self._idle.append(worker)
        self._learn(batch, inline=False)
        if self._limiter is None:
            if look_on:
                self.on_free()
        else:
            if worker.claim is not None:
                self._limiter.give_back(worker.claim)
            self._limiter.wake(self)
        self.finish(batch)

    def respond(self, request: InferRequest, response: InferResponse) -> None:
        """What instances that compute on requests call, from any thread."""
        if threading.get_ident() == self._loop_thread:
            self.deliver(request, response)
        else:
            self.bridge.post(self.deliver, request, response)

    def expect_as(self, before: InstancePool) -> None:
        """Begin with what another pool has learnt of how long computing takes: that of the model served before."""
        self._recent_ns, self._executions = before._recent_ns, before._executions

    def _inline(self, worker: Worker) -> bool:
        if self._limiter is not None:
            return False
        if worker.immediate or worker.on_requests or worker.is_async:
            return worker.immediate
        if self._probation:
            self._probation -= 1
            return False
        return self._recent_ns < _INLINE_NS and self._executions >= _FIRST_IN_THREAD

    def _learn(self, batch: Batch, *, inline: bool) -> None:
        """Keep an estimate of how long computing takes, near its upper third: pauses of the machine hardly move it."""
        took = batch.end_ns - batch.start_ns
        self._executions += 1
        if self._executions <= _FIRST_IN_THREAD:
            return
        recent = self._recent_ns
        self._recent_ns = min(recent * 5 // 4 + 1, 1 << 40) if took > recent else recent * 9 // 10
        if not inline:
            return
        if took <= _TOO_LONG_NS:
            self._too_long -= self._too_long > 0
            return
        self._too_long += _TOO_LONG_WEIGHT
        if self._too_long > _TOO_LONG_LIMIT:
            self._too_long = 0
            self._probation = _PROBATION


def _nobody(batch: Batch) -> None:
    raise AssertionError("the pool has no scheduler")


def _nobody_delivers(request: InferRequest, response: InferResponse) -> None:
    raise AssertionError("the pool has no scheduler")


def _nothing() -> None:
    return None
