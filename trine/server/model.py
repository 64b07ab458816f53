"""A served model: one version of a model with its scheduler, its instances and its statistics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING, Any, Protocol

from trine.server.answers import Answers
from trine.server.assembly import Assembler
from trine.server.backends.base import BackendModel, Device
from trine.server.bridge import LoopBridge
from trine.server.configuration.complete import ENSEMBLE
from trine.server.errors import Code, ServerError
from trine.server.instances import Instance, InstancePool, Worker
from trine.server.journal import Journal
from trine.server.labels import read_labels
from trine.server.request import InferRequest
from trine.server.scheduling.cached import CachedAnswers
from trine.server.scheduling.dynamic import DynamicScheduler
from trine.server.scheduling.ensemble import EnsembleScheduler
from trine.server.scheduling.rate_limiter import RateLimiter
from trine.server.scheduling.response_cache import ResponseCache
from trine.server.scheduling.sequence import SequenceScheduler
from trine.server.statistics import DEFAULT_FIRST_RESPONSE_BOUNDS_MS, REJECTED, ModelStatistics
from trine.server.validation import RequestChecker
from trine.server.warmup import warm_up

if TYPE_CHECKING:
    from trine.server.repository import Repository

ModelConfig = Any

_POLL_SECONDS = 0.005  # how often a draining model looks whether it is done


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an instance is to be: `index` counts the model's instances, `group` is the configuration's message."""

    name: str
    device: Device
    index: int
    group: Any = None


@dataclass(frozen=True, slots=True)
class PlacedInstance:
    """An instance and its place."""

    placement: Placement
    instance: Instance


