"""Load on one model of a server of the v2 protocol, over HTTP or gRPC: prebuilt requests of random tensors.

Small clients of our own: a general library would be a large part of what is measured. They read of an answer only its
status and where it ends; the first answer is looked at whole.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from trine.core.errors import ConfigurationError, RequestError
from trine.server.grpc import frames
from trine.server.grpc.heads import HeadReader
from trine.server.proto import pb
from trine.server.tensors import NUMPY_TYPES, Tensor

PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(slots=True)
class Outcome:
    """What one level of load gave. Latencies in seconds; server: mean microseconds of each part of a request there."""

    label: str
    seconds: float
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rows: int = 1
    server: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Rates a second, percentiles in milliseconds, the server's parts in microseconds."""
        found: dict[str, Any] = {
            "load": self.label,
            "requests": len(self.latencies),
            "failed": len(self.failures),
            "requests_per_s": round(len(self.latencies) / self.seconds, 1),
            "rows_per_s": round(self.rows * len(self.latencies) / self.seconds, 1),
        }
        if self.latencies:
            values = np.percentile(np.array(self.latencies) * 1000, (50, 90, 95, 99))
            found |= {
                f"p{share}_ms": round(float(value), 3) for share, value in zip((50, 90, 95, 99), values, strict=True)
            }
        return found | {f"server_{part}_us": round(value, 1) for part, value in self.server.items()}


class Connection(Protocol):
    """Sends the request and waits for its answer; raises RequestError where that is an error."""

    async def ask(self) -> None: ...

    def close(self) -> None: ...


def ask_json(url: str, path: str) -> Any:
    """A document of the server. ConfigurationError where it can't be had."""
    try:
        with urllib.request.urlopen(url.rstrip("/") + path, timeout=20) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise ConfigurationError(f"{url}{path}: {error.read().decode('utf-8', 'replace')}", param="url") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{url} does not answer: {error}", param="url") from None


def random_inputs(metadata: dict[str, Any], batched: bool, rows: int, shapes: dict[str, list[int]]) -> list[Tensor]:
    """A tensor for each input; `shapes` says what variable dimensions are (without rows)."""
    tensors = []
    generator = np.random.default_rng(0)
    for described in metadata["inputs"]:
        name, datatype = described["name"], described["datatype"]
        dims = [int(dim) for dim in described["shape"]][batched:]
        dims = shapes.get(name, dims)
        if any(dim < 0 for dim in dims):
            raise ConfigurationError(
                f"input {name} has the shape {dims}: say how large, --shape {name}:…", param="shape"
            )
        shape = [rows, *dims] if batched else dims
        dtype = NUMPY_TYPES[datatype]
        if dtype.kind == "O":
            array = np.full(shape, b"text", dtype=object)
        elif dtype.kind == "f":
            array = generator.standard_normal(shape).astype(dtype)
        else:
            array = generator.integers(0, 2, shape).astype(dtype)
        tensors.append(Tensor(name, datatype, shape, array))
    return tensors


