"""The compiler's GPU side: graphs become lists of kernels, timed on the device and captured as CUDA graphs."""

from __future__ import annotations

from trine.graph.gpu import spread, tactics
from trine.graph.gpu.plan import PRECISIONS, GpuRuntime, device

__all__ = ["PRECISIONS", "GpuRuntime", "device"]

_MODULES = (tactics, spread)
"""Fills the table of candidates."""
