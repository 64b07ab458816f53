"""Attention over the paged cache: a step's decode rows and its prefill rows go to a kernel each."""

from __future__ import annotations

import torch

from trine.kernels.triton.decode_attention import decode_attention
from trine.kernels.triton.prefill_attention import prefill_attention
from trine.kernels.types import PagedBatch

MAX_HEAD_DIM = 256
MAX_GROUP = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[str]:
    """Why these kernels can't serve an attention layer of this shape; empty when they can."""
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim {head_dim} is above {MAX_HEAD_DIM}")
    if num_heads % num_kv_heads:
        reasons.append(f"num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}")
    elif num_heads // num_kv_heads > MAX_GROUP:
        reasons.append(f"{num_heads // num_kv_heads} query heads a key-value head are above {MAX_GROUP}")
    return reasons


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Causal attention of q [T, Hq, D] over the paged cache, which holds the batch's own keys and values: [T, Hq * D].

    Reads lengths and block tables on the device only, so that a captured graph serves other lengths. A row's result
    depends on nothing but that row: sequences are split by their own length alone.
    """
    num_tokens, num_heads, head_dim = q.shape
    _check(k_cache, v_cache)
    out = torch.empty((num_tokens, num_heads * head_dim), dtype=q.dtype, device=q.device)
    if batch.num_decodes:
        decode_attention(
            q, k_cache, v_cache, batch, scale, sliding_window, out, k_scale=k_scale, v_scale=v_scale
        )  # fmt: skip
    if batch.num_decodes < num_tokens:
        _prefill(q, k_cache, v_cache, batch, scale, sliding_window, k_scale, v_scale, out)
    return out


def _check(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError(f"caches must have equal strides, the last 1: {k_cache.stride()} and {v_cache.stride()}")


def _prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
    k_scale: float,
    v_scale: float,
    out: torch.Tensor,
) -> None:
    prefill_attention(q, k_cache, v_cache, batch, scale * k_scale, sliding_window, out)
    if v_scale != 1.0:
        out[batch.num_decodes :] *= v_scale
