"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import nn

from trine.kernels import ops
from trine.kernels.fp8 import Rows
from trine.kernels.types import Weight
from trine.llm.layers.module import WeightedModule, WeightKey, empty_parameter


class RMSNorm(WeightedModule):
    """x / sqrt(mean(x²) + eps) * weight."""

    weight: nn.Parameter

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.dtype = dtype

    def expected_weights(self) -> dict[WeightKey, tuple[int, ...]]:
        return {WeightKey("weight"): (self.size,)}

    def create_weights(self, device: torch.device) -> None:
        self.weight = empty_parameter((self.size,), self.dtype, device)

    def load_weight(self, key: WeightKey, tensor: torch.Tensor) -> None:
        getattr(self, key.name).copy_(tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def for_product(self, x: torch.Tensor, reader: Weight) -> Rows:
        """The norm in the form that the product with `reader` takes."""
        return ops.rms_norm_for(reader, x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add x to `residual` in place, return the norm of the sum."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(RMSNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias."""

    bias: nn.Parameter

    def expected_weights(self) -> dict[WeightKey, tuple[int, ...]]:
        return {WeightKey("weight"): (self.size,), WeightKey("bias"): (self.size,)}

    def create_weights(self, device: torch.device) -> None:
        super().create_weights(device)
        self.bias = empty_parameter((self.size,), self.dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        residual += x
        return self(residual)
