"""Where models lie: local folders, folders behind a URL, and folders made from the files of a load request."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from trine.core.errors import ConfigurationError, ModelLoadError
from trine.server.errors import ServerError
from trine.server.repository.files import ModelFolder, scan

logger = logging.getLogger("trine.server")


class Sources:
    """The model folders of all repositories of a server. Its methods block: they read disks and networks."""

    def __init__(self, repositories: tuple[str, ...]) -> None:
        self._local: list[tuple[str, Path]] = []
        self._remote: list[RemoteFolder] = []
        for repository in repositories:
            if "://" in repository:
                remote = RemoteFolder(repository)
                self._remote.append(remote)
                self._local.append((repository, remote.path))
            else:
                self._local.append((repository, Path(repository).expanduser()))

    def check(self) -> None:
        """Raise ConfigurationError where a local repository is not a folder."""
        for repository, path in self._local:
            if "://" not in repository and not path.is_dir():
                raise ConfigurationError(
                    f"--model-repository {repository} is not a folder: give one that holds a folder for each model"
                )

    def folders(self) -> tuple[dict[str, ModelFolder], dict[str, list[str]]]:
        """Model folders by name, and the repositories of each name that occurs in several."""
        for remote in self._remote:
            remote.refresh()
        found: dict[str, ModelFolder] = {}
        twice: dict[str, list[str]] = {}
        for folder in scan(self._local):
            if folder.name in found:
                twice.setdefault(folder.name, [found[folder.name].repository]).append(folder.repository)
            else:
                found[folder.name] = folder
        return found, twice

    def close(self) -> None:
        for remote in self._remote:
            remote.close()


class RemoteFolder:
    """A copy of a folder that fsspec reads (s3://, gs://, abfs://, memory://, …), renewed file by file."""

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise ConfigurationError(f"model repository {url} needs the package fsspec: pip install fsspec") from error
        try:
            self._filesystem, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(f"model repository {url} can't be opened: {error}") from error
        self.url = url
        self._folder = tempfile.TemporaryDirectory(prefix="trine-repository-")
        self.path = Path(self._folder.name)
        self._seen: dict[str, Any] = {}

    def refresh(self) -> None:
        """Bring the copy up to date: fetch files that are new or have changed, remove those that are gone."""
        try:
            self._filesystem.invalidate_cache()
            files = self._filesystem.find(self._root, detail=True)
            now = {str(name): _stamp(details) for name, details in files.items()}
            for name, stamp in now.items():
                if self._seen.get(name) != stamp:
                    target = self._target(name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._filesystem.get_file(name, str(target))
        except Exception as error:
            raise ModelLoadError(f"model repository {self.url} can't be read: {error}") from error
        for name in set(self._seen) - set(now):
            self._target(name).unlink(missing_ok=True)
        self._seen = now
        _remove_empty(self.path)

    def _target(self, name: str) -> Path:
        return self.path / PurePosixPath(name).relative_to(PurePosixPath(self._root))

    def close(self) -> None:
        self._folder.cleanup()


def _stamp(details: dict[str, Any]) -> Any:
    """What changes when the file does, of what the file system tells."""
    keys = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created", "size")
    return tuple(str(details.get(key)) for key in keys)


def _remove_empty(root: Path) -> None:
    """Remove folders without files, as object stores do: an ensemble needs no version folder here."""
    for folder in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def write_files(name: str, files: dict[str, bytes]) -> Path:
    """A folder with the files of a load request, by path within the model's folder ("1/model.onnx").

    ServerError where a path leads out of it. Whoever calls removes the folder.
    """
    for path in files:
        parts = PurePosixPath(path).parts
        if not parts or PurePosixPath(path).is_absolute() or ".." in parts or "\\" in path or "\0" in path:
            raise ServerError(
                f"failed to load '{name}', file path {path!r} must lie within the model's folder, such as 1/model.onnx"
            )
    folder = Path(tempfile.mkdtemp(prefix="trine-model-"))
    try:
        for path, content in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ServerError(f"failed to load '{name}', its files can't be written: {error}") from error
    return folder
