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
    """`channels_last` ones take and give images with the channels innermost.

    Where one applies to a node it is timed on such images, and the operator's own meaning (which keeps the layout that
    it is given) does not compete: changing layouts to and fro would cost more than any kernel gains.
    """

    name: str
    make: Maker
    channels_last: bool = False


TACTICS: dict[str, list[Tactic]] = {}


def tactic(op: str, name: str, *, channels_last: bool = False) -> Callable[[Maker], Maker]:
    """Register a maker of kernels for nodes `op`. The first that applies runs where nothing is timed."""

    def register(make: Maker) -> Maker:
        TACTICS.setdefault(op, []).append(Tactic(name, make, channels_last))
        return make

    return register


def candidates(node: Node) -> list[Tactic]:
    return TACTICS.get(node.op, [])
