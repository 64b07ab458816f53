"""How layers get weights: each says which checkpoint tensors it wants, takes them one by one, then packs itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import nn


class WeightKey(NamedTuple):
    """One tensor that a layer takes from a checkpoint: a parameter, or a named part of a fused one ("": the whole)."""

    name: str
    shard: str = ""


class Layer(nn.Module):
    """A module whose result is one tensor.

    It does without `nn.Module`'s hooks, and keeps its parts in the instance's own dictionary too, where Python finds
    them ten times as fast as through `nn.Module.__getattr__`: a decode step of a small model is mostly such calls.
    """

    def __call__(self, *args: Any) -> torch.Tensor:
        result: torch.Tensor = self.forward(*args)
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module | nn.Parameter):
            self.__dict__[name] = value


class WeightedModule(Layer, ABC):
    """A layer with weights of its own. Nothing is allocated before `create_weights`, so that loading can go layer by
    layer and memory peaks at the packed model plus one layer.
    """

    @abstractmethod
    def expected_weights(self) -> dict[WeightKey, tuple[int, ...]]:
        """What to load, with the shape that each tensor has in the checkpoint."""

    def optional_weights(self) -> set[WeightKey]:
        """What a checkpoint may hold besides, in any shape: `load_weight` checks it."""
        return set()

    @abstractmethod
    def create_weights(self, device: torch.device) -> None:
        """Allocate the parameters, uninitialised."""

    @abstractmethod
    def load_weight(self, key: WeightKey, tensor: torch.Tensor) -> None:
        """Copy one checkpoint tensor of the expected shape, any float dtype, into the parameters."""

    def process_weights(self) -> None:
        """Called once when everything is loaded: bring the weights into the form that `forward` reads."""

    def weight_bytes(self) -> int:
        """Memory that the weights take now."""
        return sum(parameter.nbytes for parameter in self.parameters(recurse=False))


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
