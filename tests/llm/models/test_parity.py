"""Logits and greedy tokens equal those of Transformers: every family, every option that changes the arithmetic."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.llm.models.checkpoints import CASES, LONGROPE, VOCAB, Case, build, rope
from tests.llm.models.harness import PagedModel
from trine.kernels import ops

TOLERANCE = 1e-4


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_tokens_equal_transformers(case: Case, tmp_path: Path) -> None:
    theirs = build(case, tmp_path)
    ours = PagedModel(tmp_path)
    sequences = prompts([100, 1, 33, 70])
    with torch.no_grad():
        expected = [theirs(torch.tensor([ids])).logits[0] for ids in sequences]

    names = [ours.new_sequence() for _ in sequences]
    for logits, reference in zip(ours.step(list(zip(names, sequences, strict=True))), expected, strict=True):
        assert relative_error(logits, reference) <= TOLERANCE, "in one pass"

    for logits, reference in zip(chunked(ours, sequences, seed=1), expected, strict=True):
        assert relative_error(logits, reference) <= TOLERANCE, "in chunks"

    prompt = sequences[0][:37]
    assert greedy(ours, prompt, 64) == transformers_greedy(theirs, prompt, 64)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Mixtral", "GPT2"])
def test_the_reference_kernels_equal_transformers(family: str, tmp_path: Path) -> None:
    """The other tests run on the native library where it is built."""
    theirs = build(next(case for case in CASES if case.family == family), tmp_path)
    sequences = prompts([70, 1, 33])
    with ops.reference_only(), torch.no_grad():
        for logits, ids in zip(chunked(PagedModel(tmp_path), sequences, seed=2), sequences, strict=True):
            assert relative_error(logits, theirs(torch.tensor([ids])).logits[0]) <= TOLERANCE


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe", "GPT2"])
@pytest.mark.parametrize("reference", [False, True])
def test_only_what_is_wanted_of_a_step(family: str, reference: bool, tmp_path: Path) -> None:
    """The last layer may leave other tokens out: what comes later is as if it had not."""
    build(next(case for case in CASES if case.family == family), tmp_path)
    prompt, decoding = prompts([50, 22])
    with ops.reference_only() if reference else nullcontext():
        whole, ours = PagedModel(tmp_path), PagedModel(tmp_path)
        a, b, c, d = (model.new_sequence() for model in (whole, whole, ours, ours))
        steps: list[tuple[list[int], list[int], list[int]]] = [
            (prompt[:20], decoding[:20], []),
            (prompt[20:40], decoding[20:21], [1]),
            (prompt[40:], decoding[21:], [1, 0]),
        ]
        for first, second, wanted in steps:
            expected = whole.step([(a, first), (b, second)])
            logits = ours.step([(c, first), (d, second)], wanted)
            assert len(logits) == len(wanted)
            for entry, own in zip(wanted, logits, strict=True):
                assert relative_error(own[0], expected[entry][-1]) <= TOLERANCE


def chunked(model: PagedModel, sequences: list[list[int]], seed: int) -> list[torch.Tensor]:
    """Logits of the sequences, fed in pieces of random length, single tokens and longer ones in the same batch."""
    draw = random.Random(seed)
    names = [model.new_sequence() for _ in sequences]
    done = [0] * len(sequences)
    pieces: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(at < len(ids) for at, ids in zip(done, sequences, strict=True)):
        work, owners = [], []
        for i, ids in enumerate(sequences):
            if done[i] == len(ids) or draw.random() < 0.3:
                continue
            count = draw.choice([1, 1, 3, 16, 17, 29])
            work.append((names[i], ids[done[i] : done[i] + count]))
            owners.append(i)
            done[i] = min(done[i] + count, len(ids))
        if work:
            for i, logits in zip(owners, model.step(work), strict=True):
                pieces[i].append(logits)
    return [torch.cat(piece) for piece in pieces]


def greedy(model: PagedModel, prompt: list[int], count: int) -> list[int]:
    name = model.new_sequence()
    output: list[int] = []
    new = prompt
    for _ in range(count):
        (logits,) = model.step([(name, new)])
        new = [int(logits[-1].argmax())]
        output += new
    return output


def transformers_greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    generated = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in generated[0, len(prompt) :]]


def test_dynamic_scaling_past_the_trained_length_follows_transformers_token_by_token(tmp_path: Path) -> None:
    theirs = build(Case("dynamic", "Llama", rope("dynamic", factor=4.0) | {"max_position_embeddings": 64}), tmp_path)
    ours = PagedModel(tmp_path)
    assert ours.config.max_model_len == 256
    (prompt,) = prompts([40])
    assert greedy(ours, prompt, 64) == transformers_greedy(theirs, prompt, 64)


@pytest.mark.parametrize(("length", "served"), [(50, 64), (100, 256)])
def test_longrope_chooses_its_factors_by_the_served_context(tmp_path: Path, length: int, served: int) -> None:
    """Transformers chooses by the prompt, so that a context longer than the trained one compares with a long prompt."""
    theirs = build(Case("longrope", "Llama", rope("longrope", **LONGROPE)), tmp_path)
    ours = PagedModel(tmp_path, max_model_len=served)
    (prompt,) = prompts([length])
    (logits,) = ours.step([(ours.new_sequence(), prompt)])
    with torch.no_grad():
        assert relative_error(logits, theirs(torch.tensor([prompt])).logits[0]) <= TOLERANCE
