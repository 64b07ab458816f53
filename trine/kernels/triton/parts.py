"""Products for kernels that sum up parts as they read: where a Hopper GPU gains by leaving them."""

from __future__ import annotations

import torch

from trine.kernels.fp8 import DTYPE, Fp8Weight, Rows, RowToNorm
from trine.kernels.triton.device import hopper_kernels

PARTS_ROWS = {torch.bfloat16: (range(88, 129), range(216, 257)), DTYPE: (range(65, 512),)}
"""Numbers of rows, by the weights' type, that the library takes longer for; fewer are streamed."""


def in_parts(x: Rows, weight: torch.Tensor | Fp8Weight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """x [T, K] times the transpose of weight [N, K], plus bias [N], as parts [P, T, N]; None where that is no
    faster than a whole sum.
    """
    values = weight.values if isinstance(weight, Fp8Weight) else weight
    if isinstance(x, RowToNorm) or not any(x.shape[0] in rows for rows in PARTS_ROWS.get(values.dtype, ())):
        return None
    hopper = hopper_kernels(x.device, "hopper_matrix")
    if hopper is None or not hopper.supports(x, weight):
        return None
    parts: torch.Tensor = hopper.linear_parts(x, weight, bias)
    return parts
