"""The steps that an engine rehearses before it serves."""

from __future__ import annotations

import torch

from trine.llm.loading import load_model, resolve_model
from trine.llm.sampling.sampler import Sampler
from trine.llm.scheduler import SchedulerLimits
from trine.llm.warmup import rehearse_sampling, rehearsed_batches
from trine.llm.worker import allocate_cache


def test_batches_are_such_as_a_model_takes() -> None:
    device = torch.device("cpu")
    limits = SchedulerLimits(max_num_seqs=32, max_num_batched_tokens=512, block_size=16, max_model_len=1024)
    model, _ = load_model(resolve_model("tiny"), dtype=torch.float32, device=device)
    model.bind_cache(allocate_cache(model.cache_specs(), 2, limits.block_size, device))
    seen = []
    with torch.inference_mode():
        for token_ids, batch in rehearsed_batches(limits, device):
            assert len(token_ids) <= limits.max_num_batched_tokens
            assert len(batch.seq_lens) <= limits.max_num_seqs
            hidden = model(token_ids, batch)
            assert batch.output_rows is not None
            assert len(hidden) in (len(token_ids), len(batch.output_rows))
            assert hidden.isfinite().all()
            seen.append((batch.num_decodes, len(token_ids) - batch.num_decodes))
    assert (0, limits.max_num_batched_tokens) in seen
    assert {num_decodes for num_decodes, _ in seen} == {0, 1, 16}


def test_sampling_leaves_no_row_in_use() -> None:
    sampler = Sampler(4, 100, "cpu")
    rehearse_sampling(sampler, torch.randn(3, 100))
    assert sampler.is_plain(range(4))
