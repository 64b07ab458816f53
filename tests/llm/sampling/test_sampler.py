"""The sampler against its slow twin, and that nothing but a row's own parameters decides its tokens."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llm.sampling import twin
from trine.kernels import ops
from trine.llm.sampling.params import GuidedParams, SamplingParams
from trine.llm.sampling.random import uniforms
from trine.llm.sampling.sampler import Sampler

EOS = (3,)
GUIDED = GuidedParams(json_object=True)


def set_row(sampler: Sampler, row: int, params: SamplingParams, seed: int = 0, **given: Any) -> None:
    arguments = {"prompt_token_ids": [], "output_token_ids": [], "eos_token_ids": EOS, "bad_words_token_ids": []}
    sampler.set_row(row, params, seed=seed, **{**arguments, **given})


def pack(allowed: np.ndarray) -> torch.Tensor:
    """[B, V] bool -> the bitmask [B, ceil(V / 32)] int32."""
    padded = np.zeros((allowed.shape[0], -(-allowed.shape[1] // 32) * 32), dtype=np.bool_)
    padded[:, : allowed.shape[1]] = allowed
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


@st.composite
def parameters(draw: st.DrawFn, vocab: int) -> SamplingParams:
    token = st.integers(0, vocab - 1)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 1.5])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 7, 50, vocab + 5])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.3, 0.9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.8])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.3, -0.5])),
        logit_bias=draw(st.dictionaries(token, st.sampled_from([-100.0, -1.5, 5.0]), max_size=4)),
        min_tokens=draw(st.sampled_from([0, 0, 3])),
        stop_token_ids=tuple(draw(st.lists(token, max_size=2))),
        ignore_eos=draw(st.booleans()),
        guided=draw(st.sampled_from([None, None, GUIDED])),
    )


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, Any]:
    vocab = draw(st.sampled_from([5, 33, 130, 300]))
    rows = draw(st.integers(1, 5))
    token = st.integers(0, vocab - 1)
    words = st.lists(st.lists(token, min_size=1, max_size=3), max_size=3)
    return {
        "vocab": vocab,
        "params": [draw(parameters(vocab)) for _ in range(rows)],
        "prompts": [draw(st.lists(token, max_size=8)) for _ in range(rows)],
        "outputs": [draw(st.lists(token, max_size=4)) for _ in range(rows)],
        "words": [draw(words) for _ in range(rows)],
        "seed": draw(st.integers(0, 2**32)),
    }


@given(workloads(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_equals_the_slow_twin_over_several_steps(work: dict[str, Any], use_reference: bool) -> None:
    """Every option at once, mixed in a batch, rows out of order, from a fresh or a resumed sequence."""
    with ops.reference_only() if use_reference else nullcontext():
        check_against_twin(work)


def check_against_twin(work: dict[str, Any]) -> None:
    rng = np.random.default_rng(work["seed"])
    vocab, params = work["vocab"], work["params"]
    rows = rng.permutation(8)[: len(params)].tolist()
    sampler = Sampler(8, vocab, "cpu")
    outputs = [list(output) for output in work["outputs"]]
    for line, row in enumerate(rows):
        set_row(
            sampler,
            row,
            params[line],
            seed=line * 7 - 3,
            prompt_token_ids=work["prompts"][line],
            output_token_ids=outputs[line],
            bad_words_token_ids=work["words"][line],
        )
    for _ in range(5):
        logits = (rng.normal(size=(len(rows), vocab)) * 2).astype(np.float32)
        allowed = rng.random((len(rows), vocab)) < rng.choice([0.02, 0.5])
        allowed[:, EOS[0]] |= ~allowed.any(1)
        steps = [len(output) for output in outputs]
        given_logits = torch.from_numpy(logits.copy())
        sampled = sampler.sample(given_logits, rows, steps, pack(allowed)).tokens.tolist()
        for line, output in enumerate(outputs):
            p = params[line]
            mask = allowed[line] if p.guided is not None else None
            edited = twin.edit(logits[line], p, work["prompts"][line], output, EOS, work["words"][line], mask)
            seed = np.array([line * 7 - 3], dtype=np.int64).astype(np.uint64)
            uniform = float(uniforms(seed, np.array([steps[line]], dtype=np.uint64))[0])
            expected = {-1} if max(edited) == -math.inf else twin.choices(edited, p, uniform)
            assert sampled[line] in expected, (line, p)
            output.append(max(sampled[line], 0))


MIXED = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9),
    SamplingParams(temperature=0.9, top_p=0.95),
    SamplingParams(temperature=1.2, min_p=0.02),
    SamplingParams(temperature=0.8, repetition_penalty=1.2, presence_penalty=0.3),
    SamplingParams(temperature=0.0, logprobs=5, logit_bias={7: 3.0}),
    SamplingParams(temperature=1.0, top_k=3000),
)


def run(
    lines: list[int], rows: list[int], steps: int, vocab: int, order: int = 1
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens and log-probabilities of the sequences `lines` of MIXED, sampled together in the given rows."""
    sampler = Sampler(16, vocab, "cpu")
    for line, row in zip(lines, rows, strict=True):
        set_row(sampler, row, MIXED[line], seed=line + 100, prompt_token_ids=[line, 5, 9])
    tokens: list[list[int]] = [[] for _ in lines]
    scores = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        logits = torch.randn((len(MIXED), vocab), generator=generator)[lines]
        batch = list(range(len(lines)))[::order]
        result = sampler.sample(logits[batch], [rows[line] for line in batch], [step] * len(batch))
        for line, token in zip(batch, result.tokens.tolist(), strict=True):
            tokens[line].append(token)
        if result.logprobs is not None:
            columns = torch.stack([result.logprobs.sampled_logprob, *result.logprobs.top_logprobs.T], dim=1)
            scores.append(columns if order == 1 else columns.flip(0))
    return tokens, scores


