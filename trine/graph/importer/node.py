"""A node on its way from the file into the graph, and what a version's converter may do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trine.graph.dtypes import DType
from trine.graph.errors import UnsupportedOperatorError
from trine.graph.ir import Value, constant

Emit = Callable[[str, list[Value | None], dict[str, Any]], Value]


@dataclass
class RawNode:
    """An ONNX node of operator set `version`, its inputs looked up, its attributes decoded.

    A converter brings it to the newest form in place. `emit(op, inputs, attributes)` adds a node before it and returns
    its output.
    """

    op: str
    name: str
    version: int
    inputs: list[Value | None]
    attributes: dict[str, Any]
    outputs: int
    emit: Emit

    def input(self, index: int) -> Value | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def required(self, index: int) -> Value:
        value = self.input(index)
        if value is None:
            raise self.unsupported(f"needs its input {index}")
        return value

    def set_input(self, index: int, value: Value | None) -> None:
        self.inputs += [None] * (index + 1 - len(self.inputs))
        self.inputs[index] = value

    def unsupported(self, reason: str) -> UnsupportedOperatorError:
        return UnsupportedOperatorError(self.op, self.name, reason)

    def attribute_to_input(self, attribute: str, index: int, dtype: torch.dtype = torch.int64) -> None:
        """What was an attribute once is an input now."""
        if attribute in self.attributes:
            data = torch.tensor(self.attributes.pop(attribute), dtype=dtype)
            self.set_input(index, constant(f"{self.name}.{attribute}", data))

    def dtype_of(self, index: int) -> DType:
        """The type of an input; unsupported where it is not known."""
        dtype = self.required(index).dtype
        if dtype is None:
            raise self.unsupported(f"has an input {index} of unknown type")
        return dtype

    def rank_of(self, index: int) -> int:
        rank = self.required(index).rank
        if rank is None:
            raise self.unsupported(f"of operator set {self.version} has an input {index} of unknown rank")
        return rank
