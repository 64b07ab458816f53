"""Logging set up once a process: one line a record, for people or as JSON.

Everything in Trine logs through the standard library under the name `trine`. The command line calls `configure`;
a program that imports Trine keeps its own logging.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

LEVELS = ("debug", "info", "warning", "error")
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LineFormatter(logging.Formatter):
    """`14:03:05 INFO trine.service message key=value`; extra attributes of the record follow the message."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extra = "".join(f" {key}={value}" for key, value in extra_attributes(record).items())
        line = f"{clock} {record.levelname:<7} {record.name} {record.getMessage()}{extra}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (seconds), level, logger, message, the record's extra attributes, exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **extra_attributes(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def extra_attributes(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra=`."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}


def configure(level: str = "info", *, json_lines: bool = False, stream: TextIO | None = None) -> None:
    """Send `trine` and `uvicorn` records at `level` and above to `stream` (standard error by default).

    Called again, it replaces what the earlier call set up.
    """
    if level.lower() not in LEVELS:
        from trine.core.errors import ConfigurationError

        raise ConfigurationError(
            f"log level {level!r} is unknown: choose one of {', '.join(LEVELS)}", param="log_level"
        )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if json_lines else LineFormatter())
    numeric = getattr(logging, level.upper())
    for name, minimum in (("trine", numeric), ("uvicorn", max(numeric, logging.WARNING))):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(minimum)
        logger.propagate = False
