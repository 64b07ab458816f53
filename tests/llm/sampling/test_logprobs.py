"""Log-probabilities of the model's own distribution."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from trine.kernels import ops
from trine.llm.sampling.logprobs import prompt_logprobs
from trine.llm.sampling.params import SamplingParams
from trine.llm.sampling.sampler import Sampler


@pytest.mark.parametrize("vocab", [2, 100, 128, 4096, 50257])
@pytest.mark.parametrize("k", [0, 1, 5, 64])
@pytest.mark.parametrize("use_reference", [False, True])
def test_equal_log_softmax(vocab: int, k: int, use_reference: bool) -> None:
    logits = torch.randn((7, vocab), generator=torch.Generator().manual_seed(vocab)) * 4 + 100
    targets = torch.randint(vocab, (7,), generator=torch.Generator().manual_seed(k))
    with ops.reference_only() if use_reference else nullcontext():
        result = prompt_logprobs(logits, targets, k)
    expected = logits.double().log_softmax(-1)
    count = min(k, vocab)
    assert result.top_ids.shape == (7, count)
    torch.testing.assert_close(
        result.sampled_logprob, expected.gather(1, targets[:, None])[:, 0].float(), atol=2e-5, rtol=1e-6
    )
    torch.testing.assert_close(result.top_logprobs, expected.topk(count).values.float(), atol=2e-5, rtol=1e-6)
    assert torch.equal(logits.gather(1, result.top_ids), logits.topk(count).values)
    assert torch.equal(result.sampled_rank, (expected > expected.gather(1, targets[:, None])).sum(-1) + 1)


def test_a_position_is_the_same_in_any_batch() -> None:
    logits = torch.randn((33, 151_936), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(33)
    together = prompt_logprobs(logits, targets, 4)
    for row in (0, 16, 32):
        alone = prompt_logprobs(logits[row : row + 1], targets[row : row + 1], 4)
        assert torch.equal(alone.sampled_logprob[0], together.sampled_logprob[row])
        assert torch.equal(alone.top_logprobs[0], together.top_logprobs[row])
        assert torch.equal(alone.top_ids[0], together.top_ids[row])


@pytest.mark.parametrize("use_reference", [False, True])
def test_of_equally_probable_tokens_the_first_are_named(use_reference: bool) -> None:
    logits = torch.zeros((1, 1000))
    logits[0, [400, 7, 900, 130]] = 1.0
    with ops.reference_only() if use_reference else nullcontext():
        assert prompt_logprobs(logits, torch.tensor([0]), 6).top_ids.tolist() == [[7, 130, 400, 900, 0, 1]]
        assert prompt_logprobs(logits, torch.tensor([900]), 2).top_ids.tolist() == [[7, 130]]


def test_are_of_the_logits_before_penalties_bias_and_temperature() -> None:
    sampler = Sampler(3, 50, "cpu")
    for row, params in enumerate(
        (
            SamplingParams(temperature=0.3, top_k=2, logprobs=3, logit_bias={5: 100.0}, repetition_penalty=1.9),
            SamplingParams(temperature=1.0),
            SamplingParams(temperature=0.0, logprobs=0),
        )
    ):
        sampler.set_row(
            row,
            params,
            prompt_token_ids=[0, 1, 2],
            output_token_ids=[],
            eos_token_ids=[0],
            bad_words_token_ids=[],
            seed=row,
        )
    logits = torch.randn((3, 50), generator=torch.Generator().manual_seed(2))
    expected = logits.log_softmax(-1)
    result = sampler.sample(logits.clone(), [0, 1, 2], [0, 0, 0])
    assert result.tokens[0] == 5
    assert result.logprobs is not None
    assert result.logprobs.sampled_logprob[0] == pytest.approx(float(expected[0, 5]), abs=1e-5)
    assert result.logprobs.sampled_rank[0] == int((expected[0] > expected[0, 5]).sum()) + 1
    torch.testing.assert_close(result.logprobs.top_logprobs[0], expected[0].topk(3).values)
    assert result.logprobs.sampled_logprob[2] == pytest.approx(float(expected[2].max()), abs=1e-5)
    assert result.logprobs.sampled_rank[2] == 1


def test_infinitely_unlikely_tokens_have_minus_infinity() -> None:
    logits = torch.full((1, 200), -math.inf)
    logits[0, 3] = 2.0
    result = prompt_logprobs(logits, torch.tensor([7]), 2)
    assert result.sampled_logprob.item() == -math.inf
    assert result.top_ids[0, 0] == 3
    assert result.top_logprobs[0, 0] == 0.0
