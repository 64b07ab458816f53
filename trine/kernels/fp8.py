"""Matrix products in 8-bit floating point (e4m3: 4 bits of exponent, 3 of mantissa; Micikevicius et al. 2022).

Weights have a scale for each output channel, activations one for each token, found at run time: what is stored is the
number divided by its scale, so that a row's largest magnitude becomes the format's, 448. Here are the types that the
back ends share, and the operations in plain PyTorch, which `trine.kernels.triton.fp8` is tested against. Unlike those
on a GPU these round activations for any number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from trine.kernels.types import PackedWeight

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A linear layer's weight: `values[n, k] * scales[n]`.

    values  [N, K] float8_e4m3fn
    scales  [N] float32
    """

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self) -> torch.Tensor:
        """[N, K] float32."""
        return self.values.float() * self.scales[:, None]


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Activations on their way into a product: `values[t, k] * scales[t, k // (K / G)]`, rounded from `dtype`.

    values  [T, K] float8_e4m3fn
    scales  [T, G] float32, one for each of G equal groups of a row's columns; most often G is 1
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def is_cuda(self) -> bool:
        return self.values.is_cuda

    def dequantize(self) -> torch.Tensor:
        """[T, K] of `dtype`."""
        return self.widened().to(self.dtype)

    def widened(self) -> torch.Tensor:
        """[T, K] float32."""
        rows, groups = self.scales.shape
        return (self.values.float().view(rows, groups, -1) * self.scales[:, :, None]).view(self.shape)


@dataclass(frozen=True, slots=True)
class RowToNorm:
    """One row whose RMS norm, with `weight` [H], the product that reads it computes: hidden [1, H]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    eps: float

    @property
    def shape(self) -> torch.Size:
        return self.hidden.shape

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def is_cuda(self) -> bool:
        return self.hidden.is_cuda

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype


StoredRows = torch.Tensor | Fp8Rows
"""Activations: plain, or rounded by the kernel that made them."""

Rows = StoredRows | RowToNorm
"""What a product takes."""


def saturate(x: torch.Tensor, scales: torch.Tensor | float) -> torch.Tensor:
    """x / scales as float8, magnitudes above the format's largest becoming that."""
    return (x.float() / scales).clamp(-LARGEST, LARGEST).to(DTYPE)


def row_scales(x: torch.Tensor) -> torch.Tensor:
    """[T] float32 for the rows of x [T, K]; 1 for a row of zeros."""
    scales = x.float().abs().amax(dim=1) / LARGEST
    return torch.where(scales == 0, 1.0, scales)


def quantize_rows(x: torch.Tensor) -> Fp8Rows:
    """Round x [T, K]."""
    scales = row_scales(x)[:, None]
    return Fp8Rows(saturate(x, scales), scales, x.dtype)


def pack_fp8(weight: torch.Tensor, scales: torch.Tensor | None = None) -> Fp8Weight:
    """Round `weight` [N, K]; with `scales` [N] it holds float8 numbers already, whatever its dtype."""
    if scales is not None:
        return Fp8Weight(weight.to(DTYPE), scales)
    scales = row_scales(weight)
    return Fp8Weight(saturate(weight, scales[:, None]), scales)


def linear(
    x: Rows, weight: PackedWeight, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, or `out_dtype`."""
    if not isinstance(weight, Fp8Weight):
        raise TypeError(f"float8 kernels can't read a {type(weight).__name__}")
    assert not isinstance(x, RowToNorm), "made for a product that norms it"
    rows = x if isinstance(x, Fp8Rows) else quantize_rows(x)
    y = F.linear(rows.widened(), weight.values.float()) * weight.scales
    if bias is not None:
        y += bias.float()
    return y.to(out_dtype or x.dtype)


def linear_silu_mul(x: Rows, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up of the product's halves: x [T, K], weight [2I, K] (gate, then up) give [T, I]."""
    gate, up = linear(x, weight, bias).float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)
