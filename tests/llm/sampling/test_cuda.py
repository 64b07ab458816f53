"""The sampler on a GPU: it never waits for the device, and rows stay independent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.llm.sampling.test_sampler import EOS, GUIDED, MIXED, pack, set_row
from trine.llm.sampling.params import SamplingParams
from trine.llm.sampling.sampler import Sampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VOCAB = 151_936


def prepared(lines: list[int]) -> Sampler:
    sampler = Sampler(32, VOCAB, "cuda")
    for line in lines:
        set_row(sampler, line, MIXED[line], seed=line + 100, prompt_token_ids=[line, 5, 9])
    return sampler


def logits_of(lines: list[int], step: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(step)
    return torch.randn((len(MIXED), VOCAB), generator=generator, device="cuda")[lines]


@torch.inference_mode()
def test_sampling_never_waits_for_the_device() -> None:
    lines = list(range(len(MIXED)))
    sampler = prepared(lines)
    set_row(sampler, 20, SamplingParams(min_tokens=9, guided=GUIDED), bad_words_token_ids=[[1, 2], [4]], seed=1)
    mask = pack(np.ones((len(lines) + 1, VOCAB), dtype=np.bool_)).pin_memory()
    for step in range(3):
        logits = torch.cat([logits_of(lines, step), torch.zeros((1, VOCAB), device="cuda")])
        if step == 1:  # the first step may allocate and compile
            torch.cuda.set_sync_debug_mode("error")
        try:
            sampler.sample(logits, [*lines, 20], [step] * (len(lines) + 1), mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others() -> None:
    lines = list(range(len(MIXED)))
    sampler, backwards = prepared(lines), prepared(lines)
    for step in range(4):
        together = sampler.sample(logits_of(lines, step), lines, [step] * len(lines))
        turned = backwards.sample(logits_of(lines[::-1], step), lines[::-1], [step] * len(lines))
        assert torch.equal(together.tokens, turned.tokens.flip(0))
    for line in lines:
        alone, batch = prepared([line]), prepared(lines)
        one = alone.sample(logits_of([line], 0), [line], [0])
        all_ = batch.sample(logits_of(lines, 0), lines, [0] * len(lines))
        assert one.tokens[0] == all_.tokens[line]
        if one.logprobs is not None and all_.logprobs is not None:
            assert torch.equal(one.logprobs.top_logprobs[0], all_.logprobs.top_logprobs[line])


@torch.inference_mode()
def test_frequencies_match_the_exact_distribution() -> None:
    params = SamplingParams(temperature=0.7, top_k=30, top_p=0.9, min_p=0.01)
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(4)) * 2
    rows = 512
    sampler = Sampler(rows, 1000, "cuda")
    for row in range(rows):
        set_row(sampler, row, params, seed=row)
    counts = torch.zeros(1000)
    for step in range(100):
        batch = logits.cuda().expand(rows, -1).contiguous()
        counts += torch.bincount(sampler.sample(batch, list(range(rows)), [step] * rows).tokens.cpu(), minlength=1000)
    p = (logits.double() / 0.7).softmax(-1)
    order = p.argsort(descending=True)
    p[order[30:]] = 0.0
    p /= p.sum()
    p[order[1:][p[order].cumsum(0)[:-1] >= 0.9]] = 0.0
    p[p < 0.01 * p.max()] = 0.0
    expected = p / p.sum() * rows * 100
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    freedom = int(common.sum()) - 1
    assert ((counts - expected)[common] ** 2 / expected[common]).sum() < freedom + 4 * math.sqrt(2 * freedom)


@torch.inference_mode()
def test_nan_is_marked_and_harmless() -> None:
    lines = list(range(len(MIXED)))
    logits = logits_of(lines, 0)
    logits[[1, 2]] = math.nan
    result = prepared(lines).sample(logits, lines, [0] * len(lines))
    assert (result.tokens < 0).tolist() == [line in (1, 2) for line in lines]
    assert int(result.next_input.min()) >= 0
    assert EOS[0] < VOCAB
