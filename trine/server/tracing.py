"""Traces of requests: Triton's JSON file, or spans to an OpenTelemetry collector."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import urllib.request
from pathlib import Path
from time import monotonic_ns, time_ns
from typing import Any

from trine.server.request import InferRequest
from trine.server.settings import TraceSettings

logger = logging.getLogger("trine.server.tracing")

_BATCH = 512  # spans sent together
_SETTLE = 0.1  # seconds between an answer and the note of it
_INTERVAL = 2.0  # seconds between two posts to the collector


class RequestTrace:
    """What is noted of one request.

    parent, trace_id, span: OpenTelemetry's numbers of the span above, the trace and this span
    above: the id of the ensemble's request that this one is a part of; 0: a client's
    """

    __slots__ = ("above", "id", "level", "parent", "span", "trace_id", "tracer")

    def __init__(
        self, tracer: Tracer, number: int, level: list[str], parent: str, trace_id: str, above: int = 0
    ) -> None:
        self.tracer = tracer
        self.id = number
        self.level = level
        self.parent = parent
        self.trace_id = trace_id or secrets.token_hex(16)
        self.span = secrets.token_hex(8)
        self.above = above

    def start_member(self, member: InferRequest) -> None:
        """Trace a request that an ensemble makes of one of its members."""
        member.trace = RequestTrace(self.tracer, self.tracer.number(), self.level, self.span, self.trace_id, self.id)

    def finish_member(self, member: InferRequest) -> None:
        """The member has given its last response."""
        self.tracer.finish(member)


class Tracer:
    """Decides which requests are traced, and writes what they did. In the event loop's thread."""

    def __init__(self, settings: TraceSettings, *, url: str = "", service: str = "triton") -> None:
        self.settings = settings
        self.url = url or "http://localhost:4318/v1/traces"
        self.service = service
        self._number = 0
        self._seen: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._generation = -1
        self._finished: list[tuple[InferRequest, int]] = []
        self._records: list[dict[str, Any]] = []
        self._files = 0
        self._since_file = 0
        self._spans: list[dict[str, Any]] = []
        self._posting: asyncio.Task[None] | None = None
        self._clock = time_ns() - monotonic_ns()

    @property
    def enabled(self) -> bool:
        """Whether any request may be traced."""
        if self._generation != self.settings.generation:
            self._generation = self.settings.generation
            self._seen.clear()
            self._left.clear()
            self._enabled = self.settings.any_active
        return self._enabled

    _enabled = False

    def start(self, request: InferRequest) -> None:
        """Called for each request while tracing is on."""
        name = request.model_name
        current = self.settings.of(name)
        level = current["trace_level"]
        if level == ["OFF"]:
            return
        seen = self._seen[name] = self._seen.get(name, 0) + 1
        parent, trace_id = _context(request)
        rate = current["trace_rate"]
        if not parent and (rate == 0 or (seen - 1) % rate):
            return
        left = self._left.get(name, current["trace_count"])
        if left == 0:
            return
        self._left[name] = left - 1 if left > 0 else left
        request.trace = RequestTrace(self, self.number(), level, parent, trace_id)

    def number(self) -> int:
        """The next request's."""
        self._number += 1
        return self._number

    def finish(self, request: InferRequest) -> None:
        """The answer has been handed to the socket. Its batch's times may come just after it: they are waited for."""
        if not self._finished:
            asyncio.get_running_loop().call_later(_SETTLE, self._settle)
        self._finished.append((request, monotonic_ns()))

    def _settle(self) -> None:
        finished, self._finished = self._finished, []
        for request, ended in finished:
            trace: RequestTrace = request.trace
            request.trace = None
            # an instance that answers by itself returns after its answer
            request.compute_output_start_ns = min(request.compute_output_start_ns, ended)
            request.compute_end_ns = min(request.compute_end_ns, ended)
            if self.settings.mode == "opentelemetry":
                self._add_spans(request, trace, ended)
            else:
                self._add_record(request, trace, ended)

    # Triton's file.

    def _add_record(self, request: InferRequest, trace: RequestTrace, ended: int) -> None:
        record: dict[str, Any] = {
            "id": trace.id,
            "model_name": request.model_name,
            "model_version": int(request.model_version or 1),
            "request_id": request.id,
        }
        if trace.above:
            record["parent_id"] = trace.above
        self._records.append(record)
        if "TIMESTAMPS" in trace.level:
            stamps = [{"name": name, "ns": ns} for name, ns in _stamps(request, trace, ended)]
            self._records.append({"id": trace.id, "timestamps": stamps})
        if "TENSORS" in trace.level:
            for tensor in request.inputs.values():
                self._records.append({"id": trace.id, "activity": "TENSOR_QUEUE_INPUT", "tensor": _tensor(tensor)})
        self._since_file += 1
        frequency = self.settings.of()["log_frequency"]
        if frequency and self._since_file >= frequency:
            self._write(f".{self._files}")
            self._files += 1
        elif not frequency and len(self._records) >= 4096:
            self._write("")

    def _write(self, suffix: str) -> None:
        """The records so far, as one JSON array. Without a suffix the file goes on growing."""
        records, self._records, self._since_file = self._records, [], 0
        if not records or not self.settings.file:
            return
        path = Path(self.settings.file + suffix)
        text = ",".join(json.dumps(record) for record in records)
        try:
            if not suffix and path.exists() and path.stat().st_size > 2:
                with path.open("r+b") as file:
                    file.seek(-1, 2)
                    file.write(b"," + text.encode() + b"]")
            else:
                path.write_text(f"[{text}]", encoding="utf-8")
        except OSError as error:
            logger.warning("the trace file %s can't be written: %s", path, error)

    # OpenTelemetry.

    def _add_spans(self, request: InferRequest, trace: RequestTrace, ended: int) -> None:
        trace_id, root = trace.trace_id, trace.span
        attributes = {
            "triton.model_name": request.model_name,
            "triton.model_version": request.model_version or "1",
            "triton.request_id": request.id,
            "triton.trace_request_id": request.id,
        }
        self._spans.append(
            self._span(trace_id, root, trace.parent, "InferRequest", request.received_ns, ended, attributes)
        )
        parts = (
            ("queue", request.queued_ns, request.compute_start_ns),
            ("compute", request.compute_start_ns, request.compute_end_ns),
        )
        for name, start, end in parts:
            if start and end >= start:
                self._spans.append(self._span(trace_id, secrets.token_hex(8), root, name, start, end, {}))
        if self._posting is None:
            self._posting = asyncio.ensure_future(self._post_later())

    def _span(
        self, trace_id: str, span_id: str, parent: str, name: str, start: int, end: int, attributes: dict[str, str]
    ) -> dict[str, Any]:
        return {
            "traceId": trace_id,
            "spanId": span_id,
            "parentSpanId": parent,
            "name": name,
            "kind": 2 if name == "InferRequest" else 1,
            "startTimeUnixNano": str(start + self._clock),
            "endTimeUnixNano": str(end + self._clock),
            "attributes": [{"key": key, "value": {"stringValue": value}} for key, value in attributes.items()],
        }

    async def _post_later(self) -> None:
        while self._spans:
            await asyncio.sleep(_INTERVAL)
            await self._post()
        self._posting = None

    async def _post(self) -> None:
        spans, self._spans = self._spans[:_BATCH], self._spans[_BATCH:]
        if not spans:
            return
        resource = {"attributes": [{"key": "service.name", "value": {"stringValue": self.service}}]}
        body = {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {"name": "trine"}, "spans": spans}]}]}
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=5).read())
        except OSError as error:
            logger.warning("%d spans could not be sent to %s: %s", len(spans), self.url, error)

    def flush(self) -> None:
        """Write what has been noted to the file."""
        self._settle()
        if self.settings.mode != "opentelemetry":
            self._write("")

    async def close(self) -> None:
        """Write and send what there is."""
        self.flush()
        while self._spans:
            await self._post()
        if self._posting is not None:
            self._posting.cancel()


