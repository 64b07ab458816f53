"""From logits to one token: temperature, filters, and the inverse of the cumulative distribution.

Probabilities are held as integers: a token's weight is round(2**34 * exp(z)), with z = (logit - largest logit) /
temperature <= 0. Sums of up to 2**19 such weights are exact in float64 whatever the order of the additions, so the
chosen token does not depend on the batch, on the number of threads or on the device's reduction order, and
there is no drift of a float32 cumulative sum over a vocabulary of 150,000. Tokens less probable than 3e-11 of
the most probable one have weight 0.

This is the reference of the CPU library's `sample` (trine.kernels.cpu) and of the GPU's `thresholds`
(trine.kernels.triton.sampling), which find the same tokens without sorting the vocabulary.

Every filter keeps the tokens with z at or above a threshold: top_k, top_p and min_p each keep an upper set of
the distribution, and so does their combination. Tokens tied with the last one kept are kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trine.kernels import ops, reference

WEIGHT_BITS = 34
MAX_VOCABULARY = 1 << (53 - WEIGHT_BITS)
BLOCK = 128
CHUNK_ELEMENTS = 1 << 18
"""Logits to work on at a time on a CPU: 1 MiB stays in a core's cache through several passes."""
_SCALE = float(1 << WEIGHT_BITS)


def block_max(logits: Tensor) -> Tensor:
    """Largest logit of each block of 128. logits [B, V] float32 -> [B, ceil(V / 128)]. NaN wins."""
    width = logits.shape[1]
    whole = width // BLOCK * BLOCK
    parts = []
    if whole:
        parts.append(logits[:, :whole].view(-1, whole // BLOCK, BLOCK).amax(-1))
    if whole < width:
        parts.append(logits[:, whole:].amax(-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit and the first token that has it. logits [B, V] float32 -> ([B] float32, [B] int64).

    A row with a NaN has no finite largest logit. On a CPU ten times as fast as torch.argmax, whose inner loop isn't
    vectorised: the maxima of blocks are, and only one block a row is searched.
    """
    if logits.is_cuda and ops.backend(True, torch.float32) is not reference:
        from trine.kernels.triton.sampling import argmax as argmax_on_gpu

        return argmax_on_gpu(logits)
    blocks = block_max(logits).argmax(-1, keepdim=True)
    ids = blocks * BLOCK + torch.arange(BLOCK, device=logits.device)
    ids = ids.clamp_(max=logits.shape[1] - 1)
    inner = logits.gather(1, ids)
    best = inner.argmax(-1, keepdim=True)
    return inner.gather(1, best).squeeze(1), ids.gather(1, best).squeeze(1)


def scaled_logits(logits: Tensor, largest: Tensor, temperature: Tensor | None) -> Tensor:
    """z = (logit - largest) / temperature. logits [B, V], largest and temperature [B] float32 -> [B, Vp] float32.

    Vp is V rounded up to whole blocks; the padding is minus infinity. No temperature is a temperature of 1.
    """
    rows, width = logits.shape
    padded = -(-width // BLOCK) * BLOCK
    z = torch.empty((rows, padded), dtype=torch.float32, device=logits.device)
    z[:, width:] = -math.inf
    torch.sub(logits, largest[:, None], out=z[:, :width])
    return z if temperature is None else z.mul_(temperature.reciprocal()[:, None])


def weights(z: Tensor) -> Tensor:
    """Integer weights of scaled logits, in float32 (24 significant bits of each are kept). Same shape as z."""
    return torch.exp(z).mul_(_SCALE).round_()


def thresholds(z: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_z: Tensor | None) -> Tensor:
    """Smallest scaled logit that passes the filters: [B, 1] float32.

    z [B, Vp] float32; top_k [B] int64 (0 is off), top_p [B] float64 (1 is off), min_z [B] float64, the logarithm of
    min_p (minus infinity is off), each None when no row uses it. top_p is a share of the mass that top_k leaves. On a
    GPU the result may be a smaller one that keeps the same tokens of those with a weight.
    """
    if z.is_cuda and ops.backend(True, torch.float32) is not reference:
        from trine.kernels.triton.sampling import thresholds as thresholds_on_gpu

        return thresholds_on_gpu(z, top_k, top_p, min_z)
    result = torch.full((z.shape[0], 1), -math.inf, dtype=torch.float32, device=z.device)
    if min_z is not None:
        result = torch.maximum(result, min_z.to(torch.float32)[:, None])
    if top_k is None and top_p is None:
        return result
    ordered = z.sort(dim=-1, descending=True).values
    if top_k is not None:
        last = torch.where(top_k > 0, top_k, z.shape[1]).clamp(max=z.shape[1]) - 1
        kth = ordered.gather(1, last[:, None])
        result = torch.maximum(result, kth)
    if top_p is not None:
        mass = weights(ordered).to(torch.float64)
        if top_k is not None:
            mass = mass.masked_fill_(ordered < kth, 0.0)
        mass = mass.cumsum_(-1)
        target = mass[:, -1:] * top_p[:, None]
        last = (mass < target).sum(-1, keepdim=True).clamp_(max=z.shape[1] - 1)
        result = torch.maximum(result, ordered.gather(1, last))
    return result


def draw(mass: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative weight passes `uniform` of the total.

    mass [B, Vp] float32, uniform [B] float64 in [0, 1) -> [B] int64.
    Two levels, so that no cumulative sum runs over the whole vocabulary: the block first, then the token in it.
    """
    blocks = mass.view(-1, mass.shape[1] // BLOCK, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum_(-1)
    total = ends[:, -1]
    target = torch.minimum((uniform * total).floor_(), total - 1.0)[:, None]
    block = (ends <= target).sum(-1, keepdim=True).clamp_(max=ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1)
    inner = inner.to(torch.float64).cumsum_(-1).add_(before)
    inside = (inner <= target).sum(-1, keepdim=True).clamp_(max=BLOCK - 1)
    tokens: Tensor = block * BLOCK + inside
    return tokens.squeeze(1)
