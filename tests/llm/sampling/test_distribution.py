"""Drawing from filtered distributions: the fast path equals the reference, and both are statistically right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trine.kernels import cpu
from trine.llm.sampling import distribution

needs_native = pytest.mark.skipif(not cpu.available(), reason="the native library is not built")


def reference_draw(logits: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    uniform, temperature, top_k, top_p, min_z = torch.from_numpy(table).unbind(1)
    largest, tokens = distribution.argmax(logits)
    is_random = temperature > 0
    z = distribution.scaled_logits(logits, largest, torch.where(is_random, temperature, 1.0).to(torch.float32))
    limit = distribution.thresholds(z, top_k.to(torch.int64), top_p, min_z)
    drawn = distribution.draw(distribution.weights(z).masked_fill(z < limit, 0.0), uniform)
    return torch.where(torch.isfinite(largest), torch.where(is_random, drawn, tokens), -1)


def nearby(table: np.ndarray) -> list[np.ndarray]:
    """Problems that differ by what the last bits of an exponential can move."""
    changes = [(du, dp) for du in (0.0, -2e-6, 2e-6) for dp in (0.0, -2e-6, 2e-6)]
    variants = []
    for du, dp in changes:
        variant = table.copy()
        variant[:, 0] = np.clip(variant[:, 0] + du, 0.0, 1.0 - 2**-53)
        variant[:, 3] = np.where(variant[:, 3] < 1.0, np.clip(variant[:, 3] + dp, 1e-9, 1.0), 1.0)
        variants.append(variant)
    return variants


def agrees(drawn: torch.Tensor, logits: torch.Tensor, table: np.ndarray) -> bool:
    """Whether the tokens are the reference's, or those of a problem that rounding can't tell from it."""
    if torch.equal(drawn, reference_draw(logits, table)):
        return True
    candidates = torch.stack([reference_draw(logits, variant) for variant in nearby(table)])
    return bool((candidates == drawn).any(0).all())


@pytest.mark.parametrize("width", [1, 2, 127, 128, 129, 1000, 5003])
def test_argmax_is_the_first_largest(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn((5, width), generator=generator).mul(2).round()  # ties
    logits[1] = -math.inf
    logits[2] = 3.0
    largest, tokens = distribution.argmax(logits)
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(largest, logits.amax(-1))


def test_argmax_reports_nan() -> None:
    logits = torch.zeros((2, 300))
    logits[1, 299] = math.nan
    largest, _ = distribution.argmax(logits)
    assert largest[0] == 0.0
    assert largest[1].isnan()


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, np.ndarray]:
    """Logits [B, V] and a table [B, 5]: uniform number, temperature, top_k, top_p, log(min_p)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, width = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 64, 127, 128, 129, 1000, 5003]))
    logits = rng.normal(size=(rows, width)).astype(np.float32) * np.float32(draw(st.sampled_from([0.1, 1, 3, 30])))
    if draw(st.booleans()):
        logits = logits.round()  # ties
    if draw(st.booleans()):
        logits[:, rng.random(width) < 0.5] = -np.inf
        logits[:, rng.integers(width)] = 0.0
    if draw(st.integers(0, 9)) == 0:
        logits[rng.integers(rows), rng.integers(width)] = rng.choice([np.nan, np.inf])
    with np.errstate(divide="ignore"):
        min_z = np.log(rng.choice([0.0, 0.0, 0.05, 0.3, 1.0], rows))
    table = np.column_stack(
        [
            np.where(rng.random(rows) < 0.1, 0.0, rng.random(rows)),
            rng.choice([0.0, 0.01, 0.7, 1.0, 5.0], rows),
            np.minimum(rng.choice([0, 0, 2, 5, 40, 300, 4000], rows), width),
            rng.choice([1.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.9999], rows),
            min_z,
        ]
    )
    return torch.from_numpy(logits), table


@needs_native
@given(problems())
@settings(max_examples=400, deadline=None)
def test_the_native_library_draws_the_tokens_of_the_reference(problem: tuple[torch.Tensor, np.ndarray]) -> None:
    logits, table = problem
    drawn = cpu.sample(logits, torch.from_numpy(table))
    assert agrees(drawn, logits, table)
    alone = [cpu.sample(logits[row : row + 1], torch.from_numpy(table[row : row + 1])) for row in range(len(table))]
    assert torch.equal(torch.cat(alone), drawn)


@needs_native
@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_every_build_of_the_library_draws_the_same(name: str) -> None:
    usual = cpu.isa()
    if not cpu.set_isa(name):
        pytest.skip(f"this processor has no {name}")
    try:
        rng = np.random.default_rng(1)
        for width in (50, 4099, 151_936):
            logits = torch.from_numpy(rng.normal(size=(6, width)).astype(np.float32) * 2)
            for top_k, top_p, min_p in ((0, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.9, 0.0), (0, 1.0, 0.02), (3000, 0.5, 0.1)):
                with np.errstate(divide="ignore"):
                    table = np.column_stack([rng.random(6), [0.8] * 6, [top_k] * 6, [top_p] * 6, np.log([min_p] * 6)])
                assert agrees(cpu.sample(logits, torch.from_numpy(table)), logits, table)
    finally:
        cpu.set_isa(usual)


@needs_native
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.999999])
def test_a_wide_nucleus_of_a_large_vocabulary_is_found_exactly(top_p: float) -> None:
    logits = torch.randn((2, 200_000), generator=torch.Generator().manual_seed(3))
    table = np.array([[0.37, 1.0, 0, top_p, -math.inf], [0.9, 0.6, 0, top_p, math.log(0.01)]])
    assert agrees(cpu.sample(logits, torch.from_numpy(table)), logits, table)


@pytest.mark.parametrize("width", [40, 300, 70_000])
def test_every_token_is_drawn_as_often_as_it_is_probable(width: int) -> None:
    """Uniform numbers on a grid visit each token in proportion to its probability, to within one grid step."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn((1, width), generator=generator) * 2
    probabilities = (logits[0].double() / 0.8).softmax(-1)
    points = 400_000
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    z = distribution.scaled_logits(logits, logits.amax(-1), torch.tensor([0.8]))
    mass = distribution.weights(z)
    ends = mass[0].double().cumsum(0)
    # `draw` for all points at once would need the logits 400,000 times; its definition is compared on a sample below.
    counts = torch.bincount(torch.searchsorted(ends, grid * ends[-1], right=True), minlength=len(ends))
    assert (counts[:width] / points - probabilities).abs().max() < 2.5 / points
    sample = grid[:: points // 200]
    drawn = torch.cat([distribution.draw(mass, point[None]) for point in sample])
    assert torch.equal(drawn, torch.searchsorted(ends, (sample * ends[-1]).floor(), right=True))


def test_unlikely_tokens_keep_their_share() -> None:
    """A float32 cumulative sum over 150,000 tokens would lose or invent mass; here each half gets exactly its half."""
    logits = torch.zeros((1, 150_000))
    logits[0, 75_000:] += math.log(1e-4)
    mass = distribution.weights(distribution.scaled_logits(logits, torch.zeros(1), torch.ones(1)))
    share = float(mass[0, 75_000:].sum(dtype=torch.float64) / mass.sum(dtype=torch.float64))
    assert share == pytest.approx(1e-4 / 1.0001, rel=1e-6)
    assert int(distribution.draw(mass, torch.tensor([1.0 - 2**-53], dtype=torch.float64))) == 149_999
    assert int(distribution.draw(mass, torch.tensor([0.0], dtype=torch.float64))) == 0
