"""ONNX models into graphs: `import_model`."""

from __future__ import annotations

from trine.graph.importer.model import import_model

__all__ = ["import_model"]
