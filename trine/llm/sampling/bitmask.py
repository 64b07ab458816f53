"""Sets of allowed tokens as bits: what grammars write and the sampler reads."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """[256, 8] bool: the bits of every byte, least significant first."""
    values = torch.arange(256, device=device)[:, None]
    return (values >> torch.arange(8, device=device)) & 1 != 0


def unpack_bitmask(bitmask: Tensor, vocab_size: int) -> Tensor:
    """[B, ceil(V / 32)] int32 -> [B, V] bool on the same device, True where the token is allowed.

    A table of bytes beats shifting every bit out of its word: it reads an eighth as many elements.
    """
    octets = bitmask.contiguous().view(torch.uint8)
    bits = _bits_of_bytes(bitmask.device)[octets.to(torch.int64)]
    return bits.flatten(1)[:, :vocab_size]
