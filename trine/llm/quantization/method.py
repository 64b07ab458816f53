"""What a way of storing linear weights has to do."""

from __future__ import annotations

import torch

from trine.kernels import ops
from trine.kernels.fp8 import Rows
from trine.kernels.types import Weight


class LinearMethod:
    """A linear weight's life after loading: `process` once, then `apply` at every step.

    This base keeps the weight as the kernels like it best, without loss.
    """

    name = "none"
    rate = 1
    """Multiplications that a GPU does in the time of one of 16 bits."""

    def process(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> Weight:
        """The form of `weight` [N, K] that `apply` reads. The caller drops the original.

        With `scales` [N] the checkpoint holds float8 numbers, which `weight` has as they are: the weight itself is
        their product with the scales.
        """
        return ops.pack_weight(weight if scales is None else (weight.float() * scales[:, None]).to(weight.dtype))

    def for_output(self) -> LinearMethod:
        """The method for the projection to the vocabulary."""
        return self

    def apply(
        self, x: Rows, weight: Weight, bias: torch.Tensor | None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[T, K] to [T, N], of x's dtype or `out_dtype`."""
        return ops.linear(x, weight, bias, out_dtype)

    def apply_add(
        self, x: Rows, weight: Weight, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor | None:
        """`apply` as `ops.linear_add` gives it, to be added to `residual` [T, N]."""
        return ops.linear_add(x, weight, bias, residual)

    def apply_add_norm(
        self,
        x: Rows,
        weight: Weight,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        reader: Weight | None,
    ) -> Rows:
        """Add `apply` to `residual` [T, N]; the RMS norm of the sum, as the product with `reader` takes it."""
        return ops.linear_add_norm(x, weight, bias, residual, norm, eps, reader)

    def apply_silu_mul(self, x: Rows, weight: Weight, bias: torch.Tensor | None, reader: Weight) -> Rows:
        """[T, K] to [T, N / 2]: the product's first half, through SiLU, times its second, as `reader` takes it."""
        return ops.linear_silu_mul_for(reader, x, weight, bias)
