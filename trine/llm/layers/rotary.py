"""Tables of cosines and sines for rotary position embedding, with every scaling that the served families use."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from trine.llm.config import RopeConfig


def cos_sin_table(rope: RopeConfig, max_len: int, device: torch.device) -> torch.Tensor:
    """[max_len, rotary_dim] float32: cosines of each position in the first half, sines in the second.

    All in float32, as Transformers computes them, so that a checkpoint sees the angles it was trained with.
    """
    frequencies, attention_factor = _SCALINGS[rope.kind](rope, max_len)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies
    return (torch.cat((angles.cos(), angles.sin()), dim=1) * attention_factor).to(device)


def _inverse_frequencies(theta: float | torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """theta^(-2i / rotary_dim) for i < rotary_dim / 2 (Su et al. 2021)."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return torch.as_tensor(1.0 / theta**exponents)


def _default(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    return _inverse_frequencies(rope.theta, rope.rotary_dim), 1.0


def _linear(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    """Position interpolation (Chen et al. 2023)."""
    return _inverse_frequencies(rope.theta, rope.rotary_dim) / float(rope.parameters["factor"]), 1.0


def _dynamic(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    """Dynamic NTK: past the trained length the base grows with the sequence. Frequencies are [max_len, rotary_dim / 2].

    Row p has the base of a sequence that ends at p. This equals Transformers while a sequence grows token by token,
    and keeps a cached key independent of what follows it, which prefix reuse needs; a longer prompt in one pass is
    rotated there by its final length instead.
    """
    factor = float(rope.parameters["factor"])
    dim = rope.rotary_dim
    lengths = torch.arange(1, max_len + 1, dtype=torch.float64).clamp(min=rope.original_max_len)
    growth = factor * lengths / rope.original_max_len - (factor - 1)
    theta = (rope.theta * growth ** (dim / (dim - 2))).to(torch.float32)
    return _inverse_frequencies(theta[:, None], dim), 1.0


def _llama3(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended."""
    factor, low, high = (float(rope.parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    frequencies = _inverse_frequencies(rope.theta, rope.rotary_dim)
    wavelengths = 2 * math.pi / frequencies
    blend = (rope.original_max_len / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = torch.where(wavelengths > rope.original_max_len / low, frequencies / factor, blended)
    return torch.where(wavelengths < rope.original_max_len / high, frequencies, scaled), 1.0


def _yarn(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, and sharpen attention."""
    given = rope.parameters
    dim = rope.rotary_dim
    factor = float(given["factor"])

    def dimension_of(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        return dim * math.log(rope.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_of(float(given.get("beta_fast") or 32))
    high = dimension_of(float(given.get("beta_slow") or 1))
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = _inverse_frequencies(rope.theta, dim)
    frequencies = frequencies / factor * interpolated + frequencies * (1 - interpolated)
    return frequencies, _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: RopeConfig, factor: float) -> float:
    given = rope.parameters
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(float(given["mscale"])) / scale(float(given["mscale_all_dim"]))
    return scale(1.0)


def _longrope(rope: RopeConfig, max_len: int) -> tuple[torch.Tensor, float]:
    """LongRoPE (Ding et al. 2024): a factor for each dimension; the long ones when the served context needs them.

    The choice is made once, by the context that is served, so that cached keys stay valid as a sequence grows.
    """
    given = rope.parameters
    extended = max_len > rope.original_max_len
    factors = torch.tensor(given["long_factor" if extended else "short_factor"], dtype=torch.float32)
    growth = float(given["factor"])
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(rope.original_max_len))
    return _inverse_frequencies(rope.theta, rope.rotary_dim) / factors, float(attention_factor)


_SCALINGS: dict[str, Callable[[RopeConfig, int], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
