"""What `trine explain REQUEST-ID` knows: the last requests with an id, and how each was batched or why refused."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING

from trine.server.instances import Batch
from trine.server.request import InferRequest

if TYPE_CHECKING:
    from trine.server.answers import Answers


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of the past. Times on the monotonic clock, in nanoseconds; `batch` is None where it was refused."""

    id: str
    model: str
    version: str
    rows: int
    received_ns: int
    queued_ns: int
    batch: Batch | None
    refusal: str = ""
    ended_ns: int = 0


class Journal:
    """The last `size` requests with an id, over all models."""

    def __init__(self, size: int = 4096) -> None:
        self._entries: deque[Entry] = deque(maxlen=size)
        self._clock_offset_ns = time_ns() - monotonic_ns()

    def record(self, answers: Answers, batch: Batch) -> None:
        """Remember the requests of a batch that was computed; the batch lets go of them."""
        for request in batch.requests:
            if request.id:
                self._entries.append(
                    Entry(
                        request.id,
                        answers.name,
                        answers.version,
                        request.batch_size,
                        request.received_ns,
                        request.queued_ns,
                        batch,
                    )
                )
        batch.requests = []

    def refused(self, model: str, version: str, request: InferRequest, reason: str) -> None:
        """Remember a request that was not computed."""
        if request.id:
            rows, received, queued = request.batch_size, request.received_ns, request.queued_ns
            self._entries.append(
                Entry(request.id, model, version, rows, received, queued, None, reason, monotonic_ns())
            )

    def find(self, request_id: str) -> list[dict[str, object]]:
        """What happened to the requests of this id, newest last: plain values, times in microseconds."""
        return [self._explain(entry) for entry in self._entries if entry.id == request_id]

    def _explain(self, entry: Entry) -> dict[str, object]:
        explained: dict[str, object] = {
            "request_id": entry.id,
            "model": entry.model,
            "version": entry.version,
            "received": (entry.received_ns + self._clock_offset_ns) / 1e9,
            "rows": entry.rows,
        }
        batch = entry.batch
        if batch is None:
            waited = (entry.ended_ns - entry.queued_ns) / 1e3 if entry.queued_ns else 0.0
            total = (entry.ended_ns - entry.received_ns) / 1e3
            return explained | {"computed": False, "waited_us": waited, "total_us": total, "error": entry.refusal}
        return explained | {
            "computed": True,
            "waited_us": (batch.start_ns - entry.queued_ns) / 1e3,
            "waited_for": batch.why,
            "batch_requests": batch.size,
            "batch_rows": batch.rows,
            "instance": batch.instance,
            "input_us": (batch.input_end_ns - batch.start_ns) / 1e3,
            "infer_us": (batch.output_start_ns - batch.input_end_ns) / 1e3,
            "output_us": (batch.end_ns - batch.output_start_ns) / 1e3,
            "total_us": (batch.end_ns - entry.received_ns) / 1e3,
            "error": batch.error.message if batch.error is not None else None,
        }
