"""How nodes run: candidates, timed on this machine at build. docs/graph-tactics.md shows how to add one."""

from __future__ import annotations

from trine.graph.tactics import convolution, layers, linear
from trine.graph.tactics.registry import REFERENCE, Kernel, Tactic, candidates, tactic
from trine.graph.tactics.tuning import Choice, TimingCache, choose_first, kernels_for, tune

__all__ = [
    "REFERENCE",
    "Choice",
    "Kernel",
    "Tactic",
    "TimingCache",
    "candidates",
    "choose_first",
    "kernels_for",
    "tactic",
    "tune",
]

_MODULES = (convolution, layers, linear)
