"""The choice of a token as a Triton kernel."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from trine.kernels import ops
from trine.kernels.triton.sampling import argmax, choose_greedy, thresholds
from trine.llm.sampling import distribution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("width", [1, 500, 2048, 70000])
def test_argmax_is_the_first_of_the_largest(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-40, 40, (5, width + 3), generator=generator).float()[:, :width].to(DEVICE)
    logits[0] = -math.inf
    for _ in range(2):  # a launch leaves its counters ready for the next
        largest, tokens = argmax(logits)
        assert torch.equal(largest, logits.amax(1))
        first = [row.index(max(row)) for row in logits.tolist()]
        assert tokens.tolist() == first


def test_nan_and_infinity_have_no_finite_largest() -> None:
    logits = torch.zeros(3, 9000, device=DEVICE)
    logits[0, 5000] = math.nan
    logits[1, 8000] = math.inf
    largest, tokens = argmax(logits)
    assert largest.tolist() == [math.inf, math.inf, 0.0]
    assert tokens.tolist() == [5000, 8000, 0]


def test_no_rows() -> None:
    assert argmax(torch.zeros(0, 10, device=DEVICE))[1].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_choice_is_kept_as_its_rows_last_token(dtype: torch.dtype) -> None:
    logits = torch.randint(-40, 40, (4, 5000), generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    logits[2, 77] = math.nan
    last_token = torch.full((9,), 5, device=DEVICE)
    rows = torch.tensor([7, 0, 3, 8], device=DEVICE)
    tokens = choose_greedy(logits, rows, last_token).tolist()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert tokens == [expected[0], expected[1], -1, expected[3]]
    assert last_token.tolist() == [expected[1], 5, 5, 0, 5, 5, 5, expected[0], expected[3]]


def kept(z: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Tokens that can be drawn: those from the limit on that have a weight."""
    return (z >= limit.to(z.device)) & (distribution.weights(z) > 0)


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("filters", ["k", "p", "min", "kp", "kpmin"])
def test_thresholds_equal_those_of_a_sorted_vocabulary(spread: float, filters: str) -> None:
    generator = torch.Generator().manual_seed(len(filters))
    logits = torch.randn(6, 1500, generator=generator) * spread
    logits[1] = logits[1].round()  # ties
    logits[2, 3:] = -math.inf
    z = distribution.scaled_logits(logits, logits.amax(1), None)
    top_k = torch.tensor([1, 7, 50, 0, 1499, 3]) if "k" in filters else None
    top_p = torch.tensor([0.9, 0.5, 1.0, 1e-9, 0.999, 0.3], dtype=torch.float64) if "p" in filters else None
    min_z = torch.tensor([-math.inf, -1.0, -5.0, 0.0, -0.1, -2.0], dtype=torch.float64) if "min" in filters else None
    with ops.reference_only():
        expected = distribution.thresholds(z, top_k, top_p, min_z)
    moved = [None if x is None else x.to(DEVICE) for x in (top_k, top_p, min_z)]
    # As the columns of the sampler's table lie.
    columns = [None if x is None else torch.stack([x, -x], dim=1)[:, 0] for x in moved]
    for parameters in moved, columns:
        assert torch.equal(kept(z, thresholds(z.to(DEVICE), *parameters).cpu()), kept(z, expected))