@pytest.mark.parametrize("vocab", [4096, 50257])
@pytest.mark.parametrize("use_reference", [False, True])
def test_a_row_does_not_depend_on_the_others_bit_for_bit(vocab: int, use_reference: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # long sums are split among threads, if they are alone
    with ops.reference_only() if use_reference else nullcontext():
        lines = list(range(len(MIXED)))
        together, scores = run(lines, [3, 1, 0, 7, 9, 2, 5, 15], 3, vocab)
        assert run(lines, [15, 8, 9, 1, 2, 4, 6, 0], 3, vocab, order=-1)[0] == together
        for line in lines:
            alone, alone_scores = run([line], [line], 3, vocab)
            assert alone == [together[line]]
            for step, score in enumerate(alone_scores):
                assert torch.equal(score[0], scores[step][line])
    torch.set_num_threads(before)


def test_resuming_a_sequence_continues_it() -> None:
    """A preempted sequence gets another row and its output so far; nothing of its next tokens changes."""
    params = SamplingParams(temperature=1.0, frequency_penalty=1.0, repetition_penalty=1.5, min_tokens=9)
    words = [[4, 5], [6], [1, 2, 3]]
    given: dict[str, Any] = {"prompt_token_ids": [1, 2], "bad_words_token_ids": words, "seed": 5}
    logits = torch.randn((10, 12), generator=torch.Generator().manual_seed(0))
    through, resumed = Sampler(4, 12, "cpu"), Sampler(4, 12, "cpu")
    set_row(through, 0, params, **given)
    output: list[int] = []
    for step in range(10):
        set_row(resumed, step % 4, params, output_token_ids=output, **given)
        token = resumed.sample(logits[step : step + 1].clone(), [step % 4], [step]).tokens
        resumed.clear_row(step % 4)
        assert torch.equal(through.sample(logits[step : step + 1].clone(), [0], [step]).tokens, token)
        output.append(int(token))


def test_same_seed_same_tokens_other_seed_other_tokens() -> None:
    sampler = Sampler(4, 1000, "cpu")
    for row, seed in enumerate((1, 1, 2, -1)):
        set_row(sampler, row, SamplingParams(temperature=1.0), seed=seed)
    logits = torch.zeros((4, 1000))
    drawn = torch.stack([sampler.sample(logits, [0, 1, 2, 3], [step] * 4).tokens for step in range(20)], dim=1)
    assert torch.equal(drawn[0], drawn[1])
    assert len({tuple(row) for row in drawn.tolist()}) == 3
    assert len(set(drawn[0].tolist())) > 15


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7, "min_p": 0.02}]
)
def test_frequencies_match_the_exact_distribution(options: dict[str, Any]) -> None:
    """Chi-square of 20,000 tokens against probabilities worked out in float64."""
    params = SamplingParams(temperature=0.7, **options)
    logits = torch.randn(200, generator=torch.Generator().manual_seed(4)) * 2
    rows, steps = 200, 100
    sampler = Sampler(rows, 200, "cpu")
    for row in range(rows):
        set_row(sampler, row, params, seed=row)
    counts = torch.zeros(200)
    for step in range(steps):
        tokens = sampler.sample(logits.expand(rows, -1).contiguous(), list(range(rows)), [step] * rows).tokens
        counts += torch.bincount(tokens, minlength=200)
    p = (logits.double() / 0.7).softmax(-1)
    order = p.argsort(descending=True)
    if params.top_k:
        p[order[params.top_k :]] = 0.0
    p /= p.sum()
    p[order[1:][p[order].cumsum(0)[:-1] >= params.top_p]] = 0.0
    p[p < params.min_p * p.max()] = 0.0
    expected = p / p.sum() * rows * steps
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    chi_square = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    freedom = int(common.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    assert counts[~common].sum() < expected[~common].sum() + 4 * expected[~common].sum().sqrt() + 1


def test_ties_with_the_last_token_kept_are_kept() -> None:
    sampler = Sampler(3, 6, "cpu")
    set_row(sampler, 0, SamplingParams(top_k=2))
    set_row(sampler, 1, SamplingParams(top_p=0.5))
    set_row(sampler, 2, SamplingParams(top_k=1))
    logits = torch.tensor([[0.0, 5.0, 4.0, 4.0, -1.0, -2.0], [2.0, 2.0, 2.0, 2.0, -30.0, -30.0], [1.0, 7, 7, 0, 0, 0]])
    seen: list[set[int]] = [set(), set(), set()]
    for step in range(200):
        for line, token in enumerate(sampler.sample(logits.clone(), [0, 1, 2], [step] * 3).tokens.tolist()):
            seen[line].add(token)
    assert seen == [{1, 2, 3}, {0, 1, 2, 3}, {1}]


def test_rows_with_nan_or_nothing_allowed_are_marked_and_the_others_are_not() -> None:
    sampler = Sampler(6, 40, "cpu")
    kinds = [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=3)]
    for bad in (math.nan, math.inf):
        for spoiled in range(4):
            for row, params in enumerate(kinds):
                set_row(sampler, row, params, seed=row)
            logits = torch.randn((4, 40), generator=torch.Generator().manual_seed(spoiled))
            expected = sampler.sample(logits.clone(), [0, 1, 2, 3], [0] * 4).tokens
            logits[spoiled, 17] = bad
            result = sampler.sample(logits, [0, 1, 2, 3], [0] * 4)
            expected[spoiled] = -1
            assert torch.equal(result.tokens, expected)
            assert result.next_input.min() >= 0
    set_row(sampler, 4, SamplingParams(temperature=0.5, guided=GUIDED, repetition_penalty=2.0, logit_bias={1: 2.0}))
    nothing = torch.zeros((1, 2), dtype=torch.int32)
    assert sampler.sample(torch.zeros((1, 40)), [4], [0], nothing).tokens.tolist() == [-1]
    assert sampler.sample(torch.zeros((1, 40)), [4], [1], ~nothing).tokens.item() >= 0


