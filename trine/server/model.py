"""A served model: one version of a model with its scheduler, its instances and its statistics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic_ns
from typing import Any, Protocol

from trine.server.answers import Answers
from trine.server.assembly import Assembler
from trine.server.backends.base import AsyncInstance, BackendModel, BatchInstance, Device, RequestInstance
from trine.server.bridge import LoopBridge
from trine.server.errors import Code, ServerError
from trine.server.instances import InstancePool, Worker
from trine.server.journal import Journal
from trine.server.labels import read_labels
from trine.server.request import InferRequest
from trine.server.scheduling.dynamic import DynamicScheduler
from trine.server.statistics import REJECTED, ModelStatistics
from trine.server.validation import RequestChecker

ModelConfig = Any
Instance = BatchInstance | RequestInstance | AsyncInstance

_POLL_SECONDS = 0.005  # how often a draining model looks whether it is done


@dataclass(slots=True)
class LoadedModel:
    """What a loader thread has made of a version's files: weights, and instances that have computed the warm-up."""

    config: ModelConfig
    version: str
    directory: Path | None
    backend_model: BackendModel | None
    instances: list[tuple[str, Device, Instance]] = field(default_factory=list)
    load_seconds: float = 0.0


class Scheduler(Protocol):
    """Takes checked requests; answers each through its `respond`."""

    def enqueue(self, request: InferRequest) -> None: ...

    def reject_all(self, error: ServerError) -> None: ...

    def __len__(self) -> int: ...


class ServedModel:
    """One version of a model, ready to take requests. Belongs to the event loop's thread.

    versions: the ready versions of the model, shared between them
    """

    def __init__(self, loaded: LoadedModel, bridge: LoopBridge, journal: Journal, versions: list[str]) -> None:
        config = loaded.config
        self.name: str = config.name
        self.version = loaded.version
        self.config = config
        self.versions = versions
        self.decoupled: bool = config.model_transaction_policy.decoupled
        self.statistics = ModelStatistics()
        self.statistics.load_seconds = loaded.load_seconds
        self.loaded = loaded
        self.stopping = False
        self.successor: Callable[[InferRequest], None] | None = None
        """Where requests go that reach this model after another took its place."""
        self._directory = loaded.directory
        self._labels: dict[str, list[str]] = {}
        self._assembler = Assembler(config)
        self._checker = RequestChecker(config)
        self._answers = Answers(self.name, self.version, self._assembler, self.statistics, journal)
        self.pool = InstancePool(self._assembler, bridge)
        for name, device, instance in loaded.instances:
            self.pool.add(Worker(name, device, instance, self.pool))
        self.scheduler: Scheduler = self._make_scheduler(config)
        self._enqueue = self.scheduler.enqueue
        self._check = self._checker.check

    def _make_scheduler(self, config: ModelConfig) -> Scheduler:
        return DynamicScheduler(config, self.pool, self._answers, signed=self._checker.signed)

    def submit(self, request: InferRequest) -> None:
        """Take a request: ServerError where it is refused at once, else `request.respond` gets its responses."""
        if self.stopping:
            self._submit_late(request)
            return
        self._check(request)
        request.queued_ns = monotonic_ns()
        try:
            self._enqueue(request)
        except ServerError:
            self.statistics.failed(monotonic_ns() - request.received_ns, REJECTED)
            raise

    def _submit_late(self, request: InferRequest) -> None:
        if self.successor is None:
            raise ServerError(
                "Server is stopping, scheduler for model has stopped accepting new inference requests",
                Code.UNAVAILABLE,
            )
        self.successor(request)

    def labels(self, output: str) -> list[str]:
        """The class names of an output, from its label_filename; empty where it has none."""
        found = self._labels.get(output)
        if found is None:
            found = self._labels[output] = read_labels(self.config, output, self._directory)
        return found

    @property
    def busy(self) -> bool:
        """Whether a request is not answered yet."""
        return self._answers.open > 0

    async def drain(self, timeout: float) -> None:
        """Take no more requests, wait for those it has up to `timeout` seconds, reject what still waits then."""
        self.stopping = True
        deadline = monotonic_ns() + int(timeout * 1e9)
        while self.busy and monotonic_ns() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        self.scheduler.reject_all(
            ServerError("Server is stopping, the request has not been computed in time", Code.UNAVAILABLE)
        )

    async def start(self) -> None:
        """Start the instances that are asynchronous themselves. Raises ModelLoadError."""
        for worker in self.pool.workers:
            await worker.start()

    async def close(self) -> None:
        """End the instances and free the weights."""
        for worker in self.pool.workers:
            await worker.close()
        if self.loaded.backend_model is not None:
            await asyncio.to_thread(self.loaded.backend_model.close)