class HttpConnection:
    """One connection over HTTP, binary tensors both ways."""

    def __init__(self, url: str, model: str, tensors: list[Tensor]) -> None:
        place = urlsplit(url)
        self._host, self._port = place.hostname or "127.0.0.1", place.port or 8000
        inputs = [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "datatype": tensor.datatype,
                "parameters": {"binary_data_size": len(tensor.raw)},
            }
            for tensor in tensors
        ]
        head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
        body = head + b"".join(bytes(tensor.raw) for tensor in tensors)
        self._request = (
            b"POST /v2/models/%b/infer HTTP/1.1\r\nHost: %b\r\nInference-Header-Content-Length: %d\r\nContent-Length: "
            b"%d\r\n\r\n%b" % (model.encode(), self._host.encode(), len(head), len(body), body)
        )
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self) -> None:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
        self._writer.write(self._request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        body = await self._reader.readexactly(int(length))
        if not head.startswith(b"http/1.1 200"):
            raise RequestError(body.decode("utf-8", "replace")[:300])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class GrpcConnection:
    """One connection over gRPC, one call at a time."""

    def __init__(self, url: str, model: str, tensors: list[Tensor]) -> None:
        place = urlsplit(url)
        self._host, self._port = place.hostname or "127.0.0.1", place.port or 8001
        message = pb.ModelInferRequest(model_name=model)
        for tensor in tensors:
            message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            message.raw_input_contents.append(bytes(tensor.raw))
        data = message.SerializeToString()
        self._message = b"\0" + len(data).to_bytes(4, "big") + data
        fields = {":method": "POST", ":scheme": "http", ":path": "/inference.GRPCInferenceService/ModelInfer"}
        fields |= {":authority": self._host, "te": "trailers", "content-type": "application/grpc"}
        self._block = b"".join(frames.literal(name, value) for name, value in fields.items())
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._heads = HeadReader()
        self._number = -1
        self._window = 65535
        self._stream_window = self._initial = 65535
        self._frame = 16384

    async def _connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
        settings = {frames.INITIAL_WINDOW_SIZE: frames.MAX_WINDOW, frames.MAX_FRAME_SIZE: frames.LARGEST_FRAME}
        allow = frames.window_update(0, frames.MAX_WINDOW - 65535)
        self._writer.write(frames.PREFACE + frames.settings(settings) + allow)

    async def ask(self) -> None:
        if self._writer is None:
            await self._connect()
        assert self._writer is not None
        self._number += 2
        self._stream_window = self._initial
        self._writer.write(frames.frame(frames.HEADERS, frames.END_HEADERS, self._number, self._block))
        left = memoryview(self._message)
        while len(left):
            room = min(self._window, self._stream_window, self._frame, len(left))
            if room <= 0:
                await self._take()
                continue
            flags = frames.END_STREAM if room == len(left) else 0
            self._writer.write(frames.header(room, frames.DATA, flags, self._number))
            self._writer.write(left[:room])
            left = left[room:]
            self._window -= room
            self._stream_window -= room
        while not await self._take():
            pass

    async def _take(self) -> bool:
        """Handle the next frame; whether the call has ended. Raises RequestError with its status."""
        assert self._reader is not None
        assert self._writer is not None
        high, low, kind, flags, number = frames.unpack_header(await self._reader.readexactly(frames.HEADER_SIZE))
        payload = await self._reader.readexactly(high << 8 | low)
        if kind == frames.DATA:
            self._writer.write(frames.window_update(0, len(payload))) if payload else None
        elif kind == frames.HEADERS:
            head = self._heads.read(frames.unpadded(payload, flags))
            if flags & frames.END_STREAM:
                if head.metadata.get("grpc-status") != "0":
                    raise RequestError(head.metadata.get("grpc-message", f"status {head.metadata.get('grpc-status')}"))
                return True
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            values = frames.parse_settings(payload)
            initial = values.get(frames.INITIAL_WINDOW_SIZE, self._initial)
            self._stream_window += initial - self._initial
            self._initial = initial
            self._frame = values.get(frames.MAX_FRAME_SIZE, self._frame)
            self._writer.write(frames.frame(frames.SETTINGS, frames.ACK, 0, b""))
        elif kind == frames.WINDOW_UPDATE:
            amount = int.from_bytes(payload, "big")
            if number == 0:
                self._window += amount
            elif number == self._number:
                self._stream_window += amount
        elif kind == frames.PING and not flags & frames.ACK:
            self._writer.write(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.GOAWAY:
            raise RequestError(f"the server ends the connection: {payload[8:].decode('utf-8', 'replace')}")
        return False

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


async def closed_loop(make: Callable[[], Connection], clients: int, seconds: float) -> Outcome:
    """So many clients, each its next request when the last is answered."""
    outcome = Outcome(f"{clients} clients", seconds)
    connections = [make() for _ in range(clients)]
    await asyncio.gather(*(connection.ask() for connection in connections))
    start = time.perf_counter()
    stop = start + seconds

    async def work(connection: Connection) -> None:
        while (begun := time.perf_counter()) < stop:
            if not await _measured(connection, begun, outcome):
                return

    await asyncio.gather(*(work(connection) for connection in connections))
    outcome.seconds = time.perf_counter() - start
    for connection in connections:
        connection.close()
    return outcome


async def open_loop(make: Callable[[], Connection], rate: float, seconds: float) -> Outcome:
    """Requests at random moments, so many a second, whether or not earlier ones are answered."""
    outcome = Outcome(f"{rate:g}/s", seconds)
    chance = random.Random(0)
    idle: list[Connection] = []
    running: set[asyncio.Task[None]] = set()
    start = time.perf_counter()
    due = start

    async def one(begun: float) -> None:
        connection = idle.pop() if idle else make()
        if await _measured(connection, begun, outcome):
            idle.append(connection)

    while due < start + seconds:
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one(due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    outcome.seconds = time.perf_counter() - start
    for connection in idle:
        connection.close()
    return outcome


async def _measured(connection: Connection, begun: float, outcome: Outcome) -> bool:
    """Whether the connection can be used again."""
    try:
        await connection.ask()
    except (RequestError, OSError, asyncio.IncompleteReadError, ValueError) as error:
        outcome.failures.append(str(error) or type(error).__name__)
        return isinstance(error, RequestError)
    outcome.latencies.append(time.perf_counter() - begun)
    return True


def server_parts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Mean microseconds that requests between two looks at a model's statistics spent in each part of the server."""
    found = {}
    for part in PARTS:
        was, now = before["inference_stats"][part], after["inference_stats"][part]
        count = now["count"] - was["count"]
        found[part] = (now["ns"] - was["ns"]) / count / 1000 if count else 0.0
    return found
