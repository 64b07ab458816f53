"""The back end `python`: models that are a class TritonPythonModel in a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trine.core.errors import ModelLoadError
from trine.server.backends.base import Device, Host, ModelFiles
from trine.server.backends.python import wire
from trine.server.backends.python.instance import PythonInstance
from trine.server.backends.python.options import PythonOptions, read_options
from trine.server.backends.python.process import ModelProcess
from trine.server.configuration import config_from_json
from trine.server.describe import message_to_dict

logger = logging.getLogger("trine.server.python")

ModelConfig = Any
_KINDS = {"cpu": "CPU", "cuda": "GPU", "model": "MODEL"}


class PythonBackend:
    """Runs Triton's Python models, each instance in a process of its own."""

    name = "python"

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._settings = settings
        self._host: Host | None = None

    def attach(self, host: Host) -> None:
        """What models may call; they can be completed without it, not loaded."""
        self._host = host

    def complete(self, config: ModelConfig, files: ModelFiles) -> None:
        """Run the model's `auto_complete_config`, in a process of its own."""
        file = model_file(config, files)
        options = read_options(config, self._settings, files.directory)
        arguments = _arguments(config, files, file) | {"complete": True}
        completed = _complete(options, arguments, f"{config.name}_completion")
        if completed is not None:
            config.CopyFrom(config_from_json(completed, f"auto_complete_config of model '{config.name}'"))

    def load(self, config: ModelConfig, files: ModelFiles) -> PythonModel:
        file = model_file(config, files)
        assert self._host is not None
        return PythonModel(config, files, file, read_options(config, self._settings, files.directory), self._host)


class PythonModel:
    """A version of a model."""

    def __init__(self, config: ModelConfig, files: ModelFiles, file: Path, options: PythonOptions, host: Host) -> None:
        self._arguments = _arguments(config, files, file)
        self._name: str = config.name
        self._options = options
        self._host = host

    def instance(self, device: Device, index: int) -> PythonInstance:
        arguments = {
            **self._arguments,
            "instance": f"{self._name}_0_{index}",
            "kind": _KINDS[device.kind],
            "device": device.index,
        }
        return PythonInstance(arguments["instance"], self._options, arguments, self._host)

    def close(self) -> None:
        """Nothing is shared between instances."""


def model_file(config: ModelConfig, files: ModelFiles) -> Path:
    """The file that defines the model. ModelLoadError where there is none."""
    file = files.version_directory / (config.default_model_filename or "model.py")
    if not file.is_file():
        raise ModelLoadError(
            f"Python model file not found in '{file}': put the model's class there, or name its file with "
            "default_model_filename"
        )
    return file


def _arguments(config: ModelConfig, files: ModelFiles, file: Path) -> dict[str, Any]:
    return {
        "file": str(file.resolve()),
        "name": config.name,
        "version": files.version,
        "directory": str(files.directory.resolve()),
        "config": json.dumps(message_to_dict(config)),
        "complete": False,
    }


def _complete(options: PythonOptions, arguments: dict[str, Any], name: str) -> str | None:
    """The configuration that the model returns as JSON, or None. Blocks; no event loop is needed."""
    process = ModelProcess(options.python, options.environment, name)
    try:
        process.send(wire.INITIALIZE, arguments)
        while True:
            message = process.receive_blocking()
            if message is None:
                raise ModelLoadError(
                    f"model '{arguments['name']}': its process {process.wait()} in auto_complete_config"
                )
            kind = message[0]
            if kind == wire.READY:
                result: str | None = message[2]
                return result
            if kind == wire.FAILED:
                raise ModelLoadError(message[1])
            if kind == wire.LOG:
                logger.info("%s: %s", name, message[2])
            elif kind == wire.CALL:
                process.send_aside(wire.REPLY, message[1], None, "not available in auto_complete_config")
    finally:
        process.kill()
        process.wait()
