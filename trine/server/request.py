"""What every protocol makes of a request, and what every back end answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

from trine.server.errors import ServerError
from trine.server.tensors import Tensor

Parameter = bool | int | float | str


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output asked for by name; `classification` > 0: its so many largest values, as Triton's strings."""

    name: str
    classification: int = 0


class InferResponse:
    """One answer. A request gets any number of them, the last of which is `final`; an empty final one only ends it."""

    __slots__ = ("error", "final", "model_name", "model_version", "outputs", "parameters")

    def __init__(
        self,
        outputs: Sequence[Tensor] = (),
        *,
        error: ServerError | None = None,
        final: bool = True,
        parameters: dict[str, Parameter] | None = None,
        model_name: str = "",
        model_version: str = "",
    ) -> None:
        self.outputs = outputs
        self.error = error
        self.final = final
        self.parameters = parameters
        self.model_name = model_name
        self.model_version = model_version

    @property
    def is_empty(self) -> bool:
        return not self.outputs and self.error is None


class InferRequest:
    """A request on its way through the server. It belongs to the event loop's thread, back ends read it from others.

    respond      called in the event loop's thread with each response, in order; never after a final one
    cancelled    set by `cancel`; queues drop the request, back ends may look at it between steps
    deadline_ns  monotonic time past which nobody waits, or None
    sequence_id  0 or "": not part of a sequence
    batch_size   rows of the first dimension where the model batches, else 1; set when the request is checked
    queued_ns, started_ns, computed_ns …: monotonic times that statistics and traces are made of
    """

    __slots__ = (
        "batch_size",
        "cancelled",
        "compute_end_ns",
        "compute_input_end_ns",
        "compute_output_start_ns",
        "compute_start_ns",
        "context",
        "deadline_ns",
        "done",
        "expires_ns",
        "id",
        "inputs",
        "internal",
        "model_name",
        "model_version",
        "on_cancel",
        "outputs",
        "parameters",
        "priority",
        "queued_ns",
        "received_ns",
        "reschedule",
        "respond",
        "responses",
        "responses_ns",
        "sequence_end",
        "sequence_id",
        "sequence_start",
        "signature",
        "timeout_us",
        "trace",
    )

    def __init__(
        self,
        model_name: str,
        inputs: dict[str, Tensor],
        respond: Callable[[InferResponse], None],
        *,
        model_version: str = "",
        id: str = "",
        outputs: Sequence[RequestedOutput] | None = None,
        parameters: dict[str, Parameter] | None = None,
        priority: int = 0,
        timeout_us: int = 0,
        sequence_id: int | str = 0,
        sequence_start: bool = False,
        sequence_end: bool = False,
        deadline_ns: int | None = None,
    ) -> None:
        self.model_name = model_name
        self.model_version = model_version
        self.id = id
        self.inputs = inputs
        self.outputs = outputs  # None: all
        self.parameters = parameters if parameters is not None else {}
        self.priority = priority
        self.timeout_us = timeout_us
        self.sequence_id = sequence_id
        self.sequence_start = sequence_start
        self.sequence_end = sequence_end
        self.deadline_ns = deadline_ns
        self.respond = respond
        self.cancelled = False
        self.internal = False  # made by a running request of this server: served while the server stops
        self.done = False  # the final response was handed over
        self.responses = 0  # handed over so far, of a decoupled model
        self.responses_ns = 0  # when the last of them was
        self.expires_ns = 0  # when the queue's policy gives up on it; 0: never
        self.signature: object = None  # requests of one batch have equal ones: the shapes that vary
        self.reschedule: Callable[[], None] | None = None
        """Where a model may ask for a further turn (iterative_sequence): to be called before its batch is over."""
        self.on_cancel: Callable[[], None] | None = None  # set by whoever holds the request now
        self.batch_size = 1
        self.trace: Any = None
        self.context: dict[str, str] | None = None  # headers to forward: traceparent, tenant …
        self.received_ns = monotonic_ns()
        self.queued_ns = 0
        self.compute_start_ns = 0
        self.compute_input_end_ns = 0
        self.compute_output_start_ns = 0
        self.compute_end_ns = 0

    def cancel(self) -> None:
        """The client is gone or called it off: idempotent, in the event loop's thread."""
        if not self.cancelled:
            self.cancelled = True
            if self.on_cancel is not None:
                self.on_cancel()

    def fail(self, error: ServerError) -> None:
        """Answer with an error, the final response."""
        self.respond(InferResponse(error=error, model_name=self.model_name, model_version=self.model_version))
