"""The steps that an engine rehearses before it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from trine.llm.config import ModelConfig
from trine.llm.loading import load_model, resolve_model
from trine.llm.rehearsal import shortened
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


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
WINDOWS = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32}
EXPERTS = {"model_type": "qwen3_moe", "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("facts", "count"),
    [
        ({}, 2),
        ({"num_hidden_layers": 1}, 1),
        ({**WINDOWS, "max_window_layers": 5}, 7),
        ({**WINDOWS, "layer_types": ["full_attention", "sliding_attention"] * 4}, 3),
        ({**EXPERTS}, 2),
        ({**EXPERTS, "mlp_only_layers": [7]}, 8),
        ({**EXPERTS, "decoder_sparse_step": 4}, 5),
    ],
)
def test_a_short_model_has_every_kind_of_layer(facts: dict[str, Any], count: int) -> None:
    config = ModelConfig.from_dict({**LLAMA, **facts})
    short = shortened(config)
    assert short.num_layers == len(short.layer_windows) == count
    assert set(short.layer_windows) == set(config.layer_windows)
    assert config.layer_windows[:count] == short.layer_windows


def test_sampling_leaves_no_row_in_use() -> None:
    sampler = Sampler(4, 100, "cpu")
    rehearse_sampling(sampler, torch.randn(3, 100))
    assert sampler.is_plain(range(4))
