"""Products for kernels that sum up parts as they read: where a Hopper GPU gains by leaving them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from trine.kernels.fp8 import DTYPE, Fp8Weight, Rows, RowToNorm

PARTS_ROWS = {torch.bfloat16: (range(88, 129), range(216, 257)), DTYPE: (range(65, 512),)}
"""Numbers of rows, by the weights' type, that the library takes longer for; fewer are streamed."""


@cache
def _hopper(device: torch.device) -> ModuleType | None:
    """The kernel for Hopper GPUs, on one with a Triton that has Gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        return import_module("trine.kernels.triton.hopper_matrix")
    except ImportError:
        return None


def in_parts(x: Rows, weight: torch.Tensor | Fp8Weight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """x [T, K] times the transpose of weight [N, K], plus bias [N], as parts [P, T, N]; None where that is no
    faster than a whole sum.
    """
    values = weight.values if isinstance(weight, Fp8Weight) else weight
    if isinstance(x, RowToNorm) or not any(x.shape[0] in rows for rows in PARTS_ROWS.get(values.dtype, ())):
        return None
    hopper = _hopper(x.device)
    if hopper is None or not hopper.supports(x, weight):
        return None
    parts: torch.Tensor = hopper.linear_parts(x, weight, bias)
    return parts
