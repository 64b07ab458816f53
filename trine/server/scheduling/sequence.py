"""The sequence batcher: requests of one sequence go to one instance, one after the other.

direct   a sequence has a slot, a fixed row of its instance's batches, from its start to its end
oldest   an instance has candidates; a batch holds the next request of those that have waited longest

Sequences without a slot wait in the backlog. Everything runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from itertools import count
from pathlib import Path
from time import monotonic_ns
from typing import Any

from trine.server.answers import Answers
from trine.server.errors import Code, ServerError
from trine.server.instances import Batch, InstancePool, Worker
from trine.server.request import InferRequest, InferResponse
from trine.server.scheduling.controls import Controls, States, filler, same_shapes
from trine.server.tensors import Tensor
from trine.server.validation import InputSpec

ModelConfig = Any
SequenceId = int | str

_SLOTS = "the next request of each sequence that has one, by slot"
_OLDEST = "the sequences that had waited longest"


class Sequence:
    """One sequence: its waiting requests, its place, its state."""

    __slots__ = ("deadline_ns", "ending", "id", "last_ns", "place", "running", "slot", "state", "waiting")

    def __init__(self, sequence_id: SequenceId, state: dict[str, Tensor]) -> None:
        self.id = sequence_id
        self.state = state
        self.waiting: deque[InferRequest] = deque()
        self.running: InferRequest | None = None
        self.place: Place | None = None
        self.slot = 0
        self.ending = False  # its END request has come
        self.last_ns = 0
        self.deadline_ns = 0  # in the backlog: when the first of its requests has waited too long


class Place:
    """An instance and the sequences on it; direct: by slot, oldest: any."""

    __slots__ = ("slots", "timer", "worker")

    def __init__(self, worker: Worker, size: int) -> None:
        self.worker = worker
        self.slots: list[Sequence | None] = [None] * size
        self.timer: asyncio.TimerHandle | None = None

    @property
    def taken(self) -> int:
        return sum(sequence is not None for sequence in self.slots)


class SequenceScheduler:
    """Sequences of one model, their slots and their backlog."""

    decoupled = False

    def __init__(
        self,
        config: ModelConfig,
        pool: InstancePool,
        answers: Answers,
        specs: dict[str, InputSpec],
        directory: Path | None,
    ) -> None:
        batching = config.sequence_batching
        self._pool = pool
        self._answers = answers
        self._loop = pool.bridge.loop
        self._name: str = config.name
        self._rows = max(1, config.max_batch_size)
        self._batches = config.max_batch_size > 0
        self._oldest = batching.HasField("oldest")
        strategy = batching.oldest if self._oldest else batching.direct
        self._delay_ns: int = strategy.max_queue_delay_microseconds * 1000
        self._minimum: float = 0.0 if self._oldest else strategy.minimum_slot_utilization
        self._preferred = sorted(strategy.preferred_batch_size) if self._oldest else []
        self._per_place = (strategy.max_candidate_sequences or self._rows) if self._oldest else self._rows
        self._idle_ns: int = batching.max_sequence_idle_microseconds * 1000
        self._controls = Controls(config)
        self._states = States(config, directory)
        pool.assembler.also_wanted = self._states.outputs
        self._inputs = list(specs)
        self._places: dict[Worker, Place] = {}
        self._sequences: dict[SequenceId, Sequence] = {}
        self._backlog: deque[Sequence] = deque()
        self._ghosts: set[Sequence] = set()
        """Sequences whose END has come but is not computed yet: their id may start anew."""
        self._iterative: bool = batching.iterative_sequence
        self._own_ids = count(1)
        self._again: set[int] = set()
        """Requests, by id(), whose model has asked for a further turn."""
        self._pump_soon = False
        self._reaper: asyncio.TimerHandle | None = None
        self.predecessor: SequenceScheduler | None = None
        """That of the model whose place this one took: sequences that began there end there."""
        self.leaving = False
        self._ordered = self._oldest and strategy.preserve_ordering
        pool.ahead = False
        pool.finish = self._finish
        pool.deliver = answers.deliver
        pool.on_free = self._wake

    def __len__(self) -> int:
        return sum(len(sequence.waiting) for sequence in self._all())

    @property
    def has_sequences(self) -> bool:
        """Whether a sequence has begun here and not ended: one that is idle for too long ends by itself."""
        return bool(self._sequences)

    def _all(self) -> list[Sequence]:
        return [*self._sequences.values(), *self._ghosts]

    # Requests

    def enqueue(self, request: InferRequest) -> None:
        """Take a request into its sequence. ServerError: not part of a sequence, or of one that has not started."""
        if self._iterative:
            self._make_sequence(request)
        key = request.sequence_id
        if request.batch_size > 1:
            raise ServerError(
                f"inference request to model '{self._name}' must specify batch-size 1 due to requirements of sequence "
                "batcher"
            )
        if not key:
            raise ServerError(
                f"inference request to model '{self._name}' must specify a non-zero or non-empty correlation ID"
            )
        self._check_id(request)
        sequence = self._sequences.get(key)
        if sequence is None and not request.sequence_start:
            if self.predecessor is not None and key in self.predecessor._sequences:
                self.predecessor.enqueue(request)
                return
            raise ServerError(
                f"inference request for sequence {key} to model '{self._name}' must specify the START flag on the "
                "first request of the sequence"
            )
        if sequence is None:
            sequence = self._sequences[key] = Sequence(key, self._states.initial())
            self._settle_in(sequence)
        sequence.last_ns = request.queued_ns
        sequence.waiting.append(request)
        self._answers.accept()
        if sequence.place is None and request.timeout_us:
            expires = request.queued_ns + request.timeout_us * 1000
            sequence.deadline_ns = min(sequence.deadline_ns or expires, expires)
        if request.sequence_end:
            sequence.ending = True
            del self._sequences[key]
            self._ghosts.add(sequence)
        self._watch()
        self._wake()

    def _make_sequence(self, request: InferRequest) -> None:
        """iterative_sequence: each request is a sequence of its own, however many turns it takes."""
        request.sequence_start = request.sequence_end = True
        if not request.sequence_id or request.sequence_id in self._sequences:
            request.sequence_id = f"{next(self._own_ids)}" if self._id_is_text else next(self._own_ids)
        request.reschedule = partial(self._again.add, id(request))

    @property
    def _id_is_text(self) -> bool:
        return self._controls.correlation is not None and self._controls.correlation[1] == "BYTES"

    def _check_id(self, request: InferRequest) -> None:
        if self._controls.correlation is None:
            return
        name, datatype = self._controls.correlation
        is_text = isinstance(request.sequence_id, str)
        if is_text != (datatype == "BYTES"):
            raise ServerError(
                f"[request id: {request.id or '<id_unknown>'}] sequence batching control '{name}' data-type is "
                f"'{'BYTES' if is_text else 'UINT64'}', but model '{self._name}' expects '{datatype}'"
            )

    def reject_all(self, error: ServerError) -> None:
        """Answer everything that waits with an error; sequences end."""
        for sequence in self._all():
            self._abandon(sequence, error)
        if self._reaper is not None:
            self._reaper.cancel()

    # Places

    def _settle_in(self, sequence: Sequence) -> bool:
        """Give the sequence a place where one is free, else a turn in the backlog."""
        best: Place | None = None
        for worker in self._pool.workers:
            place = self._places.get(worker)
            if place is None:
                place = self._places[worker] = Place(worker, self._per_place)
            if place.taken < self._per_place and (best is None or place.taken < best.taken):
                best = place
        if best is None:
            if sequence not in self._backlog:
                self._backlog.append(sequence)
            return False
        sequence.place = best
        sequence.slot = best.slots.index(None)
        best.slots[sequence.slot] = sequence
        sequence.deadline_ns = 0
        return True

    def _leave(self, sequence: Sequence) -> None:
        """The sequence is over: its place goes to the first in the backlog."""
        if self._sequences.get(sequence.id) is sequence:
            del self._sequences[sequence.id]
        self._ghosts.discard(sequence)
        if sequence in self._backlog:
            self._backlog.remove(sequence)
        if sequence.place is not None:
            sequence.place.slots[sequence.slot] = None
            if sequence.place.worker.retired and not sequence.place.taken:
                self._places.pop(sequence.place.worker, None)
            sequence.place = None
            while self._backlog and self._settle_in(self._backlog[0]):
                self._backlog.popleft()

    def _abandon(self, sequence: Sequence, error: ServerError) -> None:
        """End a sequence before its end: what waits gets an error."""
        waiting, sequence.waiting = list(sequence.waiting), deque()
        if sequence.running is None:
            self._leave(sequence)
        else:
            sequence.ending = True
        for request in waiting:
            if error.error_code is Code.CANCELLED:
                self._answers.drop_cancelled(request)
            else:
                self._answers.reject(request, error)

    # Batches

    def _wake(self) -> None:
        if not self._pump_soon:
            self._pump_soon = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_soon = False
        self._drop_cancelled()
        for place in list(self._places.values()):
            if place.worker.outstanding == 0 and self._pool.may_run(place.worker):
                requests = self._form_oldest(place) if self._oldest else self._form_direct(place)
                if requests:
                    self._run(place, requests)

    def _drop_cancelled(self) -> None:
        """A request that is not wanted any more ends its sequence."""
        for sequence in self._all():
            if any(request.cancelled for request in sequence.waiting):
                self._abandon(sequence, ServerError("Request cancelled", Code.CANCELLED))

    def _ready(self, place: Place) -> list[Sequence]:
        """The sequences of a place that have something to compute and are not computing."""
        return [s for s in place.slots if s is not None and s.waiting and s.running is None]

    def _form_direct(self, place: Place) -> list[InferRequest]:
        """The next request of every slot up to the last used one; empty slots compute on zeros."""
        ready = self._ready(place)
        if not ready or self._defers(place, ready):
            return []
        first = ready[0].waiting[0]
        ready = [s for s in ready if same_shapes(s.waiting[0], first, self._inputs)]
        if not self._batches:
            return [self._next(ready[0])]
        by_slot = {sequence.slot: sequence for sequence in ready}
        blank: dict[str, Tensor] | None = None
        requests = []
        for slot in range(max(by_slot) + 1):
            if slot in by_slot:
                requests.append(self._next(by_slot[slot]))
            else:
                blank = blank or filler(first.inputs, self._inputs)
                requests.append(self._empty(dict(blank)))
        return requests

    def _defers(self, place: Place, ready: list[Sequence]) -> bool:
        """Whether to wait for more slots: a timer then looks again."""
        if not self._minimum or len(ready) / self._rows >= self._minimum:
            return False
        return self._waits(place, min(sequence.waiting[0].queued_ns for sequence in ready))

    def _waits(self, place: Place, oldest_ns: int) -> bool:
        left = oldest_ns + self._delay_ns - monotonic_ns()
        if left <= 0:
            return False
        if place.timer is None:
            place.timer = self._loop.call_later(left / 1e9, self._look_again, place)
        return True

    def _look_again(self, place: Place) -> None:
        place.timer = None
        self._pump()

    def _form_oldest(self, place: Place) -> list[InferRequest]:
        """The next requests of the sequences that have waited longest, as many as fit."""
        ready = sorted(self._ready(place), key=lambda sequence: sequence.waiting[0].queued_ns)
        if not ready:
            return []
        first = ready[0].waiting[0]
        fitting = [s for s in ready if same_shapes(s.waiting[0], first, self._inputs)][: self._rows]
        reached = [size for size in self._preferred if size <= len(fitting)]
        if not reached and self._delay_ns and len(fitting) < self._rows:
            if self._waits(place, first.queued_ns):
                return []
        elif reached and reached[-1] != self._rows and len(self._preferred) > 1:
            fitting = fitting[: reached[-1]]
        return [self._next(sequence) for sequence in fitting]

    def _next(self, sequence: Sequence) -> InferRequest:
        """Take the sequence's next request, with controls and state."""
        request = sequence.waiting.popleft()
        sequence.running = request
        if request.sequence_start:
            sequence.state = self._states.initial()
        inputs = dict(request.inputs)
        self._controls.apply(
            inputs, start=request.sequence_start, ready=True, end=request.sequence_end, sequence=sequence.id
        )
        inputs.update(sequence.state)
        request.inputs = inputs
        return request

    def _empty(self, inputs: dict[str, Tensor]) -> InferRequest:
        """What an empty slot computes on: nobody gets the answer."""
        request = InferRequest(self._name, inputs, _ignore)
        request.done = True
        self._controls.apply(inputs, start=False, ready=False, end=False, sequence=0)
        inputs.update(self._states.initial())
        return request

    def _run(self, place: Place, requests: list[InferRequest]) -> None:
        if place.timer is not None:
            place.timer.cancel()
            place.timer = None
        self._pool.run(Batch(requests, len(requests), _OLDEST if self._oldest else _SLOTS), place.worker)

    def _finish(self, batch: Batch) -> None:
        """A batch is computed: keep the states, let go of what was nobody's, answer, go on."""
        computed = {id(request): row for row, request in enumerate(batch.requests)}
        ran = [s for s in self._all() if s.running is not None and id(s.running) in computed]
        if self._states and batch.outputs is not None:
            for sequence in ran:
                sequence.state = self._states.after(batch.outputs, computed[id(sequence.running)])
        _without_empty(batch, computed)
        self._answers.finish(batch)
        now = monotonic_ns()
        for sequence in ran:
            if sequence.running is not None and id(sequence.running) in self._again:
                self._put_back(sequence, sequence.running)
            sequence.running = None
            sequence.last_ns = now
            if sequence.ending and not sequence.waiting:
                self._leave(sequence)
        self._wake()

    def _put_back(self, sequence: Sequence, request: InferRequest) -> None:
        """The model wants another turn with this request."""
        self._again.discard(id(request))
        if request.done:
            return
        request.sequence_start = False
        request.queued_ns = monotonic_ns()
        self._answers.statistics.pending += 1
        sequence.waiting.appendleft(request)

    # Time

    def _watch(self) -> None:
        if self._reaper is None:
            self._reaper = self._loop.call_later(min(self._idle_ns / 4e9, 0.1), self._reap)

    def _reap(self) -> None:
        """End sequences that were idle for too long, and those whose turn in the backlog did not come in time."""
        self._reaper = None
        now = monotonic_ns()
        for sequence in list(self._sequences.values()):
            if not sequence.waiting and sequence.running is None and now - sequence.last_ns > self._idle_ns:
                self._leave(sequence)
                self._wake()
        for sequence in list(self._backlog):
            if 0 < sequence.deadline_ns <= now:
                expired = "timeout of the corresponding sequence has been expired"
                self._abandon(sequence, ServerError(expired, Code.UNAVAILABLE))
        if self._sequences or self._ghosts:
            self._watch()


def _without_empty(batch: Batch, rows: dict[int, int]) -> None:
    """Take the rows of empty slots out of a batch that was computed."""
    real = [request for request in batch.requests if request.respond is not _ignore]
    if len(real) == len(batch.requests):
        return
    kept = [rows[id(request)] for request in real]
    if batch.outputs is not None:
        batch.outputs = {
            name: array[kept] if array.ndim and array.shape[0] == batch.rows else array
            for name, array in batch.outputs.items()
        }
    batch.requests, batch.size, batch.rows = real, len(real), len(real)


def _ignore(response: InferResponse) -> None:
    """The answer of an empty slot."""
