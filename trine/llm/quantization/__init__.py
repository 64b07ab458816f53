"""Ways to store linear weights, one file each, by the name that `quantization=` takes."""

from __future__ import annotations

import torch

from trine.core.errors import ConfigurationError
from trine.llm.quantization.int8 import Int8
from trine.llm.quantization.method import LinearMethod

METHODS = {"int8": Int8}


def linear_method(name: str | None, device: torch.device) -> LinearMethod:
    """The method called `name`; None is none. Raises ConfigurationError when it is unknown or not for this device."""
    if name is None:
        return LinearMethod()
    if name not in METHODS:
        raise ConfigurationError(
            f"quantization={name!r} is not known: choose {', '.join(METHODS)} or leave it out", param="quantization"
        )
    if device.type != "cpu":
        raise ConfigurationError(
            f"quantization={name!r} works on the CPU only, not on {device.type}: leave it out", param="quantization"
        )
    return METHODS[name]()
