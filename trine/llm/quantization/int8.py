"""Weight-only int8, rounded at load: half the memory traffic of bfloat16, activations stay as they are."""

from __future__ import annotations

import torch

from trine.kernels import ops
from trine.kernels.types import Weight
from trine.llm.quantization.method import LinearMethod


class Int8(LinearMethod):
    """Symmetric int8 weights with float scales. Needs no calibration."""

    name = "int8"

    def process(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> Weight:
        return ops.pack_int8(weight if scales is None else (weight.float() * scales[:, None]).to(weight.dtype))
