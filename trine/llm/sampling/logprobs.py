"""Log-probabilities of the model's own distribution, before penalties, temperature and filters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trine.llm.sampling.distribution import BLOCK, argmax


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


def log_normalizer(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) of each row, [B, V] float32 -> [B, 1] float32; a row's result is the same in any batch."""
    largest, _, _ = argmax(logits)
    shifted = torch.exp(logits - largest[:, None])
    whole = logits.shape[1] // BLOCK * BLOCK
    # Blocks first: torch splits one long sum over threads when it is the only one, and that changes the last bits.
    total = shifted[:, :whole].view(-1, whole // BLOCK, BLOCK).sum(-1).sum(-1, dtype=torch.float64)
    total = total + shifted[:, whole:].sum(-1, dtype=torch.float64)
    result: Tensor = total.log() + largest.to(torch.float64)
    return result.to(torch.float32)[:, None]


def prompt_logprobs(logits: Tensor, targets: Tensor, k: int) -> SampledLogprobs:
    """Log-probabilities and ranks of `targets` [B] int64, and the k most probable tokens'. logits [B, V] float32.

    A token's rank is one more than the number of tokens that are strictly more probable.
    """
    normalizer = log_normalizer(logits)
    target_logits = logits.gather(1, targets.clamp(min=0)[:, None])
    ranks = (logits > target_logits).sum(-1) + 1
    tops, ids = torch.topk(logits, min(k, logits.shape[1]), dim=-1)
    return SampledLogprobs((target_logits - normalizer).squeeze(1), ranks, ids, tops - normalizer)
