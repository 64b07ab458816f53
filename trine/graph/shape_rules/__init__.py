"""One rule an operator: the dtype and shape of its outputs from those of its inputs.

A rule also refuses what the operator does not take (operands of different types, shapes that can't be broadcast): the
mistake is named when a model is built, not when it runs.
"""

from __future__ import annotations

from trine.graph.shape_rules import compute, control, elementwise, layout, quantized
from trine.graph.shape_rules.common import RULES, Context, Facts, refuse

__all__ = ["RULES", "Context", "Facts", "compute", "control", "elementwise", "layout", "quantized", "refuse"]
