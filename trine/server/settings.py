"""Trace and log settings, as clients read and change them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from trine.server.errors import Code, ServerError

LEVELS = ("OFF", "TIMESTAMPS", "TENSORS")
MODES = ("triton", "opentelemetry")
_NUMBERS = {"trace_rate": (0, 2**32 - 1), "trace_count": (-1, 2**31 - 1), "log_frequency": (0, 2**32 - 1)}


class TraceSettings:
    """Global settings and what models have of their own.

    level, rate (one of so many requests is traced), count (so many more; -1: no end), log_frequency (a file for so many
    traces; 0: one file), file, mode.
    """

    def __init__(self, *, file: str = "", mode: str = "triton", given: Mapping[str, Any] | None = None) -> None:
        self.file = file
        self.mode = mode
        self._defaults: dict[str, Any] = {
            "trace_level": ["OFF"],
            "trace_rate": 1000,
            "trace_count": -1,
            "log_frequency": 0,
            **(given or {}),
        }
        self._global = dict(self._defaults)
        self._models: dict[str, dict[str, Any]] = {}
        self.generation = 0  # changes with every update: counters start anew

    def of(self, model: str = "") -> dict[str, Any]:
        """The settings in force for a model (empty: for all)."""
        return {**self._global, **self._models.get(model, {})}

    @property
    def any_active(self) -> bool:
        """Whether some request may be traced."""
        levels = [self._global["trace_level"], *(own.get("trace_level") for own in self._models.values())]
        return any(level not in (None, ["OFF"]) for level in levels)

    def update(self, model: str, changes: Mapping[str, object]) -> None:
        """`None` takes a setting back to the global one, or globally to what the server was started with."""
        checked: dict[str, Any] = {}
        for name, value in changes.items():
            if name == "trace_file":
                raise ServerError("trace file location can not be updated through network protocol", Code.UNSUPPORTED)
            if name == "trace_level":
                checked[name] = None if value is None else self._levels(value)
            elif name in _NUMBERS:
                checked[name] = None if value is None else _number(name, value)
            elif name == "trace_mode":
                raise ServerError("trace mode can not be updated through network protocol", Code.UNSUPPORTED)
            else:
                raise ServerError(
                    f"'{name}' is no trace setting: use trace_level, trace_rate, trace_count or log_frequency"
                )
        target = self._models.setdefault(model, {}) if model else self._global
        for name, value in checked.items():
            if value is not None:
                target[name] = value
            elif model:
                target.pop(name, None)
            else:
                target[name] = self._defaults[name]
        self.generation += 1

    def _levels(self, value: object) -> list[str]:
        levels = [value] if isinstance(value, str) else value
        if not isinstance(levels, Sequence) or not all(isinstance(level, str) for level in levels):
            raise ServerError(f"trace_level must be an array of {', '.join(LEVELS)}, got {value!r}")
        unknown = [level for level in levels if level not in LEVELS]
        if unknown:
            raise ServerError(f"trace_level {unknown[0]!r} is unknown: use {', '.join(LEVELS)}")
        active = [level for level in levels if level != "OFF"]
        if active and not self.file and self.mode == "triton":
            raise ServerError("Attempting to set invalid trace setting :trace file name is not given")
        return list(dict.fromkeys(active)) or ["OFF"]

    def describe(self, model: str = "") -> dict[str, Any]:
        """As the protocol has it: numbers are strings."""
        current = self.of(model)
        described: dict[str, Any] = {"trace_level": list(current["trace_level"])}
        described |= {name: str(current[name]) for name in _NUMBERS}
        return described | {"trace_file": self.file, "trace_mode": self.mode}


def _number(name: str, value: object) -> int:
    low, high = _NUMBERS[name]
    text = value[0] if isinstance(value, list) and len(value) == 1 else value
    try:
        number = int(text) if isinstance(text, (str, int)) and not isinstance(text, bool) else None
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        raise ServerError(f"{name} must be a number from {low} to {high}, got {value!r}")
    return number


class LogSettings:
    """What is logged. Changing it changes the level of the logger `trine`."""

    FORMATS = ("default", "ISO8601")

    def __init__(self, *, file: str = "", log_format: str = "default") -> None:
        self.values: dict[str, Any] = {
            "log_file": file,
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": log_format,
        }

    def update(self, changes: Mapping[str, object]) -> None:
        """Raises ServerError for what can't be changed, is unknown or has another type."""
        for name, value in changes.items():
            if name == "log_file":
                raise ServerError("log file location can not be updated through network protocol", Code.UNSUPPORTED)
            if name in ("log_info", "log_warning", "log_error"):
                if not isinstance(value, bool):
                    raise ServerError(f"{name} must be a boolean, got {value!r}")
            elif name == "log_verbose_level":
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    raise ServerError(f"log_verbose_level must be a number from 0 on, got {value!r}")
            elif name == "log_format":
                if value not in self.FORMATS:
                    raise ServerError(f"invalid argument for --log_format, got: {value}", Code.UNAVAILABLE)
            else:
                raise ServerError(f"'{name}' is no log setting: use {', '.join(self.values)}")
        self.values.update(changes)
        self._apply()

    def _apply(self) -> None:
        values = self.values
        level = logging.CRITICAL
        for name in ("error", "warning", "info"):
            if values[f"log_{name}"]:
                level = logging.getLevelNamesMapping()[name.upper()]
        if values["log_verbose_level"] > 0:
            level = logging.DEBUG
        logging.getLogger("trine").setLevel(level)

    def describe(self) -> dict[str, Any]:
        return dict(self.values)
