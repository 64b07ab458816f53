"""Loading a model's versions, in a thread: configuration, back end, weights, instances, warm-up."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from time import monotonic
from typing import Any

from trine.core.errors import ConfigurationError, ModelLoadError
from trine.server.backends.base import Backend, Device, Host, ModelFiles
from trine.server.configuration import check_config, complete_config, config_from_json, read_config
from trine.server.configuration.complete import ENSEMBLE, fill_backend
from trine.server.model import LoadedModel, PlacedInstance, Placement
from trine.server.proto import pb
from trine.server.repository.agents import run_agents
from trine.server.repository.files import ModelFolder, Signature, chosen_versions
from trine.server.repository.settings import RepositorySettings

logger = logging.getLogger("trine.server")

ModelConfig = Any
ENTRY_POINTS = "trine.backends"


@dataclass(slots=True)
class Plan:
    """What is to be served of a model: its configuration and its versions."""

    folder: ModelFolder
    config: ModelConfig
    versions: list[str]
    signature: Signature
    """Of the configuration's files, and below of each version's: as they were before they were read."""
    signatures: dict[str, Signature]


class BackendRegistry:
    """Back ends by name: ours, and those that packages register under the entry point group `trine.backends`."""

    def __init__(self, settings: Mapping[str, Mapping[str, str]]) -> None:
        self._settings = settings
        self.host: Host | None = None
        """Set by the repository before anything is loaded."""
        self._backends: dict[str, Backend] = {}

    def add(self, backend: Backend) -> None:
        self._backends[backend.name] = backend

    def get(self, config: ModelConfig) -> Backend:
        """The back end of a model. ConfigurationError names those that there are."""
        name = ALIASES.get(config.backend, config.backend)
        if name not in self._backends:
            self._backends[name] = self._make(name, config)
        return self._backends[name]

    def _settings_of(self, name: str) -> dict[str, str]:
        return {**self._settings.get("", {}), **self._settings.get(name, {})}

    def _make(self, name: str, config: ModelConfig) -> Backend:
        found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        if name in found:
            return self._attached(found[name].load()(self._settings_of(name)))
        if name not in BUILT_IN:
            known = sorted({*BUILT_IN, *found, *self._backends})
            raise ConfigurationError(
                f"model '{config.name}': there is no back end '{config.backend}'; there are {', '.join(known)}"
            )
        module, attribute = BUILT_IN[name]
        from importlib import import_module

        return self._attached(getattr(import_module(module), attribute)(self._settings_of(name)))

    def _attached(self, backend: Backend) -> Backend:
        attach = getattr(backend, "attach", None)
        if attach is not None and self.host is not None:
            attach(self.host)
        return backend


BUILT_IN = {
    "identity": ("trine.server.backends.identity", "IdentityBackend"),
    "onnxruntime": ("trine.server.backends.onnx", "OnnxBackend"),
    "pytorch": ("trine.server.backends.torch", "TorchBackend"),
    "python": ("trine.server.backends.python", "PythonBackend"),
    "openvino": ("trine.server.backends.openvino", "OpenvinoBackend"),
    "plan": ("trine.server.backends.plan", "PlanBackend"),
    "llm": ("trine.server.backends.llm", "LlmBackend"),
}
ALIASES = {"onnx": "onnxruntime", "torch": "pytorch", "tensorrt": "plan", "tensorrtllm": "llm"}


class Loader:
    """Plans and loads; nothing in it is shared between two loads but the back ends."""

    def __init__(self, settings: RepositorySettings, backends: BackendRegistry, gpus: int) -> None:
        self._settings = settings
        self._backends = backends
        self._gpus = gpus

    def plan(self, folder: ModelFolder, override: str | None = None) -> Plan:
        """Read, complete and check the configuration. `override`: JSON in place of config.pbtxt."""
        signature = folder.signature()
        config = (
            read_config(folder.path, self._settings.config_name)
            if override is None
            else config_from_json(override, f"config of model '{folder.name}'")
        )
        if config.name and config.name != folder.name and override is None:
            raise ConfigurationError(
                f"unexpected directory name '{folder.name}' for model '{config.name}', directory name must equal model "
                "name"
            )
        config.name = folder.name
        available = folder.versions()
        signatures = {version: folder.version_signature(version) for version in available}
        self._complete(config, folder, available)
        check_config(config, gpus=self._gpus)
        versions = chosen_versions(config, available)
        if not versions and config.platform == ENSEMBLE:
            versions = ["1"]
            signatures["1"] = ()
        if not versions:
            raise ModelLoadError(
                f"at least one version must be available under the version policy of model '{folder.name}': "
                f"{folder.path} has {', '.join(available) or 'no version directory'}"
            )
        return Plan(folder, config, versions, signature, signatures)

    def _complete(self, config: ModelConfig, where: ModelFolder, available: list[str]) -> None:
        newest = available[-1] if available else None
        version_path = where.version_path(newest) if newest else None
        fill_backend(config, where.name, version_path)
        complete = None
        if self._settings.auto_complete and version_path is not None and config.backend:
            backend = self._backends.get(config)
            files = ModelFiles(where.path, version_path, newest or "")

            def complete(message: ModelConfig) -> None:
                backend.complete(message, files)

        complete_config(config, gpus=self._gpus, auto_complete=complete)

    def load(self, plan: Plan, version: str) -> LoadedModel:
        """Load one version. Raises TrineErrors; a back end's other errors become ModelLoadErrors."""
        began = monotonic()
        config = plan.config
        if config.platform == ENSEMBLE:
            return LoadedModel(config, version, plan.folder.path, None)
        files = ModelFiles(plan.folder.path, plan.folder.version_path(version), version)
        run_agents(config, plan.folder.path)
        backend_model = self._backends.get(config).load(config, files)
        loaded = LoadedModel(config, version, plan.folder.path, backend_model)
        try:
            loaded.instances = self.make_instances(loaded, placements(config))
        except BaseException:
            discard(loaded)
            raise
        loaded.load_seconds = monotonic() - began
        return loaded

    def make_instances(self, loaded: LoadedModel, wanted: list[Placement]) -> list[PlacedInstance]:
        """Instances of a loaded model. They are not started or warmed up yet."""
        assert loaded.backend_model is not None
        made: list[PlacedInstance] = []
        try:
            for placement in wanted:
                instance = loaded.backend_model.instance(placement.device, placement.index)
                made.append(PlacedInstance(placement, instance))
        except BaseException:
            close_instances(made)
            raise
        return made


