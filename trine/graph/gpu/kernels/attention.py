"""Attention on rows as projections make them: heads side by side, no transposes before or after (FlashAttention-2).

Roofline for short sequences: four tensors of rows are read or written once, which the copy rate bounds. Blocks of
keys of one head pass by while the sums stay in registers; what a block of queries shares comes from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from trine.graph.gpu.kernels.epilogue import rounded
from trine.kernels import fp8
from trine.kernels.triton.device import early_launch, wait_for_inputs

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class AttentionTuning:
    """The free choices of the kernel."""

    queries: int = 64
    keys: int = 64
    num_warps: int = 4
    num_stages: int = 2


@triton.jit
def _heads_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, y_ptr, length, key_length, scale, inverse_scale,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, mask_batch, mask_head, mask_row, mask_column,
    heads: tl.constexpr, size: tl.constexpr, size_block: tl.constexpr, has_mask: tl.constexpr,
    mask_rows: tl.constexpr, guarded: tl.constexpr,
    has_rounded: tl.constexpr, query_block: tl.constexpr, key_block: tl.constexpr, num_stages: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """Program (i, j): queries i * query_block on, of head j % heads of batch j // heads."""
    wait_for_inputs(early)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    rows = tl.program_id(0) * query_block + tl.arange(0, query_block)
    numbers = tl.arange(0, size_block)
    there = numbers < size
    at = head * size + numbers
    q = tl.load(
        q_ptr + batch * q_batch + rows[:, None] * q_row + at[None, :],
        mask=(rows < length)[:, None] & there[None, :],
        other=0.0,
    )
    top = tl.full([query_block], float("-inf"), tl.float32)
    total = tl.zeros([query_block], tl.float32)
    acc = tl.zeros([query_block, size_block], tl.float32)
    for start in tl.range(0, key_length, key_block, num_stages=num_stages):
        keys = start + tl.arange(0, key_block)
        present = keys < key_length
        k = tl.load(
            k_ptr + batch * k_batch + keys[None, :] * k_row + at[:, None],
            mask=present[None, :] & there[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k) * scale
        if has_mask:
            at_keys = mask_ptr + batch * mask_batch + head * mask_head + keys * mask_column
            if mask_rows:
                seen = (rows < length)[:, None] & present[None, :]
                mask = tl.load(at_keys[None, :] + rows[:, None] * mask_row, mask=seen, other=0.0)
                scores += mask.to(tl.float32) * 1.4426950408889634
            else:
                mask = tl.load(at_keys, mask=present, other=0.0)
                scores += (mask.to(tl.float32) * 1.4426950408889634)[None, :]
        scores = tl.where(present[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            v_ptr + batch * v_batch + keys[:, None] * v_row + at[None, :],
            mask=present[:, None] & there[None, :],
            other=0.0,
        )
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        top = new_top
    y = acc / total[:, None]
    if guarded:
        y = tl.where((total > 0)[:, None], y, 0.0)  # a sum that is not a number is not above 0 either
    if has_rounded:
        y = rounded(y, inverse_scale)
    out = y_ptr + (batch * length + rows[:, None]) * (heads * size) + at[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(rows < length)[:, None] & there[None, :])


def heads_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    scale: float,
    guarded: bool = False,
    out_scale: float = 0.0,
    tuning: AttentionTuning | None = None,
) -> torch.Tensor:
    """Attention of q [B, S, H D] over k and v [B, T, H D], numbers of a row side by side: [B, S, H D], contiguous.

    `mask` broadcasts to [B, H, S, T]; `guarded` makes rows whose mask hides every key 0. With `out_scale` the result is
    float8, over that scale.
    """
    tuning = tuning or AttentionTuning()
    (batch, length, width), key_length = q.shape, k.shape[1]
    size = width // heads
    y = torch.empty((batch, length, width), dtype=fp8.DTYPE if out_scale else q.dtype, device=q.device)
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        strides = mask.expand(batch, heads, length, key_length).stride()
    if y.numel():
        _heads_attention_kernel[(triton.cdiv(length, tuning.queries), batch * heads)](
            q, k, v, mask, y, length, key_length, scale * LOG2_E, 1.0 / out_scale if out_scale else 0.0,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), *strides,
            heads=heads, size=size, size_block=max(triton.next_power_of_2(size), 16), has_mask=mask is not None,
            mask_rows=bool(strides[2]),
            guarded=guarded, has_rounded=bool(out_scale), query_block=tuning.queries, key_block=tuning.keys,
            num_stages=tuning.num_stages, num_warps=tuning.num_warps, **early_launch(q.device),
        )  # fmt: skip
    return y