@dataclass(slots=True)
class LoadedModel:
    """What a loader thread has made of a version's files: weights, and instances that are not started yet."""

    config: ModelConfig
    version: str
    directory: Path | None
    backend_model: BackendModel | None
    instances: list[PlacedInstance] = field(default_factory=list)
    load_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all models of a server share. `limiter` and `cache` are None where they are off."""

    bridge: LoopBridge
    journal: Journal
    repository: Repository
    limiter: RateLimiter | None = None
    cache: ResponseCache | None = None


class Scheduler(Protocol):
    """Takes checked requests; answers each through its `respond`."""

    def enqueue(self, request: InferRequest) -> None: ...

    def reject_all(self, error: ServerError) -> None: ...

    def __len__(self) -> int: ...


class ServedModel:
    """One version of a model, ready to take requests. Belongs to the event loop's thread.

    versions: the ready versions of the model, shared between them
    """

    def __init__(self, loaded: LoadedModel, surroundings: Surroundings, versions: list[str]) -> None:
        config = loaded.config
        self.name: str = config.name
        self.version = loaded.version
        self.config = config
        self.versions = versions
        self.statistics = ModelStatistics(first_response_bounds_ms=_first_response_bounds(config))
        self.statistics.load_seconds = loaded.load_seconds
        self.loaded = loaded
        self.loaded_ms = time_ns() // 1_000_000
        self.stopping = False
        self.successor: Callable[[InferRequest], None] | None = None
        """Where requests go that reach this model after another took its place."""
        self._surroundings = surroundings
        self._clients_refused = False
        self._route: Callable[[InferRequest], ServedModel | None] | None = None
        self._detour = False
        self._labels: dict[str, list[str]] = {}
        self._assembler = Assembler(config)
        self._checker = RequestChecker(config)
        self._answers = Answers(self.name, self.version, self._assembler, self.statistics, surroundings.journal)
        self.pool = InstancePool(self._assembler, surroundings.bridge, surroundings.limiter)
        for placed in loaded.instances:
            self.pool.add(self._worker(placed))
        self.scheduler = self._make_scheduler(config)
        self.decoupled: bool = config.model_transaction_policy.decoupled or getattr(self.scheduler, "decoupled", False)
        self._answers.decoupled = self.decoupled
        self._check = self._checker.check
        self._enqueue = self.scheduler.enqueue
        if config.response_cache.enable and surroundings.cache is not None:
            cached = CachedAnswers(surroundings.cache, self.name, self.version, self.statistics, self.scheduler.enqueue)
            self._enqueue = cached.enqueue

    def _worker(self, placed: PlacedInstance) -> Worker:
        placement = placed.placement
        claim = None
        if self._surroundings.limiter is not None and placement.group is not None:
            claim = self._surroundings.limiter.claim(placement.group, placement.device)
        return Worker(placement.name, placement.device, placed.instance, self.pool, claim)

    def _make_scheduler(self, config: ModelConfig) -> Scheduler:
        if config.platform == ENSEMBLE:
            return EnsembleScheduler(config, self._surroundings.repository, self._answers)
        if config.HasField("sequence_batching"):
            return SequenceScheduler(config, self.pool, self._answers, self._checker.specs, self.loaded.directory)
        return DynamicScheduler(config, self.pool, self._answers, signed=self._checker.signed)

    # Requests

    def submit(self, request: InferRequest) -> None:
        """Take a request: ServerError where it is refused at once, else `request.respond` gets its responses."""
        if self._detour and self._sent_elsewhere(request):
            return
        try:
            self._check(request)
            request.queued_ns = monotonic_ns()
            self._enqueue(request)
        except ServerError as error:
            if error.error_code is Code.UNAVAILABLE:  # the queue is full; what does not fit the model is not counted
                self.statistics.failed(monotonic_ns() - request.received_ns, REJECTED)
            self._surroundings.journal.refused(self.name, self.version, request, error.message)
            raise

    def _sent_elsewhere(self, request: InferRequest) -> bool:
        """What is not the usual: traffic is split, another model took this one's place, the server stops."""
        if self.stopping or (self._clients_refused and not request.internal):
            if self.successor is not None and not self._clients_refused:
                self.successor(request)
                return True
            raise ServerError(
                "Server is stopping, scheduler for model has stopped accepting new inference requests",
                Code.UNAVAILABLE,
            )
        if self._route is not None and not request.model_version:
            target = self._route(request)
            if target is not None and target is not self:
                target.submit(request)
                return True
        return False

    def labels(self, output: str) -> list[str]:
        """The class names of an output, from its label_filename; empty where it has none."""
        found = self._labels.get(output)
        if found is None:
            found = self._labels[output] = read_labels(self.config, output, self.loaded.directory)
        return found

    def route(self, choose: Callable[[InferRequest], ServedModel | None] | None) -> None:
        """Requests that name no version go where `choose` says; None: they stay."""
        self._route = choose
        self._renew_detour()

    def _renew_detour(self) -> None:
        self._detour = self.stopping or self._clients_refused or self._route is not None

    # Life

    @property
    def busy(self) -> bool:
        """Whether a request is not answered yet."""
        return self._answers.open > 0

    async def start(self) -> None:
        """Start the instances that are asynchronous themselves, and compute the warm-up on each instance."""
        await self._start_workers(self.pool.workers)

    async def _start_workers(self, workers: list[Worker]) -> None:
        for worker in workers:
            await worker.start()
        await warm_up(self.config, self.loaded.directory, workers)

    async def ask_ready(self) -> bool:
        """Whether every instance that can tell says that it would serve a request now."""
        return all([await worker.ask_ready() for worker in self.pool.workers])

    def follow(self, before: ServedModel) -> None:
        """Take over from the model that served this version so far: it goes on with its sequences."""
        self.pool.expect_as(before.pool)
        if isinstance(self.scheduler, SequenceScheduler) and isinstance(before.scheduler, SequenceScheduler):
            self.scheduler.predecessor = before.scheduler
            before.scheduler.leaving = True

    def compare_instances(self, wanted: list[Placement]) -> tuple[list[Placement], list[Worker]]:
        """The places that have no instance yet, and the instances that have no place any more."""
        names = {(placement.name, placement.device) for placement in wanted}
        present = {(worker.name, worker.device) for worker in self.pool.workers}
        fresh = [placement for placement in wanted if (placement.name, placement.device) not in present]
        return fresh, [worker for worker in self.pool.workers if (worker.name, worker.device) not in names]

    async def resize(self, config: ModelConfig, made: list[PlacedInstance], surplus: list[Worker]) -> None:
        """Take up instances and let others go, while requests run."""
        workers = [self._worker(placed) for placed in made]
        try:
            await self._start_workers(workers)
        except BaseException:
            for worker in workers:
                await worker.close()
            raise
        for worker in workers:
            self.pool.add(worker)
        for worker in surplus:
            self.pool.retire(worker)
        self.config.CopyFrom(config)
        self.pool.on_free()
        for worker in surplus:
            while worker.outstanding:
                await asyncio.sleep(_POLL_SECONDS)
            await worker.close()

    def refuse_clients(self) -> None:
        """The server stops: requests go on only where a running request needs them."""
        self._clients_refused = True
        self._renew_detour()

    async def drain(self, timeout: float) -> None:
        """Take no more requests, wait for those it has up to `timeout` seconds, reject what still waits then."""
        self.stopping = True
        self._renew_detour()
        deadline = monotonic_ns() + int(timeout * 1e9)
        while (self.busy or getattr(self.scheduler, "has_sequences", False)) and monotonic_ns() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        self.scheduler.reject_all(
            ServerError("Server is stopping, the request has not been computed in time", Code.UNAVAILABLE)
        )

    async def close(self) -> None:
        """End the instances and free the weights."""
        for worker in self.pool.workers:
            await worker.close()
        if self.loaded.backend_model is not None:
            await asyncio.to_thread(self.loaded.backend_model.close)


def _first_response_bounds(config: ModelConfig) -> tuple[float, ...]:
    """Buckets in milliseconds of the histogram of first responses, which `model_metrics` may set."""
    for control in config.model_metrics.metric_control:
        if control.metric_identifier.family == "nv_inference_first_response_histogram_ms":
            bounds = tuple(control.histogram_options.buckets)
            if bounds:
                return bounds
    return DEFAULT_FIRST_RESPONSE_BOUNDS_MS
