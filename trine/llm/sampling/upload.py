"""Host values on the sampler's device, and its results on the host, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(values: Sequence[Any] | npt.NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A list or array as a tensor on the device; shares the array's memory on a CPU.

    Pinned on the way to a GPU: a copy from other memory would wait for the work before it.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class PinnedRing:
    """A few pinned int32 buffers of one size in turn: the next is written while a copy still reads the last."""

    def __init__(self, size: int, count: int = 4) -> None:
        self._buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(count)]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._copied = [torch.cuda.Event() for _ in range(count)]  # type: ignore[no-untyped-call]
        self._at = 0

    def next(self) -> npt.NDArray[np.int32]:
        """The buffer to write now; waits for its last copy, which is long done as a rule."""
        self._at = (self._at + 1) % len(self._buffers)
        self._copied[self._at].synchronize()
        return self._arrays[self._at]

    def copy_to(self, target: Tensor, count: int) -> None:
        """Copy the first `count` numbers to those of `target`, in the order of the device's other work."""
        target[:count].copy_(self._buffers[self._at][:count], non_blocking=True)
        self._copied[self._at].record()
