"""Requests, responses and their senders, in the interface of Triton's models."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Any

from trine.server.backends.python import wire
from trine.server.backends.python.memory import Lease
from trine.server.backends.python.stub import connection as wires
from trine.server.backends.python.stub.errors import ErrorCode, TritonError, TritonModelException
from trine.server.backends.python.stub.tensors import Tensor

SEQUENCE_START, SEQUENCE_END = 1, 2
COMPLETE_FINAL = 1
RELEASE_ALL, RELEASE_RESCHEDULE = 1, 2
_ABANDONED = "the model dropped the request without its final response"
_PARAMETER_TYPES = (bool, int, float, str)


class MemoryType(IntEnum):
    """Where a tensor lies."""

    TRITONSERVER_MEMORY_CPU = 0
    TRITONSERVER_MEMORY_GPU = 2


class PreferredMemory:
    """Where the answer of a call to another model should lie. Tensors come in shared memory on the CPU in any case."""

    def __init__(self, preferred_memory_type: MemoryType, preferred_device_id: int = 0) -> None:
        self.preferred_memory_type = preferred_memory_type
        self.preferred_device_id = preferred_device_id


class InferenceTrace:
    """The trace that a request belongs to."""

    def __init__(self, context: str | None = None) -> None:
        self._context = context

    def get_context(self) -> str | None:
        """The context to continue the trace with, as JSON (traceparent, tracestate)."""
        return self._context


def checked_parameters(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of a request's or response's parameters; TritonModelException for what they can't hold."""
    if parameters is None:
        return {}
    for name, value in parameters.items():
        if not isinstance(name, str):
            raise TritonModelException("Expect parameters keys to have type str, found type " + type(name).__name__)
        if not isinstance(value, _PARAMETER_TYPES):
            raise TritonModelException(
                f"Expect parameters values to have type bool/int/float/str, found type '{type(value).__name__}'"
            )
    return dict(parameters)


class InferenceResponse:
    """Tensors, or an error, and parameters."""

    __slots__ = ("_error", "_parameters", "_tensors")

    def __init__(
        self,
        output_tensors: Iterable[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self._tensors = list(output_tensors)
        for tensor in self._tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"output_tensors: expected pb_utils.Tensor, got {type(tensor).__name__}")
        self._error = error
        self._parameters = checked_parameters(parameters) if parameters else {}

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        """The parameters as JSON."""
        return json.dumps(self._parameters)

    def _pack(self, packer: wire.Packer, requested: Collection[str] | None) -> tuple[Any, ...]:
        """The response as it is sent, without the requested outputs' content, which goes to `packer`."""
        if self._error is not None:
            return [], (int(self._error.code()), self._error.message()), self._parameters or None
        entries = [tensor._pack(packer) for tensor in self._tensors if requested is None or tensor._name in requested]
        return entries, None, self._parameters or None

    @classmethod
    def _of_message(cls, message: tuple[Any, ...], content: Lease | bytearray) -> InferenceResponse:
        entries, error, parameters = message
        return cls(
            [Tensor._of_entry(entry, content) for entry in entries],
            None if error is None else TritonError(error[1], error[0]),
            parameters,
        )


class InferenceResponseSender:
    """Answers one request, from any thread, also after `execute` has returned."""

    __slots__ = ("_closed", "_decoupled", "_lock", "_requested", "_sent", "_slot")

    def __init__(self, slot: int, requested: frozenset[str] | None, decoupled: bool) -> None:
        self._slot = slot
        self._requested = requested
        self._decoupled = decoupled
        self._lock = threading.Lock()
        self._sent = 0
        self._closed = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """Send a response. TRITONSERVER_RESPONSE_COMPLETE_FINAL, with a response or without, ends the request."""
        if flags not in (0, COMPLETE_FINAL):
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if response is None and not flags:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        final = bool(flags)
        packer = wire.Packer()
        message = None if response is None else response._pack(packer, self._requested)
        with self._lock:
            self._count(response is not None, final)
            wires.connection.send_packed(packer, lambda block: (wire.RESPONSE, self._slot, block, message, final))

    def is_cancelled(self) -> bool:
        """Whether the client called the request off or hung up."""
        return not self._closed and wires.connection.is_cancelled(self._slot)

    def _count(self, has_response: bool, final: bool) -> None:
        if self._closed:
            raise TritonModelException("Unable to send response. Response sender has been closed.")
        if not self._decoupled:
            if has_response and self._sent:
                raise TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send more than one response."
                )
            if not has_response and final and not self._sent:
                raise TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send complete final before sending a response."
                )
        self._sent += 1
        self._closed = final

    def _close(self) -> None:
        """End it without sending anything."""
        with self._lock:
            self._closed = True

    def __del__(self) -> None:
        if not self._closed:  # nobody can answer any more
            error = (int(ErrorCode.INTERNAL), _ABANDONED)
            wires.connection.send_from_destructor(wire.RESPONSE, self._slot, wire.NO_BLOCK, ([], error, None), True)


