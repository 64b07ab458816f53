"""Through the engine, greedy tokens are those of Transformers: alone, in a crowd, in chunks, on cached prefixes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.llm.models.checkpoints import MOE, VOCAB, Case, build, rope
from trine import LLM, SamplingParams

CASES = [
    Case(
        "llama3",
        "Llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    Case("window", "Mistral", {"sliding_window": 20}),
    Case("tied", "Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    Case("wide-heads", "Qwen3", {"head_dim": 32}),
    Case("experts", "Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    Case("experts", "Mixtral", {"num_local_experts": 4}),
    Case("plain", "GPT2"),
]
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 47, 48, 49, 64, 80, 96, 100, 120, 150]


def mixed_prompts() -> list[list[int]]:
    """Sixteen prompts; the second half continues prompts of the first, so that their prefixes are in the cache."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(length)] for length in LENGTHS]
    for i in range(8, 16):
        shared = prompts[i - 3][: LENGTHS[i] - 2]
        prompts[i] = shared + prompts[i][len(shared) :]
    return prompts


def assert_greedy(model: torch.nn.Module, prompt: list[int], output: list[int]) -> None:
    """Transformers, shown prompt and output, would have chosen each of the output's tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    assert output == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("async_loop", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_tokens_equal_transformers(case: Case, async_loop: bool, tmp_path: Path) -> None:
    theirs = build(case, tmp_path)
    prompts = mixed_prompts()
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    with LLM(
        tmp_path,
        dtype="float32",
        max_num_batched_tokens=48,  # less than most prompts: prefill comes in chunks
        max_num_seqs=16,
        cache_bytes=64 << 20,
        async_loop=async_loop,
        threads=1,
    ) as llm:
        alone = [list(llm.generate(request, GREEDY)[0].outputs[0].token_ids) for request in requests[5:7]]
        together = llm.generate(requests, GREEDY)
        again = llm.generate(requests, GREEDY)
        llm.check()

    for prompt, output in zip(prompts, together, strict=True):
        assert_greedy(theirs, prompt, output.outputs[0].token_ids)
    assert alone == [output.outputs[0].token_ids for output in together[5:7]]
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in together]
    hits = [output.num_cached_tokens for output in again]
    assert sum(hits) > 0.8 * sum(LENGTHS)
