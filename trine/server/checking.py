"""`trine check`: what would be wrong with a model repository, found without serving it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trine.core.errors import TrineError
from trine.server.backends.base import Device
from trine.server.backends.compilation import NAMES
from trine.server.errors import Code, ServerError
from trine.server.repository.files import ModelFolder
from trine.server.repository.loader import BackendRegistry, Loader, Plan, discard, members, placements
from trine.server.repository.planning import check_circle
from trine.server.repository.repository import count_gpus
from trine.server.repository.settings import RepositorySettings
from trine.server.repository.sources import Sources
from trine.server.scheduling.controls import States
from trine.server.scheduling.graph import Graph
from trine.server.warmup import check_samples

ModelConfig = Any
Severity = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of a model. `detail` names file, key and remedy."""

    model: str
    severity: Severity
    detail: str


def check_repository(settings: RepositorySettings, *, load: bool = False) -> Iterator[Finding]:
    """Findings model by model. `load`: load each model's files too, and free them at once.

    Raises TrineErrors for a repository that can't be read at all.
    """
    sources = Sources(settings.directories)
    sources.check()
    loader = Loader(settings, BackendRegistry(settings.backend_settings), count_gpus())
    folders, twice = sources.folders()
    plans: dict[str, Plan] = {}
    for name, folder in folders.items():
        if name in twice and not settings.namespacing:
            yield Finding(name, "problem", f"the model is in more than one repository: {', '.join(twice[name])}")
            continue
        try:
            plans[name] = loader.plan(folder)
        except Exception as error:
            yield Finding(name, "problem", _message(error))
    for name, plan in plans.items():
        yield from _check_plan(loader, folders[name], plan, plans, load)
    sources.close()


def _check_plan(
    loader: Loader, folder: ModelFolder, plan: Plan, plans: dict[str, Plan], load: bool
) -> Iterator[Finding]:
    name = folder.name
    try:
        if members(plan.config):
            check_circle(plan.config, lambda member: plans[member].config if member in plans else None)
            Graph(plan.config, lambda member, version: _member(name, plans, member, version))
        check_samples(plan.config, folder.path)
        States(plan.config, folder.path)
        if load and not members(plan.config):
            for version in plan.versions:
                discard(loader.load(plan, version))
    except Exception as error:
        yield Finding(name, "problem", _message(error))
        return
    yield Finding(name, "ok", _summary(plan))
    yield from (Finding(name, "note", note) for note in _notes(plan.config, folder.path))


def _member(ensemble: str, plans: dict[str, Plan], member: str, version: str) -> ModelConfig:
    plan = plans.get(member)
    if plan is None or (version and version not in plan.versions):
        raise ServerError(
            f"ensemble {ensemble} depends on '{member}'{f' version {version}' if version else ''}, which the "
            "repository does not have, or which has problems itself",
            Code.NOT_FOUND,
        )
    return plan.config


def _message(error: Exception) -> str:
    return error.message if isinstance(error, TrineError) else f"{type(error).__name__}: {error}"


def _summary(plan: Plan) -> str:
    config = plan.config
    parts = [config.backend or config.platform, f"version {', '.join(plan.versions)}"]
    if config.max_batch_size:
        batching = ", dynamic" if config.HasField("dynamic_batching") else ""
        parts.append(f"batches up to {config.max_batch_size}{batching}")
    if config.HasField("sequence_batching"):
        parts.append("sequences")
    places = placements(config)
    if places:
        kinds = sorted({_device(place.device) for place in places})
        parts.append(f"{len(places)} instance{'s' if len(places) > 1 else ''} on {', '.join(kinds)}")
    return "; ".join(parts)


def _device(device: Device) -> str:
    return f"GPU {device.index}" if device.kind == "cuda" else "CPU"


def _notes(config: ModelConfig, folder: Path) -> Iterator[str]:
    """What is accepted and has no effect here, or probably not the one meant."""
    accelerators = config.optimization.execution_accelerators
    for accelerator in (*accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator):
        if accelerator.name not in NAMES or config.backend != "onnxruntime":
            yield f"execution accelerator {accelerator.name!r} is not used: the back end runs the model itself"
    if config.HasField("dynamic_batching") and config.max_batch_size <= 1:
        yield f"dynamic_batching does nothing: max_batch_size is {config.max_batch_size}"
    for output in config.output:
        if output.label_filename and not (folder / output.label_filename).is_file():
            yield f"label_filename {output.label_filename!r} of output '{output.name}' is not in {folder}"
    if any(path.name == "config.pbtxt" for path in folder.glob("*/config.pbtxt")):
        yield "a config.pbtxt in a version directory is not read: only the one beside the versions is"
