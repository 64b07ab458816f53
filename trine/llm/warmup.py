"""Compiles on a GPU, before the first request, the kernels that an engine's steps will launch.

Kernels are compiled for types, alignments and a few sizes of what they get. A rehearsal of steps of every kind, in
which nothing is launched, says which.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trine.llm.batch import Batch
from trine.llm.sampling.params import SamplingParams
from trine.llm.sampling.sampler import Sampler
from trine.llm.scheduler import SchedulerLimits


def rehearsed_batches(limits: SchedulerLimits, device: torch.device) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Token ids [T] and batches like those of the steps that hold prompts: of few tokens to as many as a step may have,
    alone and beside few, some and many sequences that decode. All of them lie in cache block 0.
    """
    for length in sorted({24, 96, 200, 448, 1000, 2048, limits.max_num_batched_tokens}):
        if length <= limits.max_num_batched_tokens:
            yield _batch(0, length, limits, device)
    for num_decodes in (1, 16, 64, 128, 224, 480):
        if num_decodes < limits.max_num_seqs:
            yield _batch(num_decodes, 128, limits, device)


def _batch(
    num_decodes: int, num_prompt: int, limits: SchedulerLimits, device: torch.device
) -> tuple[torch.Tensor, Batch]:
    """`num_decodes` sequences of one token and a prompt of `num_prompt`."""
    total = num_decodes + num_prompt
    width = -(-limits.max_model_len // limits.block_size)
    lengths = torch.tensor([1] * num_decodes + [num_prompt], dtype=torch.int32)
    batch = Batch(
        positions=torch.zeros(total, dtype=torch.int64, device=device),
        slots=torch.zeros(total, dtype=torch.int64, device=device),
        query_start=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device),
        seq_lens=lengths.to(device),
        block_table=torch.zeros((num_decodes + 1, width), dtype=torch.int32, device=device),
        num_decodes=num_decodes,
        max_query_len=num_prompt,
        max_seq_len=limits.max_model_len,
        output_rows=torch.arange(num_decodes + 1, device=device),
    )
    return torch.zeros(total, dtype=torch.int64, device=device), batch


def rehearse_sampling(sampler: Sampler, logits: torch.Tensor) -> None:
    """Choose tokens after logits [B, V] in the usual ways, for rows that no sequence has yet."""
    rows = [0] * len(logits)
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=40),
    ):
        sampler.set_row(
            0, params, prompt_token_ids=(), output_token_ids=(), eos_token_ids=(), bad_words_token_ids=(), seed=0
        )
        sampler.sample(logits, rows, rows)
        sampler.clear_row(0)