def discard(loaded: LoadedModel) -> None:
    """Give back what a load that failed on the way has made; asynchronous instances have not been started yet."""
    close_instances(loaded.instances)
    if loaded.backend_model is not None:
        loaded.backend_model.close()


def close_instances(instances: list[PlacedInstance]) -> None:
    """Close instances that were never started."""
    for placed in instances:
        try:
            if not hasattr(placed.instance, "begin"):
                placed.instance.close()
        except Exception:
            logger.exception("instance %s can't be closed", placed.placement.name)


def placements(config: ModelConfig) -> list[Placement]:
    """Where the instance groups put an instance each."""
    kinds = pb.ModelInstanceGroup.Kind
    found: list[Placement] = []
    for group in config.instance_group:
        if group.passive:
            continue
        devices = [Device("cpu")]
        if group.kind == kinds.Value("KIND_GPU"):
            devices = [Device("cuda", index) for index in group.gpus]
        elif group.kind == kinds.Value("KIND_MODEL"):
            devices = [Device("model")]
        for device in devices:
            for number in range(group.count):
                name = f"{group.name}_{number}"
                if device.kind == "cuda":
                    name += f"_gpu{device.index}"
                found.append(Placement(name, device, len(found), group))
    return found


def members(config: ModelConfig | None) -> list[tuple[str, str]]:
    """Name and version ("": the newest) of each member of an ensemble; none for other models."""
    if config is None or config.platform != ENSEMBLE:
        return []
    return [
        (step.model_name, str(step.model_version) if step.model_version > 0 else "")
        for step in config.ensemble_scheduling.step
    ]
