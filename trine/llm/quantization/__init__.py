"""Ways to store linear weights, one file each, by the name that `quantization=` takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trine.core.errors import ConfigurationError
from trine.llm.quantization.fp8 import Fp8, is_fp8_checkpoint
from trine.llm.quantization.int8 import Int8
from trine.llm.quantization.method import LinearMethod

__all__ = ["METHODS", "LinearMethod", "is_fp8_checkpoint", "linear_method", "stored_method"]

METHODS: dict[str, Callable[[], LinearMethod]] = {"int8": Int8, "fp8": Fp8}


def linear_method(name: str | None, device: torch.device) -> LinearMethod:
    """The method called `name`; None is none. Raises ConfigurationError when it is unknown or not for this device."""
    if name is None:
        return LinearMethod()
    if name not in METHODS:
        raise ConfigurationError(
            f"quantization={name!r} is not known: choose {', '.join(METHODS)} or leave it out", param="quantization"
        )
    if name == "int8" and device.type != "cpu":
        raise ConfigurationError(
            f"quantization='int8' works on the CPU only, not on {device.type}: take fp8, or leave it out",
            param="quantization",
        )
    if name == "fp8" and not _has_fp8(device):
        raise ConfigurationError(
            "quantization='fp8' needs a GPU of compute capability 8.9 (Ada, Hopper) or later: leave it out",
            param="quantization",
        )
    return METHODS[name]()


def stored_method(device: torch.device, dummy: bool = False) -> LinearMethod:
    """The method for a checkpoint of float8 weights: as they are where the device multiplies them, else widened. With
    `dummy` weights, which are not stored, every linear layer is float8.
    """
    return Fp8(as_stored=not dummy) if _has_fp8(device) else LinearMethod()


def _has_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
