"""Torch modules and exported programs as ONNX models."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from trine.core.errors import ConfigurationError


def is_torch(source: Any) -> bool:
    return isinstance(source, torch.nn.Module | torch.export.ExportedProgram)


def to_onnx(source: Any, args: Sequence[torch.Tensor] | None) -> Any:
    """Bytes or a ModelProto of a module, for the shapes of `args`, or of a program with its own (open) shapes.

    The tracing exporter, which needs no further package, comes first; what it can't write goes to the one that
    torch.export is the front of, which needs onnxscript. ConfigurationError says what failed.
    """
    if isinstance(source, torch.export.ExportedProgram):
        return _exported(source, None)
    if args is None:
        raise ConfigurationError("a torch module needs args, example inputs to trace it with")
    try:
        return _traced(source, args)
    except Exception as error:
        if find_spec("onnxscript") is None:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigurationError(
                f"torch can't trace this module to ONNX ({reason}); its other exporter may: pip install onnxscript"
            ) from error
        return _exported(source, tuple(args))


def _traced(module: torch.nn.Module, args: Sequence[torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    write: Any = buffer
    with _quietly():
        torch.onnx.export(module, tuple(args), write, opset_version=17, dynamo=False)
    return buffer.getvalue()


def _exported(source: Any, args: tuple[Any, ...] | None) -> Any:
    if find_spec("onnxscript") is None:
        raise ConfigurationError("an exported program needs the package onnxscript: pip install onnxscript")
    try:
        with _quietly():
            program = torch.onnx.export(source, args or (), dynamo=True, verbose=False)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(f"torch can't export this to ONNX: {reason}") from error
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quietly() -> Any:
    """Exporters print the whole graph of a module that they can't write."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
