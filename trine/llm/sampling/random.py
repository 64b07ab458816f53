"""Random numbers that are a function of (seed, step) and of nothing else.

A sequence's token at step i is drawn with `uniforms(seed, i)`, so it does not depend on the batch, the row, the order
of the steps or a preemption in between. The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators") used as a counter: its output function is a bijection of 64 bits, and the seed passes
through it once before the step is added.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1

UInt64Array = npt.NDArray[np.uint64]


def as_uint64(seed: int) -> int:
    """Any 64-bit integer, signed or not, as the unsigned one with the same bits."""
    return seed & _MASK


def _mix(x: UInt64Array) -> UInt64Array:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: UInt64Array, steps: UInt64Array) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (seed, step), a multiple of 2**-53. Both arrays [B] uint64."""
    bits = _mix(_mix(seeds + _GAMMA) + (steps + np.uint64(1)) * _GAMMA)
    result: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result
