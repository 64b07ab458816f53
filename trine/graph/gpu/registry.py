"""Candidates for nodes of a lowered graph on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from trine.graph.ir import Node, Value

Kernel: TypeAlias = Callable[..., Any]
"""Takes all inputs of its node; what it needs of constants it has prepared, and ignores them there."""
Options: TypeAlias = Iterator[tuple[str, Callable[[], Kernel]]]
"""Names of candidates, each with what makes its kernel."""


@dataclass(eq=False)
class Target:
    """Where a graph runs: the device, and the float type that stands for float32 there."""

    device: torch.device
    dtype: torch.dtype
    tf32: bool = True
    """Whether products of float32 may be rounded to TF32, as those of our kernels are on a GPU."""
    forms: dict[tuple[Value, str], Tensor] = field(default_factory=dict)

    @property
    def triton(self) -> bool:
        """Whether Triton's kernels run there: on a GPU, or anywhere in its interpreter."""
        return self.device.type == "cuda" or _interprets()

    @property
    def products(self) -> bool:
        """Whether our kernels' products are precise enough there."""
        return self.triton and (self.tf32 or not self.cuda or self.dtype is not torch.float32)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def constant(self, value: Value, form: str = "", make: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The constant's data there, floats of the target's type (finite if they were), made into `form` once."""
        key = value, form
        if key not in self.forms:
            data = value.data.to(self.device)
            if data.dtype is torch.float32 and self.dtype is not torch.float32:
                largest = torch.finfo(self.dtype).max
                finite = torch.where(data.isinf(), data, data.clamp(-largest, largest))
                data = finite.to(self.dtype)
            self.forms[key] = data if make is None else make(data)
        return self.forms[key]

    def optional(self, value: Value | None) -> Tensor | None:
        return None if value is None else self.constant(value)


def _interprets() -> bool:
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


_OPTIONS: dict[str, list[Callable[[Node, Target], Options]]] = {}


def options_for(op: str) -> Callable[[Callable[[Node, Target], Options]], Callable[[Node, Target], Options]]:
    """Register the decorated function as a source of candidates for nodes `op`, best guess first."""

    def register(function: Callable[[Node, Target], Options]) -> Callable[[Node, Target], Options]:
        _OPTIONS.setdefault(op, []).append(function)
        return function

    return register


def options(node: Node, target: Target) -> dict[str, Callable[[], Kernel]]:
    """Every candidate that applies to the node, by name."""
    return {name: make for source in _OPTIONS.get(node.op, []) for name, make in source(node, target)}


def constant_inputs(node: Node, first: int, last: int) -> bool:
    """Whether inputs first to last, where they are there, are constants."""
    return all(value is None or value.is_constant for value in node.inputs[first : last + 1])
