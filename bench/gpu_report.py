"""Figures of a GPU run: printed as they come, kept for the JSON file, failures collected."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any


class Report:
    """Named figures by section, and what failed."""

    def __init__(self, sections: set[str], file: Path | None) -> None:
        self.sections = sections
        self.file = file
        self.results: dict[str, Any] = {}
        self.failures: list[str] = []

    def show(self, section: str, name: str, **values: Any) -> None:
        self.results.setdefault(section, {})[name] = values
        print(f"{section:9} {name:48}", *(f"{key}={_short(value)}" for key, value in values.items()), flush=True)

    def fail(self, reason: str) -> None:
        self.failures.append(reason)
        print(f"FAILED    {reason}", flush=True)

    def part(self, section: str, work: Callable[[], object]) -> None:
        """Run one part if its section is asked for; what it raises is a failure. The next part runs either way."""
        if section not in self.sections:
            return
        start = perf_counter()
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{section}: {error}")
        print(f"--------- {section}: {perf_counter() - start:.0f} s", flush=True)
        if self.file:
            self.file.write_text(json.dumps(self.results | {"failures": self.failures}, indent=1, default=str))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
