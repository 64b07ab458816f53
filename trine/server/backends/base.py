"""What a back end is: a framework that loads a model's files and computes.

`load` gives a `BackendModel` (weights, what instances share); `instance` gives one that computes on one device, called
by one thread at a time. Third parties register a `Backend` under the entry point group `trine.backends`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trine.server.request import InferRequest, InferResponse
from trine.server.tensors import Array

if TYPE_CHECKING:
    from trine.server.custom_metrics import CustomMetrics
    from trine.server.repository import Repository

ModelConfig = Any
"""The protobuf message inference.ModelConfig, checked and completed."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a version lies: `directory` of the model (config.pbtxt, labels), `version_directory` of its files."""

    directory: Path
    version_directory: Path
    version: str


@dataclass(frozen=True, slots=True)
class Device:
    """Where an instance computes."""

    kind: str  # "cpu" | "cuda"
    index: int = 0


Respond = Callable[[InferRequest, InferResponse], None]
"""Hands a response over from any thread; it reaches `request.respond` in the event loop's."""


BatchDone = Callable[[int, int], None]
"""Ends a batch; takes the monotonic times (ns) at which its inputs were ready and its outputs were there."""


class BatchInstance(Protocol):
    """Computes on whole tensors: the scheduler puts a batch together once and cuts the answer apart once."""

    def execute(self, inputs: dict[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """The batch (first dimension: rows) to the named outputs. ServerError: for the whole batch."""

    def close(self) -> None: ...


class RequestInstance(Protocol):
    """Computes on requests: sees parameters and sequence flags, may answer each any number of times, now or later."""

    def execute_requests(self, requests: list[InferRequest], respond: Respond) -> None:
        """Returns when it can take the next batch; every request gets its final response, then or later."""

    def close(self) -> None: ...


class AsyncInstance(Protocol):
    """Computes in another process, or is asynchronous itself: it has no thread.

    So a request's way to another process and back holds no hop between threads. All of it is called in the event loop's
    thread.
    """

    async def start(self) -> None:
        """Called once, before anything else. Raises ModelLoadError."""

    def begin(self, requests: list[InferRequest], respond: Respond, done: BatchDone) -> None:
        """Begin a batch and return at once; it never raises. Each request gets its responses, now or later.

        `done` is called when the batch is over, possibly before `begin` returns. A second batch may be begun before the
        first is done; with a true attribute `unbounded` any number: they run side by side, and nothing is queued.
        """

    async def is_ready(self) -> bool:
        """Whether it would serve a request now; must answer within seconds."""

    async def close(self) -> None:
        """Let running batches finish, then release everything. Harmless where it was never started."""


class BackendModel(Protocol):
    """A loaded model."""

    def instance(self, device: Device, index: int) -> BatchInstance | RequestInstance | AsyncInstance: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Host:
    """What a back end may use of its server: given to its `attach(host)`, where it has one, when it is made.

    loop        the server's event loop
    repository  other models, for back ends whose models call them
    metrics     where models add metrics of their own
    """

    loop: asyncio.AbstractEventLoop
    repository: Repository
    metrics: CustomMetrics


class Backend(Protocol):
    """A framework. Made with its settings: `--backend-config=NAME,KEY=VALUE` as {KEY: VALUE}."""

    name: str

    def complete(self, config: ModelConfig, files: ModelFiles) -> None:
        """Fill what the configuration leaves out (inputs, outputs, batching) from the model's files, in place."""

    def load(self, config: ModelConfig, files: ModelFiles) -> BackendModel:
        """Raises ModelLoadError, naming the file and the remedy."""
