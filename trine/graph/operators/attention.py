"""Attention and rotary embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trine.graph.dtypes import from_onnx
from trine.graph.operators.registry import operator


@operator("ScaledDotProductAttention")
def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    k_transposed: int = 0,
    guarded: int = 0,
) -> Tensor:
    """Trine's own: softmax(q kᵀ scale + mask) v over the last two dimensions; with k_transposed k is [..., D, S].

    `guarded` makes weights that are not a number 0: a row whose mask hides every key gives zeros.
    """
    scores = torch.matmul(q, k if k_transposed else k.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1)
    return torch.matmul(torch.where(torch.isnan(weights), 0.0, weights) if guarded else weights, v)


def _split_heads(x: Tensor, heads: int | None) -> Tensor:
    """[B, S, heads * D] to [B, heads, S, D]; four dimensions are left as they are."""
    if x.dim() == 4:
        return x
    if not heads:
        raise ValueError("Attention over three dimensions needs q_num_heads and kv_num_heads")
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


@operator("Attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    _outputs: int = 1,
) -> Any:
    """Of [B, H, S, D] or [B, S, H D]: heads in groups, a cache before the keys, causal, with a cap on scores."""
    flat = q.dim() == 3
    q, k, v = _split_heads(q, q_num_heads), _split_heads(k, kv_num_heads), _split_heads(v, kv_num_heads)
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = (k, v)
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = torch.matmul(q * root, (k * root).transpose(-1, -2))
    seen = [scores]
    bias = _attention_bias(scores, mask, bool(is_causal), past, nonpad_kv_seqlen)
    capped = softcap * torch.tanh(scores / softcap) if softcap else scores
    masked = capped + bias if bias is not None else capped
    seen += [masked, capped] if qk_matmul_output_mode < 0 else [capped, masked]
    kind = None if softmax_precision is None else from_onnx(softmax_precision)
    weights = torch.softmax(masked if kind is None else masked.to(kind.torch), -1).to(q.dtype)
    if bias is not None:
        weights = torch.where(torch.isnan(weights), torch.zeros((), dtype=weights.dtype), weights)
    y = torch.matmul(weights, v)
    if flat:
        y = y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)
    return (y, *present, [*seen, weights][qk_matmul_output_mode])[:_outputs] if _outputs > 1 else y


def _attention_bias(
    scores: Tensor, mask: Tensor | None, causal: bool, past: int, lengths: Tensor | None
) -> Tensor | None:
    """What is added to the scores [B, H, Q, K]: the mask, filled up with -inf, and -inf where nobody may look."""
    queries, keys = scores.shape[-2:]
    bias: Tensor | None = None
    low = float("-inf")
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(~mask, low) if mask.dtype is torch.bool else mask
        if bias.shape[-1] < keys:
            bias = torch.nn.functional.pad(bias, [0, keys - bias.shape[-1]], value=low)
    if causal:
        offset = past if lengths is None else (lengths.reshape(-1, 1, 1, 1) - queries)
        hidden = torch.arange(keys)[None, :] > torch.arange(queries)[:, None] + offset
        own = torch.zeros(hidden.shape, dtype=scores.dtype).masked_fill(hidden, low)
        bias = own if bias is None else bias + own
    if lengths is not None:
        padded = torch.arange(keys) >= lengths.reshape(-1, 1, 1, 1)
        own = torch.zeros(padded.shape, dtype=scores.dtype).masked_fill(padded, low)
        bias = own if bias is None else bias + own
    return bias


@operator("RotaryEmbedding")
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Pairs of each head's first numbers turned by their position's angle."""
    heads = _split_heads(x, num_heads).transpose(1, 2)  # [B, S, H, D]
    width = rotary_embedding_dim or heads.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    if position_ids is not None:
        cos, sin = cos[position_ids.long()], sin[position_ids.long()]
    cos, sin = (angle[..., : width // 2].unsqueeze(2) for angle in (cos, sin))
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    joined = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    y = torch.cat([joined, rest], -1)
    return y.reshape(x.shape) if x.dim() == 3 else y.transpose(1, 2)
