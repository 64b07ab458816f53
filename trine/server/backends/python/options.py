"""Settings of the Python back end: `--backend-config=python,KEY=VALUE`, and a model's own `parameters`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trine.core.errors import ConfigurationError
from trine.core.sizes import parse_size
from trine.server.backends.python.environment import interpreter

_TIMEOUT_S = 30.0
_MEMORY_SHARE = 0.8
_KNOWN = {
    "stub-timeout-seconds",
    "memory-limit",
    "shm-default-byte-size",
    "shm-growth-byte-size",
    "shm-region-prefix-name",
    "thread-pool-size",
    "default-max-batch-size",
    "cmdline",
    "backend-directory",
    "min-compute-capability",
    "auto-complete-config",
    "model-directory",
}
"""Those of shared memory are taken and have no effect: regions grow and shrink by themselves and have no names."""


@dataclass(frozen=True, slots=True)
class PythonOptions:
    """How a model's processes run.

    python, environment  the interpreter and its environment variables
    timeout              seconds until a process has to be there, until a batch that nobody waits for any more is given
                         up, and for finalize
    execution_timeout    seconds that a batch may take; None: as long as somebody waits for it
    memory_limit         bytes that a process may take before it is started again
    decoupled            whether a request gets any number of responses
    """

    python: str
    environment: dict[str, str]
    timeout: float
    execution_timeout: float | None
    memory_limit: int
    decoupled: bool


def read_options(config: Any, settings: Mapping[str, str], model_directory: Path) -> PythonOptions:
    """The options of a model. ConfigurationError names the setting that is wrong, ModelLoadError its environment."""
    for name in settings:
        if name not in _KNOWN:
            raise ConfigurationError(
                f"--backend-config=python,{name}: there is no such setting; there are {', '.join(sorted(_KNOWN))}"
            )
    parameters = {name: parameter.string_value for name, parameter in config.parameters.items()}
    given = settings.get("stub-timeout-seconds")
    timeout = _seconds("stub-timeout-seconds", given) if given is not None else _TIMEOUT_S
    limit = parameters.get("MEMORY_LIMIT") or settings.get("memory-limit")
    python, environment = interpreter(parameters.get("EXECUTION_ENV_PATH", ""), model_directory)
    return PythonOptions(
        python=python,
        environment=environment,
        timeout=timeout,
        execution_timeout=timeout if given is not None else None,
        memory_limit=parse_size(limit, name="memory-limit") if limit else int(_MEMORY_SHARE * memory_of_machine()),
        decoupled=config.model_transaction_policy.decoupled,
    )


def _seconds(name: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise ConfigurationError(f"--backend-config=python,{name}={text}: expected a number of seconds above 0")
    return seconds


def memory_of_machine() -> int:
    """Bytes of memory that this machine, or this container, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return total
