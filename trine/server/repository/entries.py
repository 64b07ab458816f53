"""What a repository knows of each model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trine.server.errors import Code, ServerError
from trine.server.model import ServedModel
from trine.server.repository.files import Signature

if TYPE_CHECKING:
    from trine.server.traffic import TrafficSplit

ModelConfig = Any

READY, UNAVAILABLE, LOADING, UNLOADING = "READY", "UNAVAILABLE", "LOADING", "UNLOADING"
UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A version of a model in the repository, served or not. A model that was never loaded has no version or state."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(slots=True)
class VersionEntry:
    """What became of a version. `reason` says why it is not ready, or why a newer state of its files is not served."""

    state: str
    reason: str = ""
    model: ServedModel | None = None
    signature: Signature = ()


@dataclass(slots=True)
class ModelEntry:
    """A model by its name: its versions, and which of them answers when a request names none.

    ready: ready versions by number, shared with the served models
    explicit: loaded because somebody asked for it, not only as a member of an ensemble
    """

    name: str
    versions: dict[str, VersionEntry] = field(default_factory=dict)
    ready: list[str] = field(default_factory=list)
    newest: ServedModel | None = None
    config: ModelConfig = None
    files: Signature = ()
    explicit: bool = False
    traffic: TrafficSplit | None = None
    traffic_before: TrafficSplit | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def busy(self) -> bool:
        """Whether one of its versions has a request that is not answered."""
        return any(state.model is not None and state.model.busy for state in self.versions.values())

    @property
    def last_used_ms(self) -> int:
        """When a request was last answered, or the model loaded; milliseconds of wall-clock time."""
        models = [state.model for state in self.versions.values() if state.model is not None]
        return max((max(model.statistics.last_inference_ms, model.loaded_ms) for model in models), default=0)

    def renew(self) -> None:
        """After versions came or went: the list of the ready ones, the newest, and who routes its requests."""
        self.ready[:] = sorted((v for v, state in self.versions.items() if state.model is not None), key=version_order)
        self.newest = self.versions[self.ready[-1]].model if self.ready else None
        for state in self.versions.values():
            if state.model is not None:
                state.model.route(self.traffic.choose if self.traffic and state.model is self.newest else None)


def version_order(version: str) -> tuple[int, str]:
    """Versions by number; names that are no numbers first."""
    return (int(version) if version.isdigit() else -1, version)


def status_table(entries: list[IndexEntry]) -> str:
    """The table that is logged at start: model, version, state and reason."""
    rows = [("Model", "Version", "Status")]
    for entry in entries:
        status = entry.state if not entry.reason else f"{entry.state}: {entry.reason}"
        rows.append((entry.name, entry.version, status))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {name:<{widths[0]}}  {version:<{widths[1]}}  {status}" for name, version, status in rows)


def no_model(name: str, version: str, entry: ModelEntry | None) -> ServerError:
    """Why a request for `name` and `version` can't be served, in the words that Triton's clients know."""
    start = "Request for unknown model: "
    if entry is None or not entry.versions:
        return ServerError(f"{start}'{name}' is not found", Code.NOT_FOUND)
    if not version:
        return ServerError(f"{start}'{name}' has no available versions", Code.NOT_FOUND)
    if version not in entry.versions:
        return ServerError(f"{start}'{name}' version {version} is not found", Code.NOT_FOUND)
    return ServerError(f"{start}'{name}' version {version} is not at ready state", Code.UNAVAILABLE)
