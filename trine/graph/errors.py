"""What can go wrong while a model is compiled or a plan is run; each message is one line with the remedy."""

from __future__ import annotations

from trine.core.errors import ModelLoadError, RequestError


class ModelFormatError(ModelLoadError):
    """A file that is not a valid ONNX model: truncated, cyclic, of wrong types, or reading outside its folder."""

    status = 400


class UnsupportedOperatorError(ModelLoadError):
    """An operator, or one of its attributes, that Trine gives no meaning to."""

    status = 400

    def __init__(self, op: str, node: str, reason: str) -> None:
        super().__init__(f"node {node!r}: operator {op} {reason}")
        self.op = op
        self.node = node


class VerificationError(ModelLoadError):
    """A graph that breaks a rule of docs/graph-ir.md: the model, or a pass, is wrong."""

    status = 400


class PlanError(ModelLoadError):
    """A file that is not a plan of this version, or a plan that does not fit its use."""

    status = 400


class InputError(RequestError):
    """An input of a run that is missing, unknown, or of the wrong dtype or shape."""


class ExecutionError(RequestError):
    """A node that failed on these inputs: shapes that do not fit, an index out of range."""
