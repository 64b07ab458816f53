"""The compiler: ONNX models (and torch modules) into plans.

import trine.graph as tg

plan = tg.build("model.onnx")
outputs = plan.run({"x": array})
"""

from __future__ import annotations

from trine.graph.api import Plan, build, load_plan
from trine.graph.errors import (
    ExecutionError,
    InputError,
    ModelFormatError,
    PlanError,
    UnsupportedOperatorError,
    VerificationError,
)

__all__ = [
    "ExecutionError",
    "InputError",
    "ModelFormatError",
    "Plan",
    "PlanError",
    "UnsupportedOperatorError",
    "VerificationError",
    "build",
    "load_plan",
]