def _stamps(request: InferRequest, trace: RequestTrace, ended: int) -> list[tuple[str, int]]:
    """Triton's names for the moments of a request; those that did not come are left out."""
    received = request.received_ns
    over_the_wire = 0 if trace.above else 1
    stamps = [
        ("HTTP_RECV_START", received * over_the_wire),
        ("HTTP_RECV_END", received * over_the_wire),
        ("REQUEST_START", received),
        ("QUEUE_START", request.queued_ns),
        ("COMPUTE_START", request.compute_start_ns),
        ("COMPUTE_INPUT_END", request.compute_input_end_ns),
        ("COMPUTE_OUTPUT_START", request.compute_output_start_ns),
        ("COMPUTE_END", request.compute_end_ns),
        ("INFER_RESPONSE_COMPLETE", ended),
        ("REQUEST_END", ended),
        ("HTTP_SEND_START", ended * over_the_wire),
        ("HTTP_SEND_END", ended * over_the_wire),
    ]
    return [(name, ns) for name, ns in stamps if ns]


def _tensor(tensor: Any) -> dict[str, str]:
    values = ",".join(str(value) for value in tensor.array.reshape(-1)[:4096])
    shape = ",".join(map(str, tensor.shape))
    return {"name": tensor.name, "data": values, "shape": shape, "dtype": tensor.datatype}


def _context(request: InferRequest) -> tuple[str, str]:
    """The parent's span and the trace that a request continues; empty where it begins one."""
    text = (request.context or {}).get("traceparent", "")
    parts = text.split("-")
    if len(parts) == 4 and len(parts[1]) == 32 and len(parts[2]) == 16 and parts[3][-1:] in "13579bdf":
        return parts[2], parts[1]
    return "", ""
