"""Candidates for how a node runs. A tactic makes a kernel for a node, or None where it does not apply.

The operator's own meaning is always the last candidate, and what every other one is checked against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from trine.graph.ir import Node

Kernel: TypeAlias = Callable[..., Any]
Maker: TypeAlias = Callable[[Node], Kernel | None]

REFERENCE = "reference"


@dataclass(frozen=True)
class Tactic:
    name: str
    make: Maker


TACTICS: dict[str, list[Tactic]] = {}


def tactic(op: str, name: str) -> Callable[[Maker], Maker]:
    """Register a maker of kernels for nodes `op`. The first that applies runs where nothing is timed."""

    def register(make: Maker) -> Maker:
        TACTICS.setdefault(op, []).append(Tactic(name, make))
        return make

    return register


def candidates(node: Node) -> list[Tactic]:
    return TACTICS.get(node.op, [])
