"""The CPU's own way of running a graph: kernels of the native library, recorded on a tape and run in one call.

docs/graph-native.md says how it works and how to add a kernel.
"""

from __future__ import annotations

from trine.graph.native import bf16, convolution, elementwise, linear, pooling, products, quantized, rows, structure
from trine.graph.native.executor import Executor
from trine.graph.native.packed import Packed
from trine.graph.native.program import NativeProgram
from trine.graph.native.recorder import RULES, Recorder, native
from trine.graph.native.tape import native_is_available
from trine.graph.native.tensor import Tensor

__all__ = ["RULES", "Executor", "NativeProgram", "Packed", "Recorder", "Tensor", "native", "native_is_available"]

_MODULES = (bf16, convolution, elementwise, linear, pooling, products, quantized, rows, structure)
"""Rules register themselves when they are imported."""
