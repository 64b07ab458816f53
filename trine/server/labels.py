"""Class names of a classification output."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger("trine.server")


def read_labels(config: Any, output: str, directory: Path | None) -> list[str]:
    """The lines of the output's label_filename, blank ones at the end aside; empty where it names none."""
    tensor = next((tensor for tensor in config.output if tensor.name == output), None)
    if tensor is None or not tensor.label_filename or directory is None:
        return []
    try:
        lines: list[str] = (directory / tensor.label_filename).read_text(encoding="utf-8").rstrip("\r\n").splitlines()
        return lines
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("model %s: no labels for output %s: %s", config.name, output, error)
        return []
