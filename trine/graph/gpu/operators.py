"""Operators of lowered graphs: what several nodes become where one kernel computes them all.

A scale that is not 0 says that a result is also, or only, wanted in float8 (e4m3): the number over the scale, rounded,
magnitudes above 448 becoming that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.graph.operators.algebra import activate
from trine.graph.operators.attention import scaled_dot_product_attention
from trine.graph.operators.registry import operator
from trine.kernels import fp8


def _rounded(x: Tensor, scale: float) -> Tensor:
    return fp8.saturate(x, scale) if scale else x


@operator("HeadsAttention")
def heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    heads: int,
    scale: float,
    guarded: int = 0,
    out_scale: float = 0.0,
) -> Tensor:
    """Attention of q [B, S, H D] over k and v [B, T, H D], each head's numbers side by side: [B, S, H D]."""
    q, k, v = (x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2) for x in (q, k, v))
    y = scaled_dot_product_attention(q, k, v, mask, scale=scale, guarded=guarded)
    return _rounded(y.transpose(1, 2).flatten(-2), out_scale)


@operator("AddLayerNorm")
def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float,
    out_scale: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layer norm over the last axis of x + residual [..., H]; the sum; the norm in float8, if out_scale says so."""
    total = x if residual is None else x + residual
    wide = total.float()
    variance, mean = torch.var_mean(wide, -1, unbiased=False, keepdim=True)
    normal = (wide - mean) * torch.rsqrt(variance + epsilon) * scale.float()
    normal = normal if bias is None else normal + bias.float()
    return normal.to(x.dtype), total, _rounded(normal, out_scale) if out_scale else None


@operator("Fp8Linear")
def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scale: float,
    activation: str = "",
    out_scale: float = 0.0,
) -> Tensor:
    """activation(x weightᵀ + bias + residual) of float8 numbers: x [..., K] times `scale`, weight [N, K] times its
    scales [N]. The result is float32, or float8 with out_scale.
    """
    y = torch.matmul(x.float() * scale, (weight.float() * weight_scales[:, None]).T)
    y = y if bias is None else y + bias.float()
    y = y if residual is None else y + residual.float()
    return _rounded(activate(y, activation), out_scale)


@operator("QuantizeFp8")
def quantize_fp8(x: Tensor, *, scale: float) -> Tensor:
    """x over the scale in float8."""
    return _rounded(x, scale)
