"""What a way of storing linear weights has to do."""

from __future__ import annotations

import torch

from trine.kernels import ops
from trine.kernels.types import Weight


class LinearMethod:
    """A linear weight's life after loading: `process` once, then `apply` at every step.

    This base keeps the weight as the kernels like it best, without loss.
    """

    name = "none"

    def process(self, weight: torch.Tensor) -> Weight:
        """The form of `weight` [N, K] that `apply` reads. The caller drops the original."""
        return ops.pack_weight(weight)

    def apply(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[T, K] to [T, N], of x's dtype or `out_dtype`."""
        return ops.linear(x, weight, bias, out_dtype)

    def apply_silu_mul(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, K] to [T, N / 2]: the product's first half, through SiLU, times its second."""
        return ops.linear_silu_mul(x, weight, bias)
