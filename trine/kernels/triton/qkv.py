"""From the query-key-value projection to queries and a filled cache, in one pass.

Bound by memory: each element of the projection is read once from memory (twice from the cache near the core), each
query written once, each key and value written to its place in the paged cache.
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
def _norm_and_rotate(
    row_ptr,
    part_stride,
    heads,
    inside,
    norm_ptr,
    cos_sin_row,
    eps,
    head_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    has_norm: tl.constexpr,
    dim_block: tl.constexpr,
    num_parts: tl.constexpr,
):
    """Heads `heads` [n] of one token, normed and rotated: [n, dim_block] float32.

    Element i of the rotated part turns together with its partner i ± rotary_dim / 2, which is loaded a second time.
    """
    dims = tl.arange(0, dim_block)
    x = sum_of_parts(row_ptr, part_stride, heads[:, None] * head_dim + dims[None, :], inside, num_parts)
    half: tl.constexpr = rotary_dim // 2
    partner_dims = tl.where(dims < half, dims + half, dims - half)
    turned = dims < rotary_dim
    if rotary_dim > 0:
        partner_columns = heads[:, None] * head_dim + partner_dims[None, :]
        partner = sum_of_parts(row_ptr, part_stride, partner_columns, inside & turned[None, :], num_parts)
    if has_norm:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / head_dim + eps)[:, None]
        x = x * scale * tl.load(norm_ptr + dims, mask=dims < head_dim, other=0.0).to(tl.float32)[None, :]
        if rotary_dim > 0:
            partner = partner * scale * tl.load(norm_ptr + partner_dims, mask=turned, other=0.0).to(tl.float32)[None, :]
    if rotary_dim > 0:
        cos = tl.load(cos_sin_row + dims % half, mask=turned, other=1.0)
        sin = tl.load(cos_sin_row + half + dims % half, mask=turned, other=0.0)
        x = x * cos[None, :] + partner * tl.where(dims < half, -sin, sin)[None, :]
    return x


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
    dim_block: tl.constexpr,
    num_parts: tl.constexpr,
    early: tl.constexpr,
):
    """Program (t, j): the j-th block of heads of token t, counted over the queries', the keys' and the values'."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_q_parts = tl.cdiv(num_heads, heads_block)
    num_kv_parts = tl.cdiv(num_kv_heads, heads_block)
    dims = tl.arange(0, dim_block)
    row_ptr = qkv_ptr + token * qkv_stride
    cos_sin_row = cos_sin_ptr
    if rotary_dim > 0:
        cos_sin_row += tl.load(positions_ptr + token) * rotary_dim
    slot = tl.load(slots_ptr + token)
    wait_for_inputs(early)
    if part < num_q_parts:
        heads = part * heads_block + tl.arange(0, heads_block)
        inside = (heads < num_heads)[:, None] & (dims < head_dim)[None, :]
        q = _norm_and_rotate(
            row_ptr, part_stride, heads, inside, q_norm_ptr, cos_sin_row, eps,
            head_dim, rotary_dim, has_q_norm, dim_block, num_parts,
        )  # fmt: skip
        q_row_ptr = q_ptr + (token * num_heads + heads)[:, None] * head_dim + dims[None, :]
        tl.store(q_row_ptr, q.to(q_ptr.dtype.element_ty), mask=inside)
    else:
        slot_offset = (slot // block_size) * cache_block_stride + (slot % block_size) * cache_token_stride
        part -= num_q_parts
        is_key = part < num_kv_parts
        part = tl.where(is_key, part, part - num_kv_parts)
        heads = part * heads_block + tl.arange(0, heads_block)
        inside = (heads < num_kv_heads)[:, None] & (dims < head_dim)[None, :]
        place = slot_offset + heads[:, None] * cache_head_stride + dims[None, :]
        if is_key:
            row_ptr += num_heads * head_dim
            k = _norm_and_rotate(
                row_ptr, part_stride, heads, inside, k_norm_ptr, cos_sin_row, eps,
                head_dim, rotary_dim, has_k_norm, dim_block, num_parts,
            )  # fmt: skip
            k = k.to(qkv_ptr.dtype.element_ty).to(tl.float32) * (1.0 / k_scale)
            tl.store(k_cache_ptr + place, k.to(k_cache_ptr.dtype.element_ty), mask=inside)
        else:
            row_ptr += (num_heads + num_kv_heads) * head_dim
            v = sum_of_parts(row_ptr, part_stride, heads[:, None] * head_dim + dims[None, :], inside, num_parts)
            v = v.to(qkv_ptr.dtype.element_ty).to(tl.float32) * (1.0 / v_scale)
            tl.store(v_cache_ptr + place, v.to(v_cache_ptr.dtype.element_ty), mask=inside)


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
    dim_block = next_power_of_2(head_dim)
    heads_block = min(max(_TILE // dim_block, 1), next_power_of_2(num_heads))
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
        dim_block=dim_block,
        num_parts=len(parts),
        num_warps=2,
        **early_launch(qkv.device),
    )
    return q
