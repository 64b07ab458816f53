"""float8 (e4m3) weights and activations: half the memory traffic of bfloat16 and twice its arithmetic, on Hopper.

Weights have a scale for each output channel, activations one for each token, found as they come: nothing has to be
calibrated. A bfloat16 checkpoint is rounded at load. Checkpoints that hold float8 load as they are, with a scale for a
whole tensor or for each channel; blocks of 128 by 128 are rounded anew by channel. Their static scales of activations
are not used: a token's own scale rounds it at least as finely.
"""

from __future__ import annotations

from typing import Any

import torch

from trine.kernels import ops
from trine.kernels.types import Weight
from trine.llm.quantization.method import LinearMethod


class Fp8(LinearMethod):
    """float8 for every linear layer but the projection to the vocabulary.

    `as_stored`: the checkpoint decides which layers are float8; what it holds plain stays so.
    """

    name = "fp8"
    rate = 2

    def __init__(self, as_stored: bool = False) -> None:
        self.as_stored = as_stored

    def process(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> Weight:
        if scales is None and self.as_stored:
            return ops.pack_weight(weight)
        return ops.pack_fp8(weight, scales)

    def for_output(self) -> LinearMethod:
        """Plain: it takes a fiftieth of a model's products, and its rounding would show in every probability."""
        return LinearMethod()


def is_fp8_checkpoint(config: dict[str, Any]) -> bool:
    """Whether a checkpoint's `quantization_config` describes float8 weights in a form that loads."""
    method = config.get("quant_method")
    if method != "compressed-tensors":
        return method in ("fp8", "fbgemm_fp8")
    weights = [(group.get("weights") or {}) for group in (config.get("config_groups") or {}).values()]
    return bool(weights) and all(own.get("type") == "float" and own.get("num_bits") == 8 for own in weights)
