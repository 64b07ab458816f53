"""Log-probabilities of the model's own distribution, before penalties, temperature and filters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trine.kernels import ops, reference
from trine.llm.sampling.distribution import BLOCK, CHUNK_ELEMENTS, argmax, block_max, scaled_logits


@dataclass(slots=True)
class SampledLogprobs:
    """Log-probabilities at B positions, on the logits' device.

    sampled_logprob [B] float32 and sampled_rank [B] int64 (1 is the most probable) describe one token a position;
    top_ids [B, K] int64 and top_logprobs [B, K] float32 are the K most probable ones in falling order. Positions whose
    row did not ask hold zeros.
    """

    sampled_logprob: Tensor
    sampled_rank: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    @classmethod
    def empty(cls, positions: int, count: int, device: torch.device) -> SampledLogprobs:
        return cls(
            torch.zeros(positions, dtype=torch.float32, device=device),
            torch.zeros(positions, dtype=torch.int64, device=device),
            torch.zeros((positions, count), dtype=torch.int64, device=device),
            torch.zeros((positions, count), dtype=torch.float32, device=device),
        )

    def put(self, index: Tensor, source: SampledLogprobs) -> None:
        """Copy the positions of `source` to the positions `index` of this record."""
        self.sampled_logprob.index_copy_(0, index, source.sampled_logprob)
        self.sampled_rank.index_copy_(0, index, source.sampled_rank)
        self.top_ids.index_copy_(0, index, source.top_ids)
        self.top_logprobs.index_copy_(0, index, source.top_logprobs)


def prompt_logprobs(logits: Tensor, targets: Tensor, k: int) -> SampledLogprobs:
    """Log-probabilities and ranks of `targets` [B] int64, and the k most probable tokens'. logits [B, V] float32.

    A token's rank is one more than the number of tokens that are strictly more probable. Among equally probable ones
    the k hold those with the smaller ids. A position's result is the same, bit for bit, in any batch.
    """
    k = min(k, logits.shape[1])
    if not logits.is_cuda and ops.backend(False, torch.float32) is not reference:
        from trine.kernels import cpu

        targets = targets.clamp(0, logits.shape[1] - 1)
        largest, total, ranks, ids = cpu.score(logits, targets, k)
        return _from_parts(logits, targets, largest, total, ranks, ids)
    if logits.device.type != "cpu" or logits.shape[0] * logits.shape[1] <= CHUNK_ELEMENTS:
        return _logprobs(logits, targets, k)
    result = SampledLogprobs.empty(logits.shape[0], k, logits.device)
    step = max(1, CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        result.put(torch.arange(logits.shape[0])[part], _logprobs(logits[part], targets[part], k))
    return result


def _logprobs(logits: Tensor, targets: Tensor, k: int) -> SampledLogprobs:
    largest, _ = argmax(logits)
    weights = scaled_logits(logits, largest, None).exp_()
    # Blocks first: torch splits one long sum over threads when it is the only one, and that changes the last bits.
    total = weights.view(len(weights), -1, BLOCK).sum(-1).sum(-1, dtype=torch.float64)
    targets = targets.clamp(min=0)
    ranks = (logits > logits.gather(1, targets[:, None])).sum(-1) + 1
    ids = _top_ids(logits, block_max(logits), k)
    return _from_parts(logits, targets, largest, total, ranks, ids)


def _from_parts(
    logits: Tensor, targets: Tensor, largest: Tensor, total: Tensor, ranks: Tensor, ids: Tensor
) -> SampledLogprobs:
    """total [B] float64: the sum of exp(logit - largest)."""
    normalizer = (total.log() + largest.to(torch.float64)).to(torch.float32)[:, None]
    target_logprobs = (logits.gather(1, targets[:, None]) - normalizer).squeeze(1)
    return SampledLogprobs(target_logprobs, ranks, ids, logits.gather(1, ids) - normalizer)


def _top_ids(logits: Tensor, maxima: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, the largest first, of equal ones the smallest id: [B, k] int64.

    They are in the k blocks whose maxima come first in that order, so only those are searched.
    """
    blocks = _order(maxima, torch.arange(maxima.shape[1], device=logits.device).expand_as(maxima))
    chosen = blocks.topk(min(k, maxima.shape[1]), dim=-1).indices
    ids = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    keys = _order(logits.gather(1, ids.clamp(max=logits.shape[1] - 1)), ids)
    keys.masked_fill_(ids >= logits.shape[1], torch.iinfo(torch.int64).min)
    return ids.gather(1, keys.topk(k, dim=-1).indices)


def _order(values: Tensor, ids: Tensor) -> Tensor:
    """Integers in the order of the float32 values, and of falling ids where these are equal."""
    bits = values.view(torch.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    return (rising << 32) | (0xFFFFFFFF - ids)
