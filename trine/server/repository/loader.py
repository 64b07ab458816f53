"""Loading a model's versions, in a thread: configuration, back end, weights, instances, warm-up."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from time import monotonic
from typing import Any

from trine.core.errors import ConfigurationError, ModelLoadError
from trine.server.backends.base import Backend, Device, Host, ModelFiles
from trine.server.configuration import check_config, complete_config, config_from_json, read_config
from trine.server.configuration.complete import ENSEMBLE, fill_backend
from trine.server.model import LoadedModel
from trine.server.proto import pb
from trine.server.repository.files import ModelFolder, chosen_versions
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
    files: Path
    """Where the version directories are: the folder, or a copy with the files of the load request."""


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
        if attach is not None:
            attach(self.host)
        return backend


BUILT_IN = {
    "identity": ("trine.server.backends.identity", "IdentityBackend"),
    "onnxruntime": ("trine.server.backends.onnx", "OnnxBackend"),
    "pytorch": ("trine.server.backends.torch", "TorchBackend"),
    "python": ("trine.server.backends.python", "PythonBackend"),
    "openvino": ("trine.server.backends.openvino", "OpenvinoBackend"),
    "llm": ("trine.server.backends.llm", "LlmBackend"),
}
ALIASES = {"onnx": "onnxruntime", "torch": "pytorch", "tensorrtllm": "llm"}


class Loader:
    """Plans and loads; nothing in it is shared between two loads but the back ends."""

    def __init__(self, settings: RepositorySettings, backends: BackendRegistry, gpus: int) -> None:
        self._settings = settings
        self._backends = backends
        self._gpus = gpus

    def plan(self, folder: ModelFolder, override: str | None = None, files: Path | None = None) -> Plan:
        """Read, complete and check the configuration.

        override: JSON in place of config.pbtxt; files: a folder in place of the model's own
        """
        root = files or folder.path
        where = ModelFolder(folder.name, root, folder.repository)
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
        available = where.versions()
        self._complete(config, where, available)
        check_config(config, gpus=self._gpus)
        versions = chosen_versions(config, available)
        if not versions and config.platform == ENSEMBLE:
            versions = ["1"]
        if not versions:
            raise ModelLoadError(
                f"at least one version must be available under the version policy of model '{folder.name}': {root} has "
                f"{', '.join(available) or 'no version directory'}"
            )
        return Plan(folder, config, versions, root)

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
        files = ModelFiles(plan.folder.path, plan.files / version, version)
        backend_model = self._backends.get(config).load(config, files)
        loaded = LoadedModel(config, version, plan.folder.path, backend_model)
        try:
            for index, (name, device) in enumerate(placements(config)):
                loaded.instances.append((name, device, backend_model.instance(device, index)))
        except BaseException:
            discard(loaded)
            raise
        loaded.load_seconds = monotonic() - began
        return loaded


def discard(loaded: LoadedModel) -> None:
    """Give back what a load that failed on the way has made; asynchronous instances have not been started yet."""
    for name, _, instance in loaded.instances:
        try:
            if not hasattr(instance, "begin"):
                instance.close()
        except Exception:
            logger.exception("instance %s can't be closed", name)
    if loaded.backend_model is not None:
        loaded.backend_model.close()


def placements(config: ModelConfig) -> list[tuple[str, Device]]:
    """Name and device of each instance that the instance groups ask for."""
    kinds = pb.ModelInstanceGroup.Kind
    found: list[tuple[str, Device]] = []
    for group in config.instance_group:
        if group.passive:
            continue
        devices = [Device("cpu")]
        if group.kind == kinds.Value("KIND_GPU"):
            devices = [Device("cuda", index) for index in group.gpus]
        elif group.kind == kinds.Value("KIND_MODEL"):
            devices = [Device("model")]
        for device in devices:
            for index in range(group.count):
                suffix = f"_{index}" if device.kind != "cuda" else f"_{index}_gpu{device.index}"
                found.append((group.name + suffix, device))
    return found
