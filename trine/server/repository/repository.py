"""Which models are served, and how they come and go."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trine.core.errors import ConfigurationError, ModelLoadError, TrineError
from trine.server.backends.base import Backend, Host
from trine.server.bridge import LoopBridge
from trine.server.custom_metrics import CustomMetrics
from trine.server.errors import Code, ServerError
from trine.server.journal import Journal
from trine.server.model import LoadedModel, ServedModel
from trine.server.repository.files import ModelFolder, Signature, scan
from trine.server.repository.loader import BackendRegistry, Loader, Plan
from trine.server.repository.settings import RepositorySettings
from trine.server.request import InferRequest

logger = logging.getLogger("trine.server")

ModelConfig = Any

READY, UNAVAILABLE, LOADING, UNLOADING, UNKNOWN = "READY", "UNAVAILABLE", "LOADING", "UNLOADING", "UNKNOWN"
_SWITCH_INTERVAL = 0.0002  # seconds a thread may keep the interpreter while another waits for it


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A version of a model in the repository, served or not. A model that was never loaded has no version or state."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(slots=True)
class VersionEntry:
    """What became of a version."""

    state: str
    reason: str = ""
    model: ServedModel | None = None
    signature: Signature = ()


@dataclass(slots=True)
class ModelEntry:
    """A model by its name: its versions, and which of them answers when a request names none."""

    name: str
    versions: dict[str, VersionEntry] = field(default_factory=dict)
    ready: list[str] = field(default_factory=list)
    """Ready versions, by number; shared with the served models."""
    newest: ServedModel | None = None
    signature: Signature = ()
    config: ModelConfig = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Repository:
    """The models of one server. Its methods run in the event loop's thread; loading runs in threads of its own."""

    def __init__(self, settings: RepositorySettings | None = None) -> None:
        self.settings = settings or RepositorySettings()
        self.metrics = CustomMetrics()
        self.journal = Journal()
        self.live = False
        self._started = False
        self._entries: dict[str, ModelEntry] = {}
        self._backends = BackendRegistry(self.settings.backend_settings)
        self._loader = Loader(self.settings, self._backends, count_gpus())
        self._threads = ThreadPoolExecutor(max(1, self.settings.load_threads), thread_name_prefix="load")
        self._bridge: LoopBridge | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._overrides: dict[str, tempfile.TemporaryDirectory[str]] = {}

    # --- look-up

    def model(self, name: str, version: str = "") -> ServedModel:
        """The model that answers requests for `name` and `version` ("": the newest ready one).

        ServerError: NOT_FOUND, or UNAVAILABLE while it is there and not ready.
        """
        entry = self._entries.get(name)
        if entry is not None:
            if not version:
                if entry.newest is not None:
                    return entry.newest
            else:
                found = entry.versions.get(version)
                if found is not None and found.model is not None:
                    return found.model
        raise self._no_model(name, version, entry)

    def _no_model(self, name: str, version: str, entry: ModelEntry | None) -> ServerError:
        if entry is None or not entry.versions:
            return ServerError(f"Request for unknown model: '{name}' is not found", Code.NOT_FOUND)
        if not version:
            return ServerError(f"Request for unknown model: '{name}' has no available versions", Code.NOT_FOUND)
        if version not in entry.versions:
            return ServerError(f"Request for unknown model: '{name}' version {version} is not found", Code.NOT_FOUND)
        return ServerError(
            f"Request for unknown model: '{name}' version {version} is not at ready state", Code.UNAVAILABLE
        )

    def index(self, ready: bool = False) -> list[IndexEntry]:
        """Every version of every model; `ready`: only those that answer requests."""
        found = []
        for name in sorted(self._entries):
            entry = self._entries[name]
            for version in sorted(entry.versions, key=_version_order):
                state = entry.versions[version]
                if not ready or state.state == READY:
                    found.append(IndexEntry(name, version, state.state, state.reason))
        return found

    def is_ready(self, name: str, version: str = "") -> bool:
        """Whether a request for it would be served."""
        try:
            return not self.model(name, version).stopping
        except ServerError:
            return False

    @property
    def ready(self) -> bool:
        """Whether the server is: started, and every model that should be there is."""
        if not self.live or not self._started:
            return False
        if not self.settings.strict_readiness:
            return True
        return all(
            state.state == READY or state.reason == "unloaded"
            for entry in self._entries.values()
            for state in entry.versions.values()
        )

    def models(self) -> list[ServedModel]:
        """Every ready version of every model, by name and number."""
        return [
            state.model
            for _, entry in sorted(self._entries.items())
            for _, state in sorted(entry.versions.items(), key=lambda item: _version_order(item[0]))
            if state.model is not None
        ]

    # --- life

    async def start(self) -> None:
        """Load what is to be served. ModelLoadError where a model fails and `exit_on_error` is set."""
        sys.setswitchinterval(min(_SWITCH_INTERVAL, sys.getswitchinterval()))
        loop = asyncio.get_running_loop()
        self._bridge = LoopBridge(loop)
        self._backends.host = Host(loop, self, self.metrics)
        self.live = True
        failures = await self._load_all(self._scan())
        self._started = True
        if failures and self.settings.exit_on_error:
            raise ModelLoadError(f"failed to load all models: {'; '.join(failures)}")

    async def close(self, timeout: float | None = None) -> None:
        """Take no more requests, let running ones finish for up to `timeout` seconds, free everything."""
        timeout = self.settings.drain_seconds if timeout is None else timeout
        self._started = False
        models = self.models()
        await asyncio.gather(*(self._leave(model, timeout) for model in models))
        if self._leaving:
            await asyncio.gather(*self._leaving)
        self.live = False
        self._entries.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for folder in self._overrides.values():
            folder.cleanup()

    def add_backend(self, backend: Backend) -> None:
        """Make a back end known by its name."""
        self._backends.add(backend)

    async def register_model(self, config: ModelConfig, loaded: LoadedModel) -> ServedModel:
        """Serve a model that does not come from a folder."""
        entry = self._entries.setdefault(config.name, ModelEntry(config.name))
        async with entry.lock:
            return await self._serve(entry, loaded, ())

    # --- loading

    def _scan(self) -> dict[str, ModelFolder]:
        return {folder.name: folder for folder in scan((path, Path(path)) for path in self.settings.directories)}

    async def _load_all(self, folders: dict[str, ModelFolder]) -> list[str]:
        """Load these models; returns what went wrong."""
        results = await asyncio.gather(
            *(self._load_folder(folder) for folder in folders.values()), return_exceptions=True
        )
        failures = []
        for folder, result in zip(folders.values(), results, strict=True):
            if isinstance(result, TrineError):
                failures.append(f"{folder.name}: {result.message}")
            elif isinstance(result, BaseException):
                raise result
        return failures

    async def load(self, name: str, config: str | None = None, files: dict[str, bytes] | None = None) -> None:
        """Load a model, or take up what has changed in it. ServerError: not allowed, not there, or not loadable.

        config: JSON in place of config.pbtxt; files: by path within the model's folder ("1/model.onnx"), in its place.
        """
        self._require_explicit()
        folder = self._scan().get(name)
        if folder is None:
            raise ServerError(
                f"failed to load '{name}', failed to poll from model repository: there is no folder of this name",
                Code.INVALID_ARGUMENT,
            )
        try:
            await self._load_folder(folder, config)
        except TrineError as error:
            raise ServerError(f"failed to load '{name}', {error.message}") from error

    async def unload(self, name: str, dependents: bool = False) -> None:
        """Stop serving a model; running requests finish."""
        self._require_explicit()
        entry = self._entries.get(name)
        if entry is None:
            return
        async with entry.lock:
            for version in list(entry.versions):
                self._withdraw(entry, version)

    def _require_explicit(self) -> None:
        if self.settings.control_mode != "explicit":
            raise ServerError("explicit model load / unload is not allowed if polling is enabled", Code.UNAVAILABLE)

    async def _load_folder(self, folder: ModelFolder, override: str | None = None) -> None:
        entry = self._entries.setdefault(folder.name, ModelEntry(folder.name))
        async with entry.lock:
            try:
                plan = await self._in_thread(self._loader.plan, folder, override)
            except TrineError as error:
                self._note_failure(entry, folder, error)
                raise
            await self._take_up(entry, plan)

    def _note_failure(self, entry: ModelEntry, folder: ModelFolder, error: TrineError) -> None:
        """A model whose configuration can't be used: what is served stays, what is not says why."""
        logger.error("model %s can't be loaded: %s", folder.name, error.message)
        if entry.newest is None:
            for version in folder.versions() or [""]:
                entry.versions[version] = VersionEntry(UNAVAILABLE, error.message)

    async def _take_up(self, entry: ModelEntry, plan: Plan) -> None:
        """Serve a plan: load versions that are new or have changed, withdraw those that are not in it any more."""
        failures: list[TrineError] = []
        same_config = entry.config is not None and entry.config == plan.config
        for version in plan.versions:
            signature = await self._in_thread(plan.folder.version_signature, version)
            known = entry.versions.get(version)
            if known is not None and known.model is not None and same_config and known.signature == signature:
                continue
            try:
                await self._load_version(entry, plan, version, signature)
            except TrineError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        entry.config = plan.config
        for version in [version for version in entry.versions if version not in plan.versions]:
            self._withdraw(entry, version)

    async def _load_version(self, entry: ModelEntry, plan: Plan, version: str, signature: Signature) -> None:
        known = entry.versions.get(version)
        if known is None or known.model is None:
            entry.versions[version] = VersionEntry(LOADING)
        try:
            loaded = await self._in_thread(self._loader.load, plan, version)
            await self._serve(entry, loaded, signature)
        except Exception as error:
            failure = error if isinstance(error, TrineError) else ModelLoadError(f"{type(error).__name__}: {error}")
            logger.error("model %s version %s can't be loaded: %s", entry.name, version, failure.message)
            if known is None or known.model is None:
                entry.versions[version] = VersionEntry(UNAVAILABLE, failure.message)
            raise failure from error

    async def _serve(self, entry: ModelEntry, loaded: LoadedModel, signature: Signature) -> ServedModel:
        """Put a loaded version in the place of the one before it, in one step; that one leaves when it is done."""
        assert self._bridge is not None, "start the repository first"
        model = ServedModel(loaded, self._bridge, self.journal, entry.ready)
        try:
            await model.start()
        except BaseException:
            await model.close()
            raise
        before = entry.versions.get(loaded.version)
        entry.versions[loaded.version] = VersionEntry(READY, "", model, signature)
        self._renew(entry)
        if before is not None and before.model is not None:
            self._retire(before.model)
        return model

    def _withdraw(self, entry: ModelEntry, version: str) -> None:
        """Stop serving a version."""
        state = entry.versions[version]
        model = state.model
        if model is None:
            return
        entry.versions[version] = VersionEntry(UNLOADING)
        self._renew(entry)
        self._retire(model, lambda: entry.versions.update({version: VersionEntry(UNAVAILABLE, "unloaded")}))

    def _renew(self, entry: ModelEntry) -> None:
        """After versions came or went: the list of the ready ones and the newest."""
        entry.ready[:] = sorted(
            (v for v, state in entry.versions.items() if state.model is not None), key=_version_order
        )
        entry.newest = entry.versions[entry.ready[-1]].model if entry.ready else None

    def _retire(self, model: ServedModel, done: Any = None) -> None:
        """Let a model that is not looked up any more finish what it has, then free it."""
        model.successor = self._forward

        async def leave() -> None:
            await self._leave(model, self.settings.drain_seconds)
            if done is not None:
                done()

        task = asyncio.create_task(leave())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, model: ServedModel, timeout: float) -> None:
        await model.drain(timeout)
        await model.close()

    def _forward(self, request: InferRequest) -> None:
        """A request that had found a model just before another took its place."""
        self.model(request.model_name, request.model_version).submit(request)

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def _version_order(version: str) -> tuple[int, str]:
    return (int(version) if version.isdigit() else -1, version)


def count_gpus() -> int:
    """GPUs that PyTorch can use."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


__all__ = ["ConfigurationError", "IndexEntry", "Repository"]
