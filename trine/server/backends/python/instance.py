"""An instance of a Python model: its process, the batches it works on, and what happens when it fails.

A process that ends, hangs or takes too much memory fails the requests it holds, by name and reason, and is started
again; other instances and models notice nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from time import monotonic, monotonic_ns
from typing import Any

from trine.core.errors import ModelLoadError
from trine.core.sizes import format_bytes
from trine.server.backends.base import BatchDone, Host, Respond
from trine.server.backends.python import wire
from trine.server.backends.python.calls import ERROR_CODES, ModelCalls, pack, read_block, slice_tensors
from trine.server.backends.python.memory import CANCEL_FLAGS
from trine.server.backends.python.options import PythonOptions
from trine.server.backends.python.process import ModelProcess
from trine.server.errors import Code, ServerError
from trine.server.request import InferRequest, InferResponse

logger = logging.getLogger("trine.server.python")

_WATCH_S = 1.0
_READINESS_TIMEOUT_S = 5.0
_RESTART_PAUSES_S = (0.0, 0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
_STABLE_S = 10.0
_KILL_ABOVE = 1.5  # times the memory limit: no waiting for the batch's end any more


class _Open:
    """A request whose final response is still to come."""

    __slots__ = ("held", "request", "respond")

    def __init__(self, request: InferRequest, respond: Respond) -> None:
        self.request = request
        self.respond = respond
        self.held: InferResponse | None = None


class _Batch:
    """Requests that the model executes at once."""

    __slots__ = ("done", "input_end_ns", "requests", "respond", "slots")

    def __init__(self, requests: list[InferRequest], respond: Respond, done: BatchDone) -> None:
        self.requests = requests
        self.respond = respond
        self.done = done
        self.slots: list[int] = []
        self.input_end_ns = 0


class PythonInstance:
    """One instance. All of it runs in the event loop's thread."""

    def __init__(self, name: str, options: PythonOptions, arguments: dict[str, Any], host: Host) -> None:
        self.name = name
        self._options = options
        self._arguments = arguments
        self._host = host
        self._decoupled = options.decoupled
        self._process: ModelProcess | None = None
        self._calls: ModelCalls | None = None
        self._ready: asyncio.Future[None] | None = None
        self._has_readiness = False
        self._readiness: asyncio.Future[bool] | None = None
        self._open: dict[int, _Open] = {}
        self._slots: list[int] = []
        self._next_slot = 0
        self._batches: deque[_Batch] = deque()
        self._waiting: deque[_Batch] = deque()
        self._head_since = 0.0
        self._recent_ns = 2 * wire.PATIENCE_NS  # from a batch's messages to the end of it
        self._watching: asyncio.TimerHandle | None = None
        self._condemned: str | None = None
        self._recycling = False
        self._closing = False
        self._starts = 0
        self._start_failed = False
        self._started_at = 0.0
        self._failure = "it has not been started"
        self._restart: asyncio.Task[None] | None = None

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process and let the model initialize. ModelLoadError: why it could not."""
        options = self._options
        try:
            process = await asyncio.to_thread(ModelProcess, options.python, options.environment, self.name)
        except OSError as error:
            raise ModelLoadError(f"model instance '{self.name}': {options.python} can't be run: {error}") from error
        self._ready = asyncio.get_running_loop().create_future()
        self._process, self._calls = process, ModelCalls(process, self._host, self.name)
        self._slots, self._next_slot = [], 0
        process.on_message, process.on_end = self._on_message, self._on_end
        process.attach()
        process.send(wire.INITIALIZE, self._arguments)
        hello = asyncio.get_running_loop().call_later(options.timeout, self._no_hello)
        self._hello: asyncio.TimerHandle | None = hello
        try:
            await self._ready
        except ServerError as error:
            process.kill()
            await process.ended.wait()
            raise ModelLoadError(str(error)) from error
        finally:
            hello.cancel()
        self._started_at = monotonic()

    @property
    def alive(self) -> bool:
        """Whether there is a process, and it is initialized."""
        return self._ready is not None and self._ready.done() and self._process is not None

    async def is_ready(self) -> bool:
        if not self.alive:
            return False
        if not self._has_readiness:
            return True
        if self._readiness is None:
            assert self._process is not None
            self._readiness = asyncio.get_running_loop().create_future()
            self._process.send_aside(wire.IS_READY, 0)
        pending = self._readiness
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(pending), _READINESS_TIMEOUT_S)
        logger.warning("%s: is_ready() did not answer within %g s", self.name, _READINESS_TIMEOUT_S)
        return False

    async def close(self) -> None:
        """Finalize the model and end its process."""
        self._closing = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.gather(self._restart, return_exceptions=True)
        if self._process is not None:
            await self._process.close(self._options.timeout)
        self._fail_waiting(ServerError(f"model instance '{self.name}' was unloaded", Code.UNAVAILABLE))

    def _no_hello(self) -> None:
        self._condemn(f"did not start within {self._options.timeout:g} s (stub-timeout-seconds)")

    def _on_end(self, reason: str) -> None:
        """The process is gone."""
        reason, self._condemned = self._condemned or reason, None
        assert self._process is not None
        assert self._calls is not None
        self._calls.close()
        self._process = self._calls = None
        self._failure = reason
        if self._readiness is not None and not self._readiness.done():
            self._readiness.set_result(False)
        self._readiness = None
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(
                ServerError(f"the process of model instance '{self.name}' {reason} before it was initialized")
            )
            return
        recycled, self._recycling = self._recycling, False
        if recycled:
            self._starts = 0
        if self._open or self._batches or not (self._closing or recycled):
            logger.error(
                "model instance '%s': its process %s; %d requests fail, it is started again",
                self.name,
                reason,
                len(self._open),
            )
        self._fail_open(reason)
        if not self._closing:
            self._restart = self._host.loop.create_task(self._start_again())

    async def _start_again(self) -> None:
        if monotonic() - self._started_at > _STABLE_S:
            self._starts = 0
        while not self._closing:
            pause = _RESTART_PAUSES_S[min(self._starts, len(_RESTART_PAUSES_S) - 1)]
            self._starts += 1
            await asyncio.sleep(pause)
            try:
                await self.start()
            except ModelLoadError as error:
                self._failure, self._start_failed = f"could not start: {error}", True
                logger.error("model instance '%s' can't be started again: %s", self.name, error)
                self._fail_waiting(self._unavailable())
            else:
                self._start_failed = False
                break
        waiting, self._waiting = self._waiting, deque()
        for batch in waiting:
            self._submit(batch)

    def _condemn(self, reason: str) -> None:
        """End the process because of what it does."""
        if self._process is not None:
            self._condemned = self._condemned or reason
            self._process.kill()

    # --- batches -----------------------------------------------------------------------------------------------------

    def begin(self, requests: list[InferRequest], respond: Respond, done: BatchDone) -> None:
        """Hand a batch to the process; while it is being started again, the batch waits."""
        batch = _Batch(requests, respond, done)
        if self.alive and not self._recycling:
            self._submit(batch)
        elif self._start_failed or self._closing:
            self._waiting.append(batch)
            self._fail_waiting(self._unavailable())
        else:
            self._waiting.append(batch)

    def _submit(self, batch: _Batch) -> None:
        process = self._process
        assert process is not None
        if self._next_slot + len(batch.requests) > CANCEL_FLAGS:
            self._refuse(
                batch, ServerError(f"'{self.name}' holds {len(self._open)} requests already", Code.UNAVAILABLE)
            )
            return
        packer = wire.Packer()
        entries = [[pack(packer, tensor) for tensor in request.inputs.values()] for request in batch.requests]
        try:
            block = packer.place(process.memory)
        except MemoryError as error:
            self._refuse(batch, ServerError(str(error), Code.UNAVAILABLE))
            return
        flags, messages = process.memory.map, []
        for request, own in zip(batch.requests, entries, strict=True):
            slot = self._slots.pop() if self._slots else self._new_slot()
            flags[slot] = 1 if request.cancelled else 0
            batch.slots.append(slot)
            self._open[slot] = _Open(request, batch.respond)
            request.on_cancel = lambda slot=slot, request=request: self._on_cancel(slot, request)
            messages.append(_request_message(slot, request, own))
        if not self._batches:
            self._head_since = monotonic()
        self._batches.append(batch)
        process.send(wire.EXECUTE, block, messages)
        batch.input_end_ns = monotonic_ns()
        if self._watching is None:
            self._watching = self._host.loop.call_later(_WATCH_S, self._watch)

    def linger(self) -> None:
        """Wait for the end of the batch that was just begun, if it will be over at once."""
        if self._process is not None and len(self._batches) == 1 and self._recent_ns < 2 * wire.PATIENCE_NS:
            self._process.linger()

    def _new_slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1

    def _on_cancel(self, slot: int, request: InferRequest) -> None:
        entry = self._open.get(slot)
        if entry is None or entry.request is not request or self._process is None:
            return
        self._process.memory.map[slot] = 1
        if not self._decoupled and self._calls is not None and self._batches and self._abandoned(self._batches[0]):
            self._calls.cancel_all()  # what the batch waits for in other models is not wanted either

    @staticmethod
    def _abandoned(batch: _Batch) -> bool:
        """Whether nobody waits for the batch any more."""
        return all(request.cancelled for request in batch.requests)

    def _refuse(self, batch: _Batch, error: ServerError) -> None:
        now = monotonic_ns()
        for request in batch.requests:
            batch.respond(request, InferResponse(error=error))
        batch.done(now, now)

    def _fail_open(self, reason: str) -> None:
        """What the process was at fails; batches that it had not come to wait for the next process."""
        begun, self._batches = self._batches, deque()
        batches = [begun.popleft()] if begun else []
        for batch in begun:
            for slot in batch.slots:
                del self._open[slot]
            batch.slots.clear()
        self._waiting.extendleft(reversed(begun))
        entries, self._open = list(self._open.values()), {}
        error = ServerError(
            f"Failed to process the request(s) for model instance '{self.name}', message: Stub process '{self.name}' "
            f"is not healthy: it {reason}.",
            Code.INTERNAL,
        )
        for entry in entries:
            entry.respond(entry.request, InferResponse(error=error))
        now = monotonic_ns()
        for batch in batches:
            batch.done(batch.input_end_ns, now)

    def _fail_waiting(self, error: ServerError) -> None:
        waiting, self._waiting = self._waiting, deque()
        for batch in waiting:
            self._refuse(batch, error)

    def _unavailable(self) -> ServerError:
        return ServerError(
            f"model instance '{self.name}' is not available: its process {self._failure}; it is being started again",
            Code.UNAVAILABLE,
        )

    # --- messages ----------------------------------------------------------------------------------------------------

    def _on_message(self, message: wire.Message) -> None:
        kind = message[0]
        calls = self._calls
        assert calls is not None
        if kind == wire.DONE:
            self._on_done(*message[1:])
        elif kind == wire.RESPONSE:
            self._on_response(*message[1:])
        elif kind == wire.BLS:
            calls.infer(*message[1:])
        elif kind == wire.METRIC:
            calls.metric(*message[1:])
        elif kind == wire.LOG:
            calls.log(*message[1:])
        elif kind == wire.CALL:
            calls.ask(*message[1:])
        elif kind == wire.BLS_CANCEL:
            calls.cancel(message[1])
        elif kind == wire.READINESS:
            if self._readiness is not None:
                self._readiness.set_result(message[2])
                self._readiness = None
        elif kind == wire.HELLO:
            assert self._hello is not None
            self._hello.cancel()
        elif self._ready is None or self._ready.done():
            return  # whoever waited for this is gone
        elif kind == wire.READY:
            self._has_readiness = message[1]
            self._ready.set_result(None)
        elif kind == wire.FAILED:
            self._ready.set_exception(ServerError(message[1], Code.INTERNAL))

    def _on_done(self, block: wire.Block, responses: list[Any] | None, error: str | None) -> None:
        now = monotonic_ns()
        batch = self._batches.popleft()
        self._head_since = monotonic()
        self._recent_ns = now - batch.input_end_ns
        if error is not None:
            failure = ServerError(error, Code.INTERNAL)
            logger.error("%s", error)
            for slot, request in zip(batch.slots, batch.requests, strict=True):
                self._answer(slot, InferResponse(error=failure), request)
        elif responses is not None:
            self._respond_batch(batch, block, responses)
        batch.done(batch.input_end_ns, now)
        if self._recycling and not self._open:
            self._end_to_recycle()

    def _respond_batch(self, batch: _Batch, block: wire.Block, responses: list[Any]) -> None:
        process = self._process
        assert process is not None
        content = read_block(process, block)
        for slot, request, response in zip(batch.slots, batch.requests, responses, strict=True):
            if response is None:
                continue  # its sender answers
            if response == wire.RESCHEDULED:
                self._reschedule(slot, batch)
                continue
            entries, error, parameters = response
            self._answer(slot, _response(slice_tensors(content, entries), error, parameters, final=True), request)

    def _reschedule(self, slot: int, batch: _Batch) -> None:
        """The model wants to execute the request again, in a later batch."""
        entry = self._open.pop(slot)
        self._slots.append(slot)
        again = getattr(entry.request, "reschedule", None)
        if again is not None:
            again()
            return
        error = ServerError(
            f"model instance '{self.name}' rescheduled a request: that takes sequence_batching with "
            "iterative_sequence: true in its configuration"
        )
        entry.respond(entry.request, InferResponse(error=error))

    def _on_response(self, slot: int, block: wire.Block, message: Any, final: bool) -> None:
        """A response sender's."""
        assert self._process is not None
        entry = self._open.get(slot)
        if entry is None:
            wire.free(block, self._process.reader)
            return
        if message is None:
            response = InferResponse(final=True)
        else:
            entries, error, parameters = message
            tensors = slice_tensors(read_block(self._process, block), entries)
            response = _response(tensors, error, parameters, final=final)
        if not self._decoupled:  # its one response and its end are one
            if not final:
                entry.held = response
                return
            if entry.held is not None:
                response = entry.held
                response.final = True
        if final:
            self._answer(slot, response, entry.request)
        else:
            entry.respond(entry.request, response)

    def _answer(self, slot: int, response: InferResponse, request: InferRequest) -> None:
        """A request's final response, unless it has had it."""
        entry = self._open.get(slot)
        if entry is None or entry.request is not request:
            return
        del self._open[slot]
        self._slots.append(slot)
        request.on_cancel = None
        entry.respond(request, response)

    # --- watching ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Once a second while there is work."""
        self._watching = None
        if self._process is None:
            return
        if self._batches:
            self._check_hang(monotonic() - self._head_since)
        self._check_memory()
        if self._batches or self._open:
            self._watching = self._host.loop.call_later(_WATCH_S, self._watch)

    def _check_hang(self, seconds: float) -> None:
        limit = self._options.execution_timeout
        if limit is not None and seconds > limit:
            self._condemn(f"did not finish a batch within {limit:g} s (stub-timeout-seconds) and was ended")
        elif seconds > self._options.timeout and self._abandoned(self._batches[0]):
            self._condemn(
                f"was still at a batch after {seconds:.0f} s that nobody waits for (stub-timeout-seconds="
                f"{self._options.timeout:g}) and was ended"
            )

    def _check_memory(self) -> None:
        """A process above its limit is started again: after its batch, or at once when it is far above."""
        process, limit = self._process, self._options.memory_limit
        assert process is not None
        used = process.resident_bytes()
        if used <= limit:
            return
        reason = f"took {format_bytes(used)} of memory, more than memory-limit={format_bytes(limit)}"
        if used > _KILL_ABOVE * limit:
            self._condemn(f"{reason}, and was ended")
        elif not self._recycling:
            logger.warning("model instance '%s' %s: it is started again after its batch", self.name, reason)
            self._recycling = True
            self._failure = reason
            if not self._batches and not self._open:
                self._end_to_recycle()

    def _end_to_recycle(self) -> None:
        if self._process is not None:
            self._process.send(wire.FINALIZE)


def _request_message(slot: int, request: InferRequest, entries: list[wire.TensorEntry]) -> tuple[Any, ...]:
    outputs = request.outputs
    context = request.context
    return (
        slot,
        request.id,
        request.sequence_id,
        request.sequence_start + 2 * request.sequence_end,
        request.timeout_us,
        request.parameters or None,
        None if outputs is None else [output.name for output in outputs],
        None if context is None else context.get("triton_trace_context"),
        entries,
    )


def _response(tensors: list[Any], error: tuple[int, str] | None, parameters: Any, *, final: bool) -> InferResponse:
    failure = None
    if error is not None:
        code, text = error
        failure = ServerError(text, ERROR_CODES[code] if 0 <= code < len(ERROR_CODES) else Code.INTERNAL)
    return InferResponse(tensors, error=failure, final=final, parameters=parameters)
