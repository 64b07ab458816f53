"""The random numbers of a sequence: a function of its seed and the step, and uniform."""

from __future__ import annotations

import numpy as np

from trine.llm.sampling.random import as_uint64, uniforms


def draws(seed: int, steps: int) -> np.ndarray:
    return uniforms(np.full(steps, as_uint64(seed), dtype=np.uint64), np.arange(steps, dtype=np.uint64))


def test_are_a_function_of_seed_and_step() -> None:
    alone = [draws(seed, 20)[step] for seed, step in ((7, 3), (8, 19), (7, 0))]
    together = uniforms(np.array([7, 8, 7], dtype=np.uint64), np.array([3, 19, 0], dtype=np.uint64))
    assert together.tolist() == alone


def test_any_64_bit_seed_works_and_signs_do_not_collide() -> None:
    seeds = (0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 2)
    first = {draws(seed, 1)[0] for seed in seeds}
    assert len(first) == len(seeds)
    assert as_uint64(-1) == 2**64 - 1


def test_are_uniform_within_a_seed_and_over_neighbouring_seeds() -> None:
    within = draws(12345, 100_000)
    across = uniforms(np.arange(100_000, dtype=np.uint64), np.zeros(100_000, dtype=np.uint64))
    for sample in (within, across):
        assert 0.0 <= sample.min() <= sample.max() < 1.0
        counts = np.bincount((sample * 100).astype(int), minlength=100)
        chi_square = ((counts - 1000.0) ** 2 / 1000.0).sum()
        assert chi_square < 99 + 5 * np.sqrt(2 * 99)


def test_steps_and_seeds_are_uncorrelated() -> None:
    table = np.stack([draws(seed, 2000) for seed in range(20)])
    assert np.abs(np.corrcoef(table) - np.eye(20)).max() < 0.12
    lagged = np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]
    assert abs(lagged) < 0.03
