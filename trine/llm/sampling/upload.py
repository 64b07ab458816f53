"""Host values on the sampler's device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def upload(values: Sequence[Any] | npt.NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A list or array as a tensor on the device; shares the array's memory on a CPU.

    Pinned on the way to a GPU: a copy from other memory would wait for the work before it.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
