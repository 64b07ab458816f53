"""Drives a model with batches over a paged cache, without the engine: blocks are scattered at random on purpose."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from trine.llm.batch import Batch
from trine.llm.loading import load_model
from trine.llm.models.base import CausalLM

BLOCK_SIZE = 16


class PagedModel:
    """A loaded model, a cache, and sequences that grow in it."""

    def __init__(
        self,
        directory: Path,
        *,
        num_blocks: int = 256,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        quantization: str | None = None,
        cache_dtype: torch.dtype | None = None,
        max_model_len: int | None = None,
        load_format: str = "auto",
    ) -> None:
        self.model: CausalLM
        self.model, self.config = load_model(
            directory,
            dtype=dtype,
            device=torch.device("cpu"),
            quantization=quantization,
            cache_dtype=cache_dtype,
            max_model_len=max_model_len,
            load_format=load_format,
        )
        caches = []
        for spec in self.model.cache_specs():
            shape = (num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
            # not zeros: whatever reads beyond a sequence must show
            poison = min(1e4, torch.finfo(spec.dtype).max)
            caches.append((torch.full(shape, poison, dtype=spec.dtype), torch.full(shape, poison, dtype=spec.dtype)))
        self.model.bind_cache(caches)
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def new_sequence(self) -> int:
        name = len(self.lengths)
        self.blocks[name], self.lengths[name] = [], 0
        return name

    def step(
        self, work: Sequence[tuple[int, Sequence[int]]], wanted: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Append tokens to sequences; returns each one's logits [n, V], in the order of `work`, or with `wanted` those
        [1, V] of the last tokens of these entries of `work`.
        """
        order = sorted(range(len(work)), key=lambda i: len(work[i][1]) != 1)  # decodes first
        positions: list[int] = []
        slots: list[int] = []
        tokens: list[int] = []
        starts = [0]
        for i in order:
            name, new = work[i]
            begin = self.lengths[name]
            self.lengths[name] = begin + len(new)
            while len(self.blocks[name]) * BLOCK_SIZE < self.lengths[name]:
                self.blocks[name].append(self.free.pop())
            for position in range(begin, begin + len(new)):
                positions.append(position)
                slots.append(self.blocks[name][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            tokens.extend(new)
            starts.append(len(tokens))
        names = [work[i][0] for i in order]
        width = max(len(self.blocks[name]) for name in names)
        table = [self.blocks[name] + [0] * (width - len(self.blocks[name])) for name in names]
        lengths = [self.lengths[name] for name in names]
        batch = Batch(
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=torch.tensor(table, dtype=torch.int32),
            num_decodes=sum(len(new) == 1 for _, new in work),
            max_query_len=max(len(new) for _, new in work),
            max_seq_len=max(lengths),
        )
        if wanted is not None:
            last = {i: starts[at + 1] - 1 for at, i in enumerate(order)}
            ascending = sorted(wanted, key=lambda i: last[i])
            batch.output_rows = torch.tensor([last[i] for i in ascending], dtype=torch.int64)
        with torch.inference_mode():
            logits = self.model.compute_logits(batch.outputs(self.model(torch.tensor(tokens), batch)))
        if wanted is not None:
            return [logits[ascending.index(i)][None] for i in wanted]
        results: list[torch.Tensor] = [logits] * len(work)
        for at, i in enumerate(order):
            results[i] = logits[starts[at] : starts[at + 1]]
        return results
