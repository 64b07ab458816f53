"""What each operator means: importing this package fills the table."""

from __future__ import annotations

from trine.graph.operators import (
    algebra,
    attention,
    casting,
    control,
    convolution,
    elementwise,
    image,
    indexing,
    loss,
    normalization,
    pooling,
    quantization,
    quantized,
    recurrent,
    reduction,
    signal,
    structure,
)
from trine.graph.operators.registry import OPERATORS, Operator, check, find, operator

__all__ = ["OPERATORS", "Operator", "check", "find", "operator"]

_MODULES = (
    algebra, attention, casting, control, convolution, elementwise, image, indexing, loss,
    normalization, pooling, quantization, quantized, recurrent, reduction, signal, structure,
)  # fmt: skip
