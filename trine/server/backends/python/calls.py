"""What a model asks of its server, on the server's side: other models' inference, loading, metrics, log lines."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from trine.core.errors import TrineError
from trine.server.backends.base import Host
from trine.server.backends.python import wire
from trine.server.backends.python.process import ModelProcess
from trine.server.custom_metrics import Family, Series
from trine.server.errors import Code, ServerError
from trine.server.request import InferRequest, InferResponse, RequestedOutput
from trine.server.tensors import Tensor

logger = logging.getLogger("trine.server.python")

ERROR_CODES = (
    Code.UNKNOWN,
    Code.INTERNAL,
    Code.NOT_FOUND,
    Code.INVALID_ARGUMENT,
    Code.UNAVAILABLE,
    Code.UNSUPPORTED,
    Code.ALREADY_EXISTS,
    Code.CANCELLED,
)
"""Our codes by Triton's numbers."""
_NUMBERS = {code: number for number, code in enumerate(ERROR_CODES)}
_LEVELS = (logging.INFO, logging.WARNING, logging.ERROR, logging.DEBUG)
_START, _END = 1, 2


def read_block(process: ModelProcess, block: wire.Block) -> Any:
    """What `slice_tensors` cuts."""
    content = wire.content_of(block, process.reader)
    return content if type(content) is bytes else content.data


def slice_tensors(content: Any, entries: list[wire.TensorEntry]) -> list[Tensor]:
    return [
        Tensor(name, datatype, shape, raw=content[start : start + size] if size else b"")
        for name, datatype, shape, start, size in entries
    ]


def pack(packer: wire.Packer, tensor: Tensor) -> wire.TensorEntry:
    """Add a tensor to a message; an array of numbers is copied once, by the packer."""
    content = tensor.raw if tensor.is_raw or tensor.datatype == "BYTES" else tensor.array
    return packer.add(tensor.name, tensor.datatype, tensor.shape, content)


class ModelCalls:
    """The calls of one process. When it ends, what it has begun is cancelled and what it held is released."""

    def __init__(self, process: ModelProcess, host: Host, model_name: str) -> None:
        self._process = process
        self._host = host
        self._model_name = model_name
        self._running: dict[int, InferRequest] = {}
        self._families: dict[int, Family] = {}
        self._series: dict[int, tuple[Family, Series]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def cancel_all(self) -> None:
        """Call off all inference that this process waits for."""
        for request in list(self._running.values()):
            request.cancel()

    def close(self) -> None:
        self.cancel_all()
        self._running.clear()
        for family, series in self._series.values():
            self._host.metrics.release_series(family, series)
        for family in self._families.values():
            self._host.metrics.release_family(family)
        self._series.clear()
        self._families.clear()

    # --- inference ---------------------------------------------------------------------------------------------------

    def infer(self, call: int, block: wire.Block, details: tuple[Any, ...], entries: list[wire.TensorEntry]) -> None:
        """Have another model execute a request of this one, and pass its responses on."""
        name, version, request_id, correlation_id, flags, timeout, parameters, outputs, context, decoupled = details
        request = InferRequest(
            name,
            {tensor.name: tensor for tensor in slice_tensors(read_block(self._process, block), entries)},
            lambda response: self._pass_on(call, response, decoupled),
            model_version="" if version < 0 else str(version),
            id=request_id,
            outputs=None if outputs is None else [RequestedOutput(output) for output in outputs],
            parameters=parameters,
            timeout_us=timeout,
            sequence_id=correlation_id,
            sequence_start=bool(flags & _START),
            sequence_end=bool(flags & _END),
        )
        if context is not None:
            request.context = {"triton_trace_context": context}
        self._running[call] = request
        try:
            model = self._host.repository.model(name, request.model_version)
            if model.decoupled and not decoupled:
                raise ServerError(
                    f"Model {name} is using the decoupled. The current BLS request call doesn't support models using "
                    "the decoupled transaction policy. Please use 'decoupled=True' argument to the 'exec' or "
                    "'async_exec' calls for decoupled models.'"
                )
            model.submit(request)
        except ServerError as error:
            self._pass_on(call, InferResponse(error=error), decoupled)

    def cancel(self, call: int) -> None:
        request = self._running.get(call)
        if request is not None:
            request.cancel()

    def _pass_on(self, call: int, response: InferResponse, decoupled: bool) -> None:
        if call not in self._running:
            return  # the process has ended, or has its one response
        final = response.final or not decoupled
        if final:
            del self._running[call]
        error = None
        if response.error is not None:
            error = (_NUMBERS.get(response.error.error_code, 1), str(response.error))
        elif response.is_empty and not decoupled:
            error = (_NUMBERS[Code.INTERNAL], "Unexpected empty response.")
        process = self._process
        packer = wire.Packer()
        entries = [pack(packer, tensor) for tensor in response.outputs]
        block = packer.place(process.memory)
        process.send_aside(wire.BLS_RESPONSE, call, block, (entries, error, response.parameters), final)

    # --- everything else ---------------------------------------------------------------------------------------------

    def log(self, level: int, text: str) -> None:
        logger.log(_LEVELS[level], "%s: %s", self._model_name, text)

    def ask(self, call: int, function: str, arguments: tuple[Any, ...]) -> None:
        """Answer a call whose result the model waits for."""
        if function in ("load_model", "unload_model"):
            task = self._host.loop.create_task(self._control(call, function, arguments))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        try:
            answer = getattr(self, f"_{function}")(*arguments)
        except (TrineError, KeyError) as error:
            self._process.send_aside(wire.REPLY, call, None, str(error))
        else:
            self._process.send_aside(wire.REPLY, call, answer, None)

    async def _control(self, call: int, function: str, arguments: tuple[Any, ...]) -> None:
        repository = self._host.repository
        try:
            if function == "load_model":
                await repository.load(*arguments)
            else:
                await repository.unload(*arguments)
        except TrineError as error:
            self._process.send_aside(wire.REPLY, call, None, str(error))
        except Exception as error:
            logger.exception("%s: %s failed", self._model_name, function)
            self._process.send_aside(wire.REPLY, call, None, f"{type(error).__name__}: {error}")
        else:
            self._process.send_aside(wire.REPLY, call, None, None)

    def _is_model_ready(self, name: str, version: str) -> bool:
        return bool(self._host.repository.is_ready(name, version))

    def _metric_family(self, number: int, name: str, description: str, kind: str) -> None:
        self._families[number] = self._host.metrics.family(name, description, kind)

    def _metric(self, number: int, family: int, labels: dict[str, Any], buckets: list[float] | None) -> None:
        found = self._families[family]
        self._series[number] = (found, self._host.metrics.series(found, labels, buckets))

    def _metric_value(self, number: int) -> float:
        return self._series[number][1].total

    def metric(self, number: int, operation: str, value: float) -> None:
        """A change to a metric that the model does not wait for."""
        if operation == "delete_family":
            family = self._families.pop(number, None)
            if family is not None:
                self._host.metrics.release_family(family)
            return
        found = self._series.get(number)
        if found is None:
            return
        if operation == "increment":
            found[1].add(value)
        elif operation == "set":
            found[1].total = value
        elif operation == "observe":
            found[1].observe(value)
        elif operation == "delete":
            del self._series[number]
            self._host.metrics.release_series(*found)
