"""What launches need to know of the device, and the few sizes that kernels are compiled for."""

from __future__ import annotations

from functools import cache

import torch
import triton


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; on a CPU (the interpreter, which runs programs one by one) a handful."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def sequences_block(num_sequences: int) -> int:
    """A power of four, at least 16, not below `num_sequences`: kernels that scan sequences compile once a power."""
    block = 16
    while block < num_sequences:
        block *= 4
    return block


def cdiv(a: int, b: int) -> int:
    """The quotient a / b rounded up."""
    return int(triton.cdiv(a, b))
