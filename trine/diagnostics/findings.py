"""One fact about the machine or a model, whether it is a problem, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`name` is what was looked at, `detail` what was found. A warning or problem has a `remedy`."""

    section: str
    name: str
    severity: Severity
    detail: str
    remedy: str = ""
