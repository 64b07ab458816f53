"""A model's folder: configuration, versions, and whether anything in it has changed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ModelConfig = Any
Signature = tuple[tuple[str, int, int], ...]
"""Path, modification time in ns and size of each file."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model as it lies in a repository; `name` is the folder's, `repository` where it was found."""

    name: str
    path: Path
    repository: str

    def versions(self) -> list[str]:
        """The version directories, by number: names that are decimal numbers above zero without a leading zero."""
        return sorted((entry.name for entry in _directories(self.path) if is_version(entry.name)), key=int)

    def version_path(self, version: str) -> Path:
        return self.path / version

    def signature(self) -> Signature:
        """Changes whenever a file of the configuration does; versions have their own."""
        return _signature(self.path, (entry for entry in _entries(self.path) if not is_version(entry.name)))

    def whole_signature(self) -> tuple[Signature, ...]:
        """Changes whenever anything in the folder does."""
        return (self.signature(), *(self.version_signature(version) for version in self.versions()))

    def version_signature(self, version: str) -> Signature:
        return _signature(self.path, [self.path / version])


def is_version(name: str) -> bool:
    return name.isascii() and name.isdigit() and not name.startswith("0")


def scan(repositories: Iterable[tuple[str, Path]]) -> list[ModelFolder]:
    """Every folder of every repository (given with the folder that holds its files), sorted by name."""
    found = [
        ModelFolder(entry.name, entry, repository)
        for repository, root in repositories
        for entry in _directories(root)
        if not entry.name.startswith(".")
    ]
    return sorted(found, key=lambda folder: folder.name)


def chosen_versions(config: ModelConfig, available: list[str]) -> list[str]:
    """The versions that the version policy serves, of those available (sorted by number)."""
    policy = config.version_policy
    if policy.HasField("all"):
        return available
    if policy.HasField("specific"):
        wanted = {str(version) for version in policy.specific.versions}
        return [version for version in available if version in wanted]
    return available[-max(1, policy.latest.num_versions) :]


def _entries(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _directories(path: Path) -> list[Path]:
    return [entry for entry in _entries(path) if entry.is_dir()]


def _signature(root: Path, paths: Iterable[Path]) -> Signature:
    found: list[tuple[str, int, int]] = []
    for path in paths:
        if path.is_dir():
            for folder, _, files in os.walk(path):
                found.append(_stamp(root, Path(folder)))
                found.extend(_stamp(root, Path(folder, file)) for file in files)
        else:
            found.append(_stamp(root, path))
    return tuple(sorted(found))


def _stamp(root: Path, path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError:  # gone meanwhile: the next look sees it
        return (str(path.relative_to(root)), 0, 0)
    # A folder's own time changes with what is written into it, its size says nothing.
    return (
        str(path.relative_to(root)),
        0 if path.is_dir() else status.st_mtime_ns,
        0 if path.is_dir() else status.st_size,
    )
