"""Random paged batches for the attention tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trine.llm.batch import Batch


@dataclass
class PagedCase:
    """Queries, caches and a batch in which every unused cache entry is NaN: reading one shows."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    batch: Batch


def paged_case(
    seq_lens: list[int],
    query_lens: list[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    spare_columns: int = 3,
) -> PagedCase:
    """Sequences of `seq_lens` whose last `query_lens` tokens are new, in shuffled blocks; single tokens come first."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(counts) + 2
    order = torch.randperm(num_blocks, generator=generator)
    table = torch.randint(0, num_blocks, (len(seq_lens), max(counts) + spare_columns), generator=generator)
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    used = 0
    for row, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        blocks = order[used : used + count]
        used += count
        table[row, :count] = blocks
        for cache in (k_cache, v_cache):
            values = torch.randn(num_kv_heads, length, head_dim, generator=generator)
            for index, block in enumerate(blocks.tolist()):
                piece = values[:, index * block_size : (index + 1) * block_size]
                cache[block, :, : piece.shape[1]] = piece
    starts = [0]
    positions = []
    slots = []
    for row, (length, new) in enumerate(zip(seq_lens, query_lens, strict=True)):
        starts.append(starts[-1] + new)
        for position in range(length - new, length):
            positions.append(position)
            slots.append(int(table[row, position // block_size]) * block_size + position % block_size)
    batch = Batch(
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_table=table.to(torch.int32).to(device),
        num_decodes=sum(new == 1 for new in query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    q = torch.randn(starts[-1], num_heads, head_dim, generator=generator)
    return PagedCase(q.to(dtype).to(device), k_cache.to(dtype).to(device), v_cache.to(dtype).to(device), batch)
