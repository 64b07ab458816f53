"""From the query-key-value projection to queries and a filled cache, in one pass.

Bound by memory: each element of the projection is read once, each query written once, each key and value written to its
place in the paged cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.kernels.triton.device import cdiv, early_launch, next_power_of_2, wait_for_inputs
from trine.kernels.triton.launch import launch
from trine.kernels.triton.norm import sum_of_parts

_TILE = 1024  # elements of a program: several heads of one token


@triton.jit
def _prepare_heads(
    row_ptr,
    part_stride,
    heads,
    present,
    norm_ptr,
    cos_sin_row,
    eps,
    out_row_ptr,
    scale,
    head_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    has_norm: tl.constexpr,
    num_parts: tl.constexpr,
):
    """Norm and rotate heads [n] of one token that are `present`, and write them to `out_row_ptr` [n, 1], rounded as
    the projection is, then divided by `scale`.

    A thread has both of two dimensions that turn together: i and i + rotary_dim / 2.
    """
    half: tl.constexpr = rotary_dim // 2
    rest: tl.constexpr = head_dim - rotary_dim
    kind: tl.constexpr = row_ptr.dtype.element_ty
    columns = heads[:, None] * head_dim
    squares = tl.zeros([heads.shape[0]], tl.float32)
    if half > 0:
        turned = tl.arange(0, triton.next_power_of_2(half))
        both = present[:, None] & (turned < half)[None, :]
        first = sum_of_parts(row_ptr, part_stride, columns + turned[None, :], both, num_parts)
        second = sum_of_parts(row_ptr, part_stride, columns + turned[None, :] + half, both, num_parts)
        squares += tl.sum(first * first + second * second, 1)
    if rest > 0:
        others = rotary_dim + tl.arange(0, triton.next_power_of_2(rest))
        inside = present[:, None] & (others < head_dim)[None, :]
        x = sum_of_parts(row_ptr, part_stride, columns + others[None, :], inside, num_parts)
        squares += tl.sum(x * x, 1)
    if has_norm:
        factor = 1.0 / tl.sqrt(squares / head_dim + eps)[:, None]
        if half > 0:
            weight = tl.load(norm_ptr + turned, mask=turned < half, other=0.0).to(tl.float32)
            first = first * factor * weight[None, :]
            weight = tl.load(norm_ptr + half + turned, mask=turned < half, other=0.0).to(tl.float32)
            second = second * factor * weight[None, :]
        if rest > 0:
            weight = tl.load(norm_ptr + others, mask=others < head_dim, other=0.0).to(tl.float32)
            x = x * factor * weight[None, :]
    inverse = 1.0 / scale
    dtype: tl.constexpr = out_row_ptr.dtype.element_ty
    if half > 0:
        cos = tl.load(cos_sin_row + turned, mask=turned < half, other=1.0)[None, :]
        sin = tl.load(cos_sin_row + half + turned, mask=turned < half, other=0.0)[None, :]
        left = (first * cos - second * sin).to(kind).to(tl.float32) * inverse
        right = (second * cos + first * sin).to(kind).to(tl.float32) * inverse
        tl.store(out_row_ptr + turned[None, :], left.to(dtype), mask=both)
        tl.store(out_row_ptr + half + turned[None, :], right.to(dtype), mask=both)
    if rest > 0:
        x = x.to(kind).to(tl.float32) * inverse
        tl.store(out_row_ptr + others[None, :], x.to(dtype), mask=inside)


@triton.jit
def _prepare_qkv_kernel(
    qkv_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    positions_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,
    qkv_stride,
    part_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    eps,
    k_scale,
    v_scale,
    num_heads,
    num_kv_heads,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    has_q_norm: tl.constexpr,
    has_k_norm: tl.constexpr,
    heads_block: tl.constexpr,
    num_parts: tl.constexpr,
    early: tl.constexpr,
):
    """Program (t, j): the j-th block of heads of token t, counted over the queries', the keys' and the values'."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_q_parts = tl.cdiv(num_heads, heads_block)
    num_kv_parts = tl.cdiv(num_kv_heads, heads_block)
    row_ptr = qkv_ptr + token * qkv_stride
    cos_sin_row = cos_sin_ptr
    if rotary_dim > 0:
        cos_sin_row += tl.load(positions_ptr + token) * rotary_dim
    slot = tl.load(slots_ptr + token)
    wait_for_inputs(early)
    if part < num_q_parts:
        heads = part * heads_block + tl.arange(0, heads_block)
        q_row_ptr = q_ptr + (token * num_heads + heads)[:, None] * head_dim
        _prepare_heads(
            row_ptr, part_stride, heads, heads < num_heads, q_norm_ptr, cos_sin_row, eps, q_row_ptr, 1.0,
            head_dim, rotary_dim, has_q_norm, num_parts,
        )  # fmt: skip
    else:
        slot_offset = (slot // block_size) * cache_block_stride + (slot % block_size) * cache_token_stride
        part -= num_q_parts
        is_key = part < num_kv_parts
        part = tl.where(is_key, part, part - num_kv_parts)
        heads = part * heads_block + tl.arange(0, heads_block)
        place = slot_offset + heads[:, None] * cache_head_stride
        row_ptr += num_heads * head_dim
        if is_key:
            _prepare_heads(
                row_ptr, part_stride, heads, heads < num_kv_heads, k_norm_ptr, cos_sin_row, eps, k_cache_ptr + place,
                k_scale, head_dim, rotary_dim, has_k_norm, num_parts,
            )  # fmt: skip
        else:
            row_ptr += num_kv_heads * head_dim
            _prepare_heads(
                row_ptr, part_stride, heads, heads < num_kv_heads, k_norm_ptr, cos_sin_row, eps, v_cache_ptr + place,
                v_scale, head_dim, 0, False, num_parts,
            )  # fmt: skip


def prepare_qkv(
    qkv: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Norm and rotate the heads of qkv [T, (Hq + 2 Hkv) D], write keys and values to the cache; queries [T, Hq, D].

    qkv may come as parts [P, T, (Hq + 2 Hkv) D], whose sum it is. A float8 cache holds keys and values
    divided by their scales.
    """
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError(f"caches must have equal strides, the last 1: {k_cache.stride()} and {v_cache.stride()}")
    parts = qkv if qkv.ndim == 3 else qkv[None]
    num_tokens = parts.shape[1]
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    heads_block = min(max(_TILE // next_power_of_2(head_dim), 1), next_power_of_2(num_heads))
    programs = cdiv(num_heads, heads_block) + 2 * cdiv(num_kv_heads, heads_block)
    launch(
        _prepare_qkv_kernel,
        (num_tokens, programs),
        parts,
        q,
        k_cache,
        v_cache,
        positions,
        cos_sin,
        q_norm,
        k_norm,
        slots,
        parts.stride(1),
        parts.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        eps,
        k_scale,
        v_scale,
        num_heads,
        num_kv_heads,
        block_size=k_cache.shape[2],
        head_dim=head_dim,
        rotary_dim=0 if cos_sin is None else cos_sin.shape[1],
        has_q_norm=q_norm is not None,
        has_k_norm=k_norm is not None,
        heads_block=heads_block,
        num_parts=len(parts),
        num_warps=2,
        **early_launch(qkv.device),
    )
    return q