class InferenceRequest:
    """A request to this model, or one that this model makes of another."""

    __slots__ = (
        "_context",
        "_correlation_id",
        "_flags",
        "_id",
        "_inputs",
        "_model",
        "_model_name",
        "_model_version",
        "_parameters",
        "_preferred_memory",
        "_release_flags",
        "_requested",
        "_sender",
        "_slot",
        "_timeout",
    )

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Iterable[Tensor] = (),
        requested_output_names: Iterable[str] = (),
        model_name: str | bytes = "",
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: InferenceTrace | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        """timeout is in microseconds, 0 for none; model_version -1 is the one that the version policy chooses."""
        if not isinstance(correlation_id, int | str):
            raise TritonModelException("Correlation ID must be integer or string")
        self._id = str(request_id)
        self._correlation_id = correlation_id
        self._inputs = list(inputs)
        for tensor in self._inputs:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"inputs: expected pb_utils.Tensor, got {type(tensor).__name__}")
        self._requested: list[str] | None = [_text(name) for name in requested_output_names]
        self._model_name = _text(model_name)
        self._model_version = int(model_version)
        self._flags = int(flags)
        self._timeout = int(timeout)
        self._preferred_memory = preferred_memory
        self._context = None if trace is None else trace.get_context()
        self._parameters = checked_parameters(parameters)
        self._release_flags = RELEASE_ALL
        self._sender: InferenceResponseSender | None = None
        self._slot = -1
        self._model: ModelIdentity | None = None

    @classmethod
    def _of_message(
        cls, message: tuple[Any, ...], content: Lease | bytearray, model: ModelIdentity
    ) -> InferenceRequest:
        """A request to this model. What models seldom ask for is made when they do."""
        request = cls.__new__(cls)
        (
            request._slot,
            request._id,
            request._correlation_id,
            request._flags,
            request._timeout,
            request._parameters,
            request._requested,
            request._context,
            inputs,
        ) = message
        request._inputs = [Tensor._of_entry(entry, content) for entry in inputs]
        request._model = model
        request._release_flags = RELEASE_ALL
        request._sender = None
        return request

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._id

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def flags(self) -> int:
        return self._flags

    def set_flags(self, flags: int) -> None:
        self._flags = int(flags)

    def timeout(self) -> int:
        """Microseconds, 0 for none."""
        return self._timeout

    def parameters(self) -> str:
        """The parameters as JSON."""
        return json.dumps(self._parameters or {})

    def requested_output_names(self) -> list[str]:
        if self._requested is None and self._model is not None:
            return list(self._model.outputs)
        return list(self._requested or ())

    def model_name(self) -> str:
        return self._model_name if self._model is None else self._model.name

    def model_version(self) -> int:
        return self._model_version if self._model is None else self._model.version

    def preferred_memory(self) -> PreferredMemory | None:
        return self._preferred_memory if self._model is None else None

    def trace(self) -> InferenceTrace:
        return InferenceTrace(self._context)

    def get_response_sender(self) -> InferenceResponseSender:
        if self._sender is None:
            if self._model is None:
                raise TritonModelException("only a request that came to this model has a response sender")
            names = None if self._requested is None else frozenset(self._requested)
            self._sender = InferenceResponseSender(self._slot, names, self._model.decoupled)
        return self._sender

    def is_cancelled(self) -> bool:
        """Whether the client called the request off or hung up."""
        if self._sender is not None:
            return self._sender.is_cancelled()
        return self._model is not None and wires.connection.is_cancelled(self._slot)

    def _answer(self, response: InferenceResponse, packer: wire.Packer) -> tuple[Any, ...]:
        """What to send of the response that `execute` returned; its sender is closed."""
        if self._sender is not None:
            self._sender._count(True, True)
        return response._pack(packer, self._requested)

    def _abandon(self) -> None:
        """`execute` has returned nothing for the request: without a sender nobody will answer it."""
        if self._sender is None:
            self.get_response_sender()  # which goes unused, and says so

    def set_release_flags(self, flags: int) -> None:
        """TRITONSERVER_REQUEST_RELEASE_RESCHEDULE: execute this request again in a later batch."""
        if flags not in (RELEASE_ALL, RELEASE_RESCHEDULE):
            raise TritonModelException(f"unknown request release flags {flags}")
        self._release_flags = int(flags)

    def exec(self, decoupled: bool = False) -> InferenceResponse | ResponseIterator:
        """Have another model execute this request, and wait. decoupled: an iterator over any number of responses."""
        responses = self._begin(decoupled)
        return responses if decoupled else next(responses)

    def async_exec(self, decoupled: bool = False) -> asyncio.Future[Any]:
        """As `exec`, for `await`. With decoupled, the iterator comes with the first response."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        responses = self._begin(decoupled)

        def settle() -> None:
            if not future.done():
                future.set_result(responses if decoupled else next(responses))

        responses._when_ready(lambda: loop.call_soon_threadsafe(settle))
        return future

    def _begin(self, decoupled: bool) -> ResponseIterator:
        connection = wires.connection
        if not connection.accepts_bls:
            raise TritonModelException("BLS is only supported during the 'execute' function.")
        responses = ResponseIterator()
        details = (
            self._model_name,
            self._model_version,
            self._id,
            self._correlation_id,
            self._flags,
            self._timeout,
            self._parameters or None,
            self._requested or None,
            self._context,
            decoupled,
        )
        packer = wire.Packer()
        entries = [tensor._pack(packer) for tensor in self._inputs]
        connection.send_packed(packer, lambda block: (wire.BLS, responses._call, block, details, entries))
        return responses


class ModelIdentity:
    """What every request to this model has in common."""

    def __init__(self, name: str, version: int, outputs: list[str], decoupled: bool) -> None:
        self.name = name
        self.version = version
        self.outputs = outputs
        self.decoupled = decoupled


class ResponseIterator:
    """The responses of a call to another model, as they come. Once all are there, iteration may begin again."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[InferenceResponse, bool]] = deque()
        self._changed = threading.Condition()
        self._seen: list[InferenceResponse] = []
        self._position = 0
        self._finished = False
        self._callback: Any = None
        self._call = wires.connection.expect(self._on_message)

    def __iter__(self) -> Iterator[InferenceResponse]:
        if self._finished and self._position >= len(self._seen):
            self._position = 0
        return self

    def __next__(self) -> InferenceResponse:
        if self._finished:
            if self._position >= len(self._seen):
                raise StopIteration
            self._position += 1
            return self._seen[self._position - 1]
        with self._changed:
            while not self._arrived:
                self._changed.wait()
            response, self._finished = self._arrived.popleft()
        self._seen.append(response)
        self._position = len(self._seen)
        return response

    def cancel(self) -> None:
        """Call the request off; what it still answers is up to the other model."""
        if not self._finished:
            wires.connection.send(wire.BLS_CANCEL, self._call)

    def _when_ready(self, callback: Any) -> None:
        with self._changed:
            self._callback = None if self._arrived else callback
            arrived = bool(self._arrived)
        if arrived:
            callback()

    def _on_message(self, message: wire.Message) -> None:
        """In the side channel's thread."""
        _, call, block, response, final = message
        connection = wires.connection
        content = connection.content_of(block)
        if final:
            connection.forget(call)
        with self._changed:
            self._arrived.append((InferenceResponse._of_message(response, content), final))
            self._changed.notify()
            callback, self._callback = self._callback, None
        if callback is not None:
            callback()


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


__all__ = [
    "COMPLETE_FINAL",
    "RELEASE_ALL",
    "RELEASE_RESCHEDULE",
    "SEQUENCE_END",
    "SEQUENCE_START",
    "ErrorCode",
    "InferenceRequest",
    "InferenceResponse",
    "InferenceResponseSender",
    "InferenceTrace",
    "MemoryType",
    "ModelIdentity",
    "PreferredMemory",
    "ResponseIterator",
]
