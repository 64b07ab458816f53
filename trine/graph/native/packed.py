"""Weights in the layouts of kernels: made once a plan, shared by all its tapes, kept in the plan file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock

import torch

from trine.graph.dtypes import FROM_TORCH
from trine.graph.ir import Graph, Value
from trine.graph.native.tensor import Buffer, Tensor, contiguous_strides


class Packed:
    """Packed weights by weight and layout. `given` are those that somebody packed before; `entries` are in use."""

    def __init__(self, graph: Graph, given: Mapping[str, torch.Tensor] | None = None) -> None:
        self._own = set(graph.constants())
        self._lock = Lock()
        self.entries: dict[str, torch.Tensor] = {}
        self._given = dict(given or {})
        self._others: dict[tuple[Value, str], torch.Tensor] = {}
        self._companions: dict[tuple[Value, str], Value] = {}

    def get(self, weight: Value, layout: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The weight in `layout` (a name that says all that the layout depends on besides the weight)."""
        with self._lock:
            if weight not in self._own:  # a constant of one set of shapes only: its name may mean another elsewhere
                if (weight, layout) not in self._others:
                    self._others[weight, layout] = make()
                return self._others[weight, layout]
            key = f"{layout}:{weight.name}"
            if key not in self.entries:
                found = self._given.get(key)
                self.entries[key] = make() if found is None else found
            return self.entries[key]

    def companion(self, weight: Value, kind: str, make: Callable[[], Value]) -> Value:
        """A constant made of another one, which rules may pack as if it were the model's."""
        with self._lock:
            key = (weight, kind)
            if key not in self._companions:
                self._companions[key] = make()
                if weight in self._own:
                    self._own.add(self._companions[key])
            return self._companions[key]


def constant_tensor(data: torch.Tensor) -> Tensor:
    """A tensor at a fixed address; `data` is contiguous, and kept alive by whoever keeps this."""
    buffer = Buffer(data.numel() * data.element_size(), address=data.data_ptr(), owner=data)
    shape = tuple(data.shape)
    return Tensor(buffer, FROM_TORCH[data.dtype], shape, contiguous_strides(shape))
