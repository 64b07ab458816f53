"""What a model may ask of its server besides inference: log lines, metrics of its own, loading other models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from trine.server.backends.python import wire
from trine.server.backends.python.stub import connection as wires
from trine.server.backends.python.stub.errors import TritonModelException


class LogLevel(IntEnum):
    """Levels of `Logger`."""

    INFO = 0
    WARNING = 1
    ERROR = 2
    VERBOSE = 3


class Logger:
    """Writes to the server's log."""

    LogLevel = LogLevel
    INFO = LogLevel.INFO
    WARNING = LogLevel.WARNING
    ERROR = LogLevel.ERROR
    VERBOSE = LogLevel.VERBOSE

    @staticmethod
    def log(message: str, level: int = LogLevel.INFO) -> None:
        wires.connection.send(wire.LOG, int(level), str(message))

    @staticmethod
    def log_info(message: str) -> None:
        Logger.log(message, LogLevel.INFO)

    @staticmethod
    def log_warn(message: str) -> None:
        Logger.log(message, LogLevel.WARNING)

    @staticmethod
    def log_error(message: str) -> None:
        Logger.log(message, LogLevel.ERROR)

    @staticmethod
    def log_verbose(message: str) -> None:
        Logger.log(message, LogLevel.VERBOSE)


class MetricKind(IntEnum):
    """Kinds of `MetricFamily`."""

    COUNTER = 0
    GAUGE = 1
    HISTOGRAM = 2


_numbers = itertools.count(1)


class Metric:
    """One time series on the server's metrics page, made by `MetricFamily.Metric`. It goes when this object does."""

    def __init__(self, family: MetricFamily, labels: Mapping[str, Any], buckets: Sequence[float] | None) -> None:
        self._number = 0
        self._family = family  # a family outlives its metrics
        number = next(_numbers)
        wires.connection.ask("metric", number, family._number, dict(labels), None if buckets is None else list(buckets))
        self._number = number

    def increment(self, value: float) -> None:
        """Add to a counter (0 or more) or a gauge."""
        if self._family._kind is MetricKind.HISTOGRAM:
            raise TritonModelException("Failed to increment metric value: a histogram takes observe()")
        if value < 0 and self._family._kind is MetricKind.COUNTER:
            raise TritonModelException("Failed to increment metric value: a counter only grows")
        wires.connection.send(wire.METRIC, self._number, "increment", float(value))

    def set(self, value: float) -> None:
        """Set a gauge."""
        if self._family._kind is not MetricKind.GAUGE:
            raise TritonModelException("Failed to set metric value: only a gauge can be set")
        wires.connection.send(wire.METRIC, self._number, "set", float(value))

    def observe(self, value: float) -> None:
        """Count a value in a histogram."""
        if self._family._kind is not MetricKind.HISTOGRAM:
            raise TritonModelException("Failed to observe metric value: only a histogram observes")
        wires.connection.send(wire.METRIC, self._number, "observe", float(value))

    def value(self) -> float:
        """The value of a counter or gauge, to which every instance may have added."""
        if self._family._kind is MetricKind.HISTOGRAM:
            raise TritonModelException("Failed to get metric value: a histogram has no single value")
        return float(wires.connection.ask("metric_value", self._number))

    def __del__(self) -> None:
        if getattr(self, "_number", 0):
            wires.connection.send_from_destructor(wire.METRIC, self._number, "delete", 0.0)


class MetricFamily:
    """Metrics of one name. A family of the same name elsewhere in the server is the same family."""

    COUNTER = MetricKind.COUNTER
    GAUGE = MetricKind.GAUGE
    HISTOGRAM = MetricKind.HISTOGRAM

    def __init__(self, name: str, description: str, kind: int) -> None:
        self._number = 0
        self._kind = MetricKind(kind)
        number = next(_numbers)
        wires.connection.ask("metric_family", number, str(name), str(description), self._kind.name.lower())
        self._number = number

    def Metric(  # noqa: N802 - the name is the interface
        self, labels: Mapping[str, Any] | None = None, buckets: Sequence[float] | None = None
    ) -> Metric:
        """A time series with `labels`; a histogram needs `buckets`, their ascending upper bounds."""
        if labels is not None and not isinstance(labels, Mapping):
            raise TritonModelException("Failed to create metric. Labels must be a dictionary.")
        if self._kind is MetricKind.HISTOGRAM:
            if buckets is None:
                raise TritonModelException("Failed to create metric. Missing required buckets.")
            if not isinstance(buckets, list | tuple):
                raise TritonModelException("Failed to create metric. Buckets must be a list.")
        elif buckets:
            raise TritonModelException("Failed to create metric. Unexpected buckets found.")
        return Metric(self, labels or {}, buckets)

    def __del__(self) -> None:
        if getattr(self, "_number", 0):
            wires.connection.send_from_destructor(wire.METRIC, self._number, "delete_family", 0.0)


def load_model(model_name: str, config: str = "", files: Mapping[str, bytes] | None = None) -> None:
    """Load or reload a model of the server's repository.

    config: JSON in place of its configuration file. files: contents by "file:PATH", in place of its directory; they
    need config. TritonModelException: why it could not be loaded.
    """
    if config:
        json.loads(config)
    given = None if files is None else {str(path): bytes(content) for path, content in files.items()}
    wires.connection.ask("load_model", str(model_name), config or None, given)


def unload_model(model_name: str, unload_dependents: bool = False) -> None:
    """Unload a model; with unload_dependents also the models that an ensemble of this name is made of."""
    wires.connection.ask("unload_model", str(model_name), bool(unload_dependents))


def is_model_ready(model_name: str, model_version: str = "") -> bool:
    return bool(wires.connection.ask("is_model_ready", str(model_name), str(model_version)))
