"""The Python that a model runs in: the server's own, or the one that EXECUTION_ENV_PATH names."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

from trine.core.errors import ModelLoadError

logger = logging.getLogger("trine.server.python")

_DIRECTORY_VARIABLE = "$$TRITON_MODEL_DIRECTORY"
_lock = threading.Lock()
_unpacked: dict[tuple[str, int, int], Path] = {}


def interpreter(path: str, model_directory: Path) -> tuple[str, dict[str, str]]:
    """The interpreter and the environment variables for EXECUTION_ENV_PATH `path`; "" is the server's own.

    path is a directory (a virtual or conda environment) or an archive of one, which is unpacked once. Raises
    ModelLoadError when it is not there or holds no Python.
    """
    variables = dict(os.environ)
    if not path:
        return sys.executable, variables
    place = Path(path.replace(_DIRECTORY_VARIABLE, str(model_directory)))
    if not place.exists():
        raise ModelLoadError(f"EXECUTION_ENV_PATH={path!r}: {place} does not exist")
    if place.is_file() and place.name == "activate":  # bin/activate, or conda-pack's script below lib
        place = _root_of(place)
    directory = place if place.is_dir() else _unpack(place)
    python = directory / "bin" / "python"
    if not python.exists():
        raise ModelLoadError(
            f"EXECUTION_ENV_PATH={path!r} holds no bin/python: give a virtual or conda environment, or an archive of "
            "one made with conda-pack"
        )
    variables["PATH"] = f"{directory / 'bin'}{os.pathsep}{variables.get('PATH', '')}"
    variables["VIRTUAL_ENV" if (directory / "pyvenv.cfg").exists() else "CONDA_PREFIX"] = str(directory)
    for name in ("PYTHONHOME", "PYTHONPATH"):
        variables.pop(name, None)
    if not (directory / "pyvenv.cfg").exists():
        libraries = [str(directory / "lib"), *filter(None, [variables.get("LD_LIBRARY_PATH")])]
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    return str(python), variables


def _root_of(script: Path) -> Path:
    return next((parent for parent in script.parents if (parent / "bin" / "python").exists()), script.parent)


def _unpack(archive: Path) -> Path:
    """The directory that the archive was unpacked into, now or before."""
    status = archive.stat()
    key = (str(archive.resolve()), status.st_mtime_ns, status.st_size)
    with _lock:
        if key not in _unpacked:
            digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
            directory = Path(tempfile.mkdtemp(prefix=f"trine-environment-{digest}-"))
            atexit.register(shutil.rmtree, directory, ignore_errors=True)
            logger.info("unpacking %s", archive)
            try:
                with tarfile.open(archive) as file:
                    file.extractall(directory, filter="tar")
            except (tarfile.TarError, OSError, EOFError) as error:
                raise ModelLoadError(f"EXECUTION_ENV_PATH: {archive} can't be unpacked: {error}") from error
            fix_prefixes = directory / "bin" / "conda-unpack"
            if fix_prefixes.exists():
                subprocess.run([str(directory / "bin" / "python"), str(fix_prefixes)], check=False)
            _unpacked[key] = directory
        return _unpacked[key]
