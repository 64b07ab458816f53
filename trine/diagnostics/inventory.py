"""The models that are on this machine, and the architectures that run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from trine.core.sizes import format_bytes
from trine.diagnostics.machine import hub_cache


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A checkpoint on disk. `runs`: its architecture is supported. `weight_bytes` counts its safetensors files."""

    name: str
    where: str
    path: str
    architecture: str
    weight_bytes: int
    runs: bool

    @property
    def size(self) -> str:
        return format_bytes(self.weight_bytes)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "where", "path", "architecture", "weight_bytes", "runs")}


def architectures() -> dict[str, list[str]]:
    """Supported architecture names, as config.json gives them, by what they are for."""
    from trine.llm.models import DECODERS, ENCODERS

    return {"text": sorted(DECODERS), "embeddings": sorted(ENCODERS)}


def local_models(cache: Path | None = None) -> list[LocalModel]:
    """The embedded model, then those in the hub client's cache (newest snapshot of each)."""
    found = []
    embedded = Path(str(resources.files("trine"))) / "data"
    for config in sorted(embedded.glob("*/config.json")):
        found.append(_describe(config, config.parent.name, "embedded"))
    for repository in sorted((cache or hub_cache()).glob("models--*")):
        snapshots = sorted(repository.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
        if snapshots:
            name = repository.name.removeprefix("models--").replace("--", "/")
            found.append(_describe(snapshots[-1], name, "hub cache"))
    return found


def _describe(config: Path, name: str, where: str) -> LocalModel:
    known = {name for names in architectures().values() for name in names}
    try:
        architecture = str((json.loads(config.read_text()).get("architectures") or ["none given"])[0])
    except (OSError, ValueError):
        architecture = "unreadable config.json"
    size = sum(file.stat().st_size for file in config.parent.glob("*.safetensors"))
    return LocalModel(name, where, str(config.parent), architecture, size, architecture in known)
