"""model_repository_agents: the checksum agent, which refuses files that are not what the configuration says."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from trine.core.errors import ConfigurationError, ModelLoadError

ModelConfig = Any


def run_agents(config: ModelConfig, folder: Path) -> None:
    """Run the agents that a configuration names. ConfigurationError: an unknown one; ModelLoadError: it refuses."""
    for agent in config.model_repository_agents.agents:
        if agent.name != "checksum":
            raise ConfigurationError(
                f"model '{config.name}': there is no repository agent '{agent.name}'; there is 'checksum'"
            )
        for key, expected in agent.parameters.items():
            _check_sum(config.name, folder, key, expected)


def _check_sum(model: str, folder: Path, key: str, expected: str) -> None:
    """`key` is "MD5:path within the model's folder", `expected` the digest in hexadecimal."""
    algorithm, separator, name = key.partition(":")
    if not separator or algorithm.upper() != "MD5":
        raise ConfigurationError(f"model '{model}': checksum parameter '{key}' must be MD5:<path>")
    try:
        with (folder / name).open("rb") as file:
            actual = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise ModelLoadError(f"model '{model}': the checksum agent can't read {folder / name}: {error}") from error
    if actual != expected.strip().lower():
        raise ModelLoadError(f"model '{model}': Mismatched MD5 hash for file {name}, expect: {expected}, got: {actual}")