def test_min_tokens_forbids_ends_but_never_what_a_grammar_needs() -> None:
    sampler = Sampler(2, 64, "cpu")
    params = SamplingParams(temperature=0, min_tokens=5, stop_token_ids=(9,), guided=GUIDED)
    for row in range(2):
        set_row(sampler, row, params)
    logits = torch.zeros((2, 64))
    logits[:, EOS[0]], logits[:, 9], logits[:, 20] = 9.0, 8.0, 1.0
    allowed = np.zeros((2, 64), dtype=np.bool_)
    allowed[0, [EOS[0], 20]] = True
    allowed[1, EOS[0]] = True
    assert sampler.sample(logits.clone(), [0, 1], [0, 0], pack(allowed)).tokens.tolist() == [20, EOS[0]]
    assert sampler.sample(logits.clone(), [0, 1], [5, 5], pack(allowed)).tokens.tolist() == [EOS[0], EOS[0]]
    assert sampler.sample(logits.clone(), [0, 1], [4, 5], None).tokens.tolist() == [20, EOS[0]]


def test_cleared_rows_forget_their_options() -> None:
    sampler = Sampler(2, 10, "cpu")
    set_row(sampler, 0, SamplingParams(temperature=0, logit_bias={3: 50.0}, logprobs=2, presence_penalty=2.0))
    logits = torch.zeros((1, 10))
    logits[0, 6] = 1.0
    result = sampler.sample(logits.clone(), [0], [0])
    assert result.tokens.tolist() == [3]
    assert result.logprobs is not None
    sampler.clear_row(0)
    set_row(sampler, 0, SamplingParams(temperature=0))
    result = sampler.sample(logits.clone(), [0], [0])
    assert (result.tokens.tolist(), result.logprobs) == ([6], None)


def test_a_bad_word_of_several_tokens_is_forbidden_only_where_it_would_be_completed() -> None:
    sampler = Sampler(1, 10, "cpu")
    set_row(sampler, 0, SamplingParams(temperature=0), bad_words_token_ids=[[1, 2], [2, 2, 2]], prompt_token_ids=[1])
    likes = [2, 1, 2, 2, 2, 2]
    tokens = []
    for step, liked in enumerate(likes):
        logits = torch.zeros((1, 10))
        logits[0, liked], logits[0, 7] = 5.0, 1.0
        tokens.append(sampler.sample(logits, [0], [step]).tokens.item())
    assert tokens == [2, 1, 7, 2, 2, 7]


def test_a_vocabulary_beyond_exact_sums_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        Sampler(1, 600_000, "cpu")
