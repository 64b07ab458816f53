"""Which models are served, and how they come and go.

A model that takes another's place is loaded beside it and put in its place in one step of the event loop; the one
before answers what it has and leaves. A load that fails changes nothing but the reason that the index shows.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

from trine.core.errors import ModelLoadError, TrineError
from trine.server.backends.base import Backend, Host
from trine.server.bridge import LoopBridge
from trine.server.custom_metrics import CustomMetrics
from trine.server.errors import Code, ServerError
from trine.server.journal import Journal
from trine.server.model import LoadedModel, ServedModel, Surroundings
from trine.server.repository.entries import (
    LOADING,
    READY,
    UNAVAILABLE,
    UNLOADED,
    UNLOADING,
    IndexEntry,
    ModelEntry,
    VersionEntry,
    no_model,
    status_table,
    version_order,
)
from trine.server.repository.files import ModelFolder, Signature
from trine.server.repository.loader import BackendRegistry, Loader, Plan, members, placements
from trine.server.repository.on_demand import OnDemand
from trine.server.repository.planning import check_circle, differ_in_instances_only, in_dependency_order, message_of
from trine.server.repository.settings import RepositorySettings
from trine.server.repository.sources import Sources, write_files
from trine.server.repository.watcher import Watcher
from trine.server.request import InferRequest
from trine.server.scheduling.rate_limiter import RateLimiter
from trine.server.scheduling.response_cache import ResponseCache, make_cache
from trine.server.timing import keep_time
from trine.server.traffic import TrafficSplit
from trine.server.warmup import rehearse

logger = logging.getLogger("trine.server")

ModelConfig = Any

_BREATH = 0.05  # seconds between two swaps at least


class Repository:
    """The models of one server. Its methods run in the event loop's thread; loading runs in threads of its own."""

    def __init__(self, settings: RepositorySettings | None = None) -> None:
        self.settings = settings or RepositorySettings()
        self.metrics = CustomMetrics()
        self.journal = Journal()
        self.live = False
        self._started = False
        self._entries: dict[str, ModelEntry] = {}
        self._sources = Sources(self.settings.directories)
        self._backends = BackendRegistry(self.settings.backend_settings)
        self._loader = Loader(self.settings, self._backends, count_gpus())
        self._threads = ThreadPoolExecutor(max(1, self.settings.load_threads), thread_name_prefix="load")
        self._surroundings: Surroundings | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._written: dict[str, Path] = {}
        self._known: set[str] = set()
        self._watcher: Watcher | None = None
        self._rested_at = 0.0
        self._on_demand = OnDemand(
            self.settings.max_loaded, self._entries, self._load_if_there, self._withdraw_now, self._is_needed
        )
        self.cache: ResponseCache | None = make_cache(self.settings.cache_size, self.settings.cache_url)

    # Looking up

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
        raise no_model(name, version, entry)

    def index(self, ready: bool = False) -> list[IndexEntry]:
        """Every version of every model; `ready`: only those that answer requests."""
        found = []
        for name in sorted({*self._entries, *self._known}):
            entry = self._entries.get(name)
            if entry is None or not entry.versions:
                if not ready:
                    found.append(IndexEntry(name, "", "", ""))
                continue
            for version in sorted(entry.versions, key=version_order):
                state = entry.versions[version]
                if not ready or state.state == READY:
                    found.append(IndexEntry(name, version, state.state, state.reason))
        return found

    def is_ready(self, name: str, version: str = "") -> bool:
        """Whether a request for it would be served: of an ensemble, by its members too."""
        try:
            model = self.model(name, version)
        except ServerError:
            return False
        return not model.stopping and all(self.is_ready(member, needed) for member, needed in members(model.config))

    async def ask_ready(self, name: str, version: str = "") -> bool:
        """As `is_ready`, and the model's instances, where they can tell, say so too."""
        return self.is_ready(name, version) and await self.model(name, version).ask_ready()

    @property
    def ready(self) -> bool:
        """Whether the server is: started, and every model that should be there is."""
        if not self.live or not self._started:
            return False
        if not self.settings.strict_readiness:
            return True
        return all(
            state.state in (READY, UNLOADING) or state.reason == UNLOADED
            for entry in self._entries.values()
            for state in entry.versions.values()
        )

    def models(self) -> list[ServedModel]:
        """Every ready version of every model, by name and number."""
        return [
            state.model
            for _, entry in sorted(self._entries.items())
            for _, state in sorted(entry.versions.items(), key=lambda item: version_order(item[0]))
            if state.model is not None
        ]

    def explain(self, request_id: str) -> list[dict[str, object]]:
        """What happened to the recent requests of this id, oldest first: see `Journal`."""
        return self.journal.find(request_id)

    # Life

    async def start(self) -> None:
        """Load what is to be served. ModelLoadError where a model fails and `exit_on_error` is set."""
        keep_time()
        settings = self.settings
        await self._in_thread(self._sources.check)
        self._attach(asyncio.get_running_loop())
        self.live = True
        if settings.control_mode == "poll":
            self._watcher = Watcher(
                self._sources, settings.poll_seconds, self._follow, namespacing=settings.namespacing
            )
            await self._watcher.remember(self._threads)
        folders, twice = await self._in_thread(self._sources.folders)
        self._known = set(folders)
        chosen = self._chosen_at_start(folders)
        failures = self._refuse_duplicates(twice)
        wanted = {name: folder for name, folder in folders.items() if name in chosen and name not in self._entries}
        failures += [f"{name}: there is no folder of this name" for name in chosen if name not in folders]
        failures += await self._load_all(wanted, folders)
        for name in wanted:
            self._entries[name].explicit = True
        self._started = True
        if self._known or self._entries:
            logger.info("models:\n%s", status_table(self.index()))
        if failures and settings.exit_on_error:
            raise ModelLoadError(f"failed to load all models: {'; '.join(failures)}")
        if self._watcher is not None:
            self._watcher.start()

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._backends.host = Host(loop, self, self.metrics)
        limiter = RateLimiter(self.settings.rate_limit_resources) if self.settings.rate_limit else None
        self._surroundings = Surroundings(LoopBridge(loop), self.journal, self, limiter, self.cache)

    def _chosen_at_start(self, folders: Mapping[str, ModelFolder]) -> list[str]:
        if self.settings.control_mode != "explicit":
            return list(folders)
        if self.settings.load_models == ("*",):
            return list(folders)
        return list(self.settings.load_models)

    def _refuse_duplicates(self, twice: Mapping[str, list[str]]) -> list[str]:
        failures = []
        for name, repositories in twice.items():
            if self.settings.namespacing:
                logger.warning("model %s is in %s: the first is served", name, " and ".join(repositories))
                continue
            reason = f"the model is in more than one repository: {', '.join(repositories)}; keep one of them"
            self._entries[name] = ModelEntry(name, {"": VersionEntry(UNAVAILABLE, reason)})
            failures.append(f"{name}: {reason}")
        return failures

    async def close(self, timeout: float | None = None) -> None:
        """Take no more requests, let running ones finish for up to `timeout` seconds, free everything."""
        timeout = self.settings.drain_seconds if timeout is None else timeout
        self._started = False
        if self._watcher is not None:
            await self._watcher.stop()
        await self._leave_in_order(self.models(), timeout)
        if self._leaving:
            await asyncio.gather(*self._leaving)
        self.live = False
        self._entries.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sources.close()
        for folder in self._written.values():
            shutil.rmtree(folder, ignore_errors=True)
        if self.cache is not None:
            await self.cache.close()

    async def _leave_in_order(self, models: list[ServedModel], timeout: float) -> None:
        """Ensembles, then Python models, then the others: running requests of the former may need the latter."""
        for model in models:
            model.refuse_clients()
        stages: list[list[ServedModel]] = [[], [], []]
        for model in models:
            stages[0 if members(model.config) else 1 if model.config.backend == "python" else 2].append(model)
        deadline = monotonic() + timeout
        for stage in stages:
            left = max(0.0, deadline - monotonic())
            await asyncio.gather(*(self._leave(model, left) for model in stage))

    def add_backend(self, backend: Backend) -> None:
        """Make a back end known by its name."""
        self._backends.add(backend)

    async def register_model(self, loaded: LoadedModel) -> ServedModel:
        """Serve a model that does not come from a folder."""
        if self._surroundings is None:
            self._attach(asyncio.get_running_loop())
            self.live = self._started = True
        entry = self._entries.setdefault(loaded.config.name, ModelEntry(loaded.config.name, explicit=True))
        async with entry.lock:
            entry.config = loaded.config
            return await self._serve(entry, loaded, ())

    # Loading

    async def load(self, name: str, config: str | None = None, files: dict[str, bytes] | None = None) -> None:
        """Load a model, or take up what has changed in it. ServerError: not allowed, not there, or not loadable.

        config: JSON in place of config.pbtxt; files: by path within the model's folder ("1/model.onnx"), in its place.
        """
        self._require_explicit()
        if files and config is None:
            raise ServerError(
                f"failed to load '{name}', override model directory without config override is not allowed: give the "
                "parameter 'config' with the files"
            )
        folders, _ = await self._in_thread(self._sources.folders)
        self._known = set(folders)
        written = await self._in_thread(write_files, name, files) if files else None
        folder = ModelFolder(name, written, "") if written is not None else folders.get(name)
        if folder is None:
            raise ServerError(f"failed to load '{name}', failed to poll from model repository")
        try:
            await self._load_with_members(folder, folders, config)
        except TrineError as error:
            if written is not None:
                shutil.rmtree(written, ignore_errors=True)
            raise ServerError(f"failed to load '{name}', {error.message}") from error
        self._entries[name].explicit = True
        self._keep_written(name, written)

    def _keep_written(self, name: str, written: Path | None) -> None:
        """Files of a load request stay for as long as the model is served from them."""
        before = self._written.pop(name, None)
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        if written is not None:
            self._written[name] = written

    async def unload(self, name: str, dependents: bool = False) -> None:
        """Stop serving a model; running requests finish. `dependents`: an ensemble's members too, unless needed."""
        self._require_explicit()
        entry = self._entries.get(name)
        if entry is None:
            return
        needed = members(entry.config) if entry.config is not None else []
        await self._withdraw_all(entry)
        entry.explicit = False
        if not dependents:
            return
        for member, _ in needed:
            found = self._entries.get(member)
            if found is not None and not found.explicit and not self._is_needed(member):
                await self.unload(member, dependents=True)

    def _is_needed(self, name: str) -> bool:
        """Whether a served ensemble has this model as a member."""
        return any(name == member for model in self.models() for member, _ in members(model.config))

    async def _withdraw_all(self, entry: ModelEntry) -> None:
        async with entry.lock:
            self._withdraw_now(entry)

    def _withdraw_now(self, entry: ModelEntry) -> None:
        for version in list(entry.versions):
            self._withdraw(entry, version)
        entry.config = None

    def _require_explicit(self) -> None:
        if self.settings.control_mode != "explicit":
            raise ServerError("explicit model load / unload is not allowed if polling is enabled", Code.UNAVAILABLE)

    async def _load_all(
        self, folders: Mapping[str, ModelFolder], others: Mapping[str, ModelFolder] | None = None
    ) -> list[str]:
        """Load these models, ensembles after the others; returns what went wrong. `others`: where their members are."""
        failures: list[str] = []
        plans: list[Plan] = []
        planned: set[str] = set()
        left = list(folders.values())
        while left:
            results = await asyncio.gather(*(self._plan(folder) for folder in left), return_exceptions=True)
            planned.update(folder.name for folder in left)
            for folder, result in zip(left, results, strict=True):
                if isinstance(result, Plan):
                    plans.append(result)
                else:
                    failures.append(f"{folder.name}: {message_of(result)}")
            needed = {member for plan in plans for member, _ in members(plan.config)} - planned
            left = [(others or {})[name] for name in needed if name in (others or {})]
        ordered = in_dependency_order(plans)
        for stage in ordered:
            done = await asyncio.gather(*(self._take_up(plan) for plan in stage), return_exceptions=True)
            for plan, failure in zip(stage, done, strict=True):
                if failure is not None:
                    failures.append(f"{plan.folder.name}: {message_of(failure)}")
        return failures

    async def _load_with_members(
        self,
        folder: ModelFolder,
        folders: Mapping[str, ModelFolder],
        override: str | None = None,
        above: tuple[str, ...] = (),
    ) -> None:
        """Load a model; of an ensemble, first the members that are not served yet. `above`: whose member it is."""
        plan = await self._plan(folder, override)
        above = (*above, folder.name)
        for member, version in members(plan.config):
            if not self.is_ready(member, version) and member in folders and member not in above:
                await self._load_with_members(folders[member], folders, above=above)
        await self._take_up(plan)

    async def _plan(self, folder: ModelFolder, override: str | None = None) -> Plan:
        try:
            plan: Plan = await self._in_thread(self._loader.plan, folder, override)
        except Exception as error:
            failure = error if isinstance(error, TrineError) else ModelLoadError(f"{type(error).__name__}: {error}")
            self._note_failure(folder, failure.message)
            raise failure from error
        return plan

    def _note_failure(self, folder: ModelFolder, reason: str) -> None:
        """A configuration can't be used: what is served stays, what is not says why."""
        logger.error("model %s can't be loaded: %s", folder.name, reason)
        entry = self._entries.setdefault(folder.name, ModelEntry(folder.name))
        if entry.newest is None:
            versions = folder.versions() or [""]
            entry.versions = {version: VersionEntry(UNAVAILABLE, reason) for version in versions}
        else:
            for state in entry.versions.values():
                state.reason = f"a newer configuration can't be loaded: {reason}"

    async def _take_up(self, plan: Plan) -> None:
        """Serve a plan: load versions that are new or have changed, withdraw those that are not in it any more."""
        entry = self._entries.setdefault(plan.folder.name, ModelEntry(plan.folder.name))
        check_circle(plan.config, self._config_of)
        async with entry.lock:
            failures: list[str] = []
            same = entry.config is not None and entry.files == plan.signature and entry.config == plan.config
            resized = not same and entry.config is not None and differ_in_instances_only(entry.config, plan.config)
            for version in plan.versions:
                signature = plan.signatures[version]
                known = entry.versions.get(version)
                unchanged = known is not None and known.model is not None and known.signature == signature
                try:
                    if unchanged and same:
                        known.reason = ""  # type: ignore[union-attr]
                    elif unchanged and resized:
                        await self._resize(known.model, plan)  # type: ignore[union-attr, arg-type]
                    else:
                        await self._load_version(entry, plan, version, signature)
                except TrineError as error:
                    failures.append(f"version {version} is at UNAVAILABLE state: {error.message};")
            if failures:
                raise ModelLoadError(f"load failed for model '{entry.name}': {' '.join(failures)}")
            entry.config, entry.files = plan.config, plan.signature
            for version in [version for version in entry.versions if version not in plan.versions]:
                self._withdraw(entry, version)

    def _config_of(self, name: str) -> ModelConfig | None:
        entry = self._entries.get(name)
        return entry.newest.config if entry is not None and entry.newest is not None else None

    async def _resize(self, model: ServedModel, plan: Plan) -> None:
        """Only instance groups have changed: instances come and go, the weights and the queue stay."""
        fresh, surplus = model.compare_instances(placements(plan.config))
        made = await self._in_thread(self._loader.make_instances, model.loaded, fresh)
        await model.resize(plan.config, made, surplus)

    async def _load_version(self, entry: ModelEntry, plan: Plan, version: str, signature: Signature) -> None:
        known = entry.versions.get(version)
        served = known is not None and known.model is not None
        if not served:
            entry.versions[version] = VersionEntry(LOADING)
        try:
            if served:
                await self._take_breath()
            loaded = await self._load_with_retries(plan, version)
            if served:
                await self._in_thread(rehearse, loaded.config, [placed.instance for placed in loaded.instances])
            self._rested_at = monotonic() + _BREATH
            await self._serve(entry, loaded, signature)
        except Exception as error:
            failure = error if isinstance(error, TrineError) else ModelLoadError(f"{type(error).__name__}: {error}")
            logger.error("model %s version %s can't be loaded: %s", entry.name, version, failure.message)
            if served:
                known.reason = f"a newer state of its files can't be loaded: {failure.message}"  # type: ignore[union-attr]
            else:
                entry.versions[version] = VersionEntry(UNAVAILABLE, failure.message)
            raise failure from error

    async def _take_breath(self) -> None:
        """Wait until the last load is some time ago, so that swaps in a row don't slow the requests.

        A load keeps Python's interpreter for a part of the time, and the event loop from running.
        """
        await asyncio.sleep(self._rested_at - monotonic())

    async def _load_with_retries(self, plan: Plan, version: str) -> LoadedModel:
        for attempt in range(self.settings.load_retries, -1, -1):
            try:
                loaded: LoadedModel = await self._in_thread(self._loader.load, plan, version)
                return loaded
            except Exception:
                if not attempt:
                    raise
                logger.warning("model %s version %s: loading failed, one more attempt", plan.folder.name, version)
        raise AssertionError("unreachable")

    async def _serve(self, entry: ModelEntry, loaded: LoadedModel, signature: Signature) -> ServedModel:
        """Put a loaded version in the place of the one before it, in one step; that one leaves when it is done."""
        assert self._surroundings is not None, "start the repository first"
        model = ServedModel(loaded, self._surroundings, entry.ready)
        try:
            await model.start()
        except BaseException:
            await model.close()
            raise
        before = entry.versions.get(loaded.version)
        entry.versions[loaded.version] = VersionEntry(READY, "", model, signature)
        entry.renew()
        if before is not None and before.model is not None:
            model.follow(before.model)
            self._retire(before.model)
        self._on_demand.evict(keep=entry.name)
        return model

    def _withdraw(self, entry: ModelEntry, version: str) -> None:
        """Stop serving a version."""
        state = entry.versions[version]
        if state.model is None:
            if state.state != UNLOADING:
                del entry.versions[version]
            return
        leaving = entry.versions[version] = VersionEntry(UNLOADING)
        entry.renew()

        def gone() -> None:
            if entry.versions.get(version) is leaving:
                entry.versions[version] = VersionEntry(UNAVAILABLE, UNLOADED)

        self._retire(state.model, gone)

    def _retire(self, model: ServedModel, done: Callable[[], None] | None = None) -> None:
        """Let a model that is not looked up any more finish what it has, then free it."""
        model.successor = self._forward

        async def leave() -> None:
            await self._leave(model, self.settings.drain_seconds)
            if done is not None:
                done()

        self._keep_running(leave())

    def _keep_running(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it as a task that `close` waits for."""
        task = asyncio.create_task(coroutine)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, model: ServedModel, timeout: float) -> None:
        await model.drain(timeout)
        await model.close()

    def _forward(self, request: InferRequest) -> None:
        """A request that had found a model just before another took its place."""
        self.model(request.model_name, request.model_version).submit(request)

    # Following the folders, and loading on demand

    async def _follow(self, changed: Mapping[str, ModelFolder], gone: set[str], known: set[str]) -> None:
        """Poll mode: folders have changed, or are gone."""
        self._known = known
        for name in gone:
            entry = self._entries.get(name)
            if entry is not None:
                await self._withdraw_all(entry)
        for failure in await self._load_all(changed):
            logger.error("still served as before, where it was: %s", failure)

    def wants_load(self, name: str) -> bool:
        """Whether a model that is asked for has to be loaded first: then `load_then` is to be called."""
        return name in self._known and self._on_demand.wants(name)

    def load_then(self, name: str, again: Callable[[], None]) -> None:
        """Load a model that is asked for, then call `again`, whether it could be loaded or not."""
        if not self._on_demand.wait(name, again):
            self._keep_running(self._on_demand.load(name))

    async def _load_if_there(self, name: str) -> None:
        folders, _ = await self._in_thread(self._sources.folders)
        if name in folders:
            await self._load_with_members(folders[name], folders)

    # Traffic

    def traffic(self, name: str) -> TrafficSplit | None:
        """How requests that name no version are spread over a model's versions; None: all go to the newest."""
        return self._entry(name).traffic

    def set_traffic(self, name: str, split: TrafficSplit | None) -> None:
        """Spread requests that name no version. ServerError where a version is not served."""
        entry = self._entry(name)
        if split is not None:
            split.attach(lambda version: self.model(name, version), entry.ready)
        entry.traffic_before, entry.traffic = entry.traffic, split
        entry.renew()

    def roll_back_traffic(self, name: str) -> None:
        """Spread requests as before the last change; once more undoes it."""
        self.set_traffic(name, self._entry(name).traffic_before)

    def _entry(self, name: str) -> ModelEntry:
        entry = self._entries.get(name)
        if entry is None or entry.newest is None:
            raise no_model(name, "", entry)
        return entry

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def count_gpus() -> int:
    """GPUs that PyTorch can use."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
