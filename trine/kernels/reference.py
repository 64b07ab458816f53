"""Every operation in plain PyTorch: slow, obviously right, on any device. The other back ends are tested against this.

Shapes: T packed tokens, H hidden size, Hq and Hkv query and key-value heads, D head size. Sums are taken in float32
and results have the dtype of the first argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812

from trine.kernels import fp8
from trine.kernels.types import PackedWeight, PagedBatch, Weight


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A linear layer's weight as integers: `values[n, k] * scales[n, k // (K / G)]` is the weight.

    values  [N, K] int8, from -127 to 127
    scales  [N, G] float32: one for each group of K / G neighbours in a row; G = 1 is a scale for each output channel
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
        rows, columns = self.values.shape
        groups = self.values.view(rows, self.scales.shape[1], -1).float()
        return (groups * self.scales[:, :, None]).view(rows, columns)


def pack_int8(weight: torch.Tensor, group_size: int | None = None) -> Int8Weight:
    """Round `weight` [N, K] to int8: scale = largest magnitude / 127 of each row, or of each `group_size` in a row."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, group_size or columns)
    scales = groups.abs().amax(dim=2) / 127
    scales = torch.where(scales == 0, 1.0, scales)
    values = (groups / scales[:, :, None]).round_().clamp_(-127, 127).to(torch.int8)
    return Int8Weight(values.view(rows, columns), scales)


def _as_int8(weight: PackedWeight) -> Int8Weight:
    if not isinstance(weight, Int8Weight):
        raise TypeError(f"the reference kernels can't read a {type(weight).__name__}: it belongs to another back end")
    return weight


def linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, or `out_dtype`."""
    if isinstance(weight, torch.Tensor):
        y = F.linear(x, weight, bias)
    else:
        y = F.linear(x.float(), _as_int8(weight).dequantize(), None if bias is None else bias.float())
    return y.to(out_dtype or x.dtype)


def linear_silu_mul(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`silu_mul(linear(x, weight, bias))`: x [T, K], weight [2I, K] (gate, then up) give [T, I]."""
    return silu_mul(linear(x, weight, bias))


def embedding(token_ids: torch.Tensor, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Rows `token_ids` [T] of weight [V, H], as [T, H] in `dtype`."""
    if isinstance(weight, torch.Tensor):
        return F.embedding(token_ids, weight).to(dtype)
    weight = _as_int8(weight)
    return Int8Weight(weight.values[token_ids], weight.scales[token_ids]).dequantize().to(dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, which has weight's size (Zhang and Sennrich 2019)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x [T, H] to `residual` [T, H] in place; returns the sum's RMS norm."""
    residual += x
    return rms_norm(residual, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016)."""
    y = F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
    return y.to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate_up [T, 2I], whose first half is the gate: [T, I] (SwiGLU, Shazeer 2020)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu(x: torch.Tensor, approximate: Literal["tanh", "none"]) -> torch.Tensor:
    """The Gaussian error linear unit, exact ("none") or by its tanh approximation (Hendrycks and Gimpel 2016)."""
    return F.gelu(x.float(), approximate=approximate).to(x.dtype)


def route(x: torch.Tensor, gate: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token of x [T, H]: the `top_k` largest of softmax(x gateᵀ), gate [E, H].

    Returns their weights [T, K] float32, which `normalize` makes add up to one, and their numbers [T, K] int32, largest
    weight first (Shazeer et al. 2017; the softmax is over all experts).
    """
    weights, chosen = F.linear(x.float(), gate.float()).softmax(dim=-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen.to(torch.int32)


def experts(
    x: torch.Tensor,
    gate_up: Sequence[Weight] | torch.Tensor,
    down: Sequence[Weight] | torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    product_silu_mul: Callable[[torch.Tensor, Weight], torch.Tensor] = linear_silu_mul,
    product: Callable[[torch.Tensor, Weight], torch.Tensor] = linear,
) -> torch.Tensor:
    """Of each token of x [T, H] the chosen experts' MLPs, summed with their weights: [T, H].

    chosen and weights are [T, K], gate_up [E, 2I, H] (gate, then up) and down [E, H, I]. An expert computes all of its
    tokens at once, and no other expert's weights are touched; sums go by ascending expert.
    """
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(chosen.flatten().tolist())):
        rows, at = torch.where(chosen == expert)
        mixed = product(product_silu_mul(x[rows], gate_up[expert]), down[expert])
        y.index_add_(0, rows, mixed.float() * weights[rows, at, None])
    return y.to(x.dtype)


def rotate(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first rot_dim elements of each head of x [T, heads, D] (Su et al. 2021).

    Element i < rot_dim / 2 turns together with element i + rot_dim / 2. cos_sin [P, rot_dim] float32 holds the
    cosines of a position in its first half, the sines in its second.
    """
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin[positions][:, None, :].chunk(2, dim=-1)
    first, second = x[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def write_cache(cache: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """Write values [T, Hkv, D] to slots [T] of cache [num_blocks, Hkv, block_size, D]."""
    block_size = cache.shape[2]
    if cache.dtype == fp8.DTYPE:  # PyTorch has no indexed writes of it
        cache, values = cache.view(torch.uint8), fp8.saturate(values, 1.0).view(torch.uint8)
    cache[slots // block_size, :, slots % block_size] = values.to(cache.dtype)


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
    """What stands between the query-key-value projection and attention; returns the queries [T, Hq, D].

    qkv [T, (Hq + 2 Hkv) D] holds queries, keys, values. Queries and keys get an RMS norm over each head (if q_norm
    and k_norm [D] are given), then the rotary embedding of their positions [T] (if cos_sin is given). Keys and values
    are divided by their scales and written into the caches [num_blocks, Hkv, block_size, D] at slots [T] = block *
    block_size + offset.
    """
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    if cos_sin is not None:
        q = rotate(q, positions, cos_sin)
        k = rotate(k, positions, cos_sin)
    write_cache(k_cache, k if k_scale == 1.0 else k.float() / k_scale, slots)
    write_cache(v_cache, v if v_scale == 1.0 else v.float() / v_scale, slots)
    return q.contiguous()


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
    """Causal attention of q [T, Hq, D] over the paged cache, which already holds the batch's own keys and values.

    Caches are [num_blocks, Hkv, block_size, D], to be multiplied by k_scale and v_scale; query head h reads key-value
    head h // (Hq / Hkv). A token at position p sees positions max(0, p - sliding_window + 1) to p. Returns [T, Hq * D].
    """
    num_tokens, num_heads, head_dim = q.shape
    output = q.new_empty(num_tokens, num_heads * head_dim)
    starts = batch.query_start.tolist()
    for sequence, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        keys = _gather(k_cache, batch.block_table[sequence], length) * k_scale
        values = _gather(v_cache, batch.block_table[sequence], length) * v_scale
        output[rows] = _attend(q[rows], keys, values, scale, sliding_window)
    return output


def _gather(cache: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` entries of one sequence's cache: [Hkv, length, D] float32."""
    _, num_kv_heads, block_size, head_dim = cache.shape
    num_blocks = (length + block_size - 1) // block_size
    if cache.dtype == fp8.DTYPE:  # PyTorch has no indexed reads of it
        used = cache.view(torch.uint8)[blocks[:num_blocks].long()].view(fp8.DTYPE).transpose(0, 1)
    else:
        used = cache[blocks[:num_blocks].long()].transpose(0, 1)
    return used.reshape(num_kv_heads, num_blocks * block_size, head_dim)[:, :length].float()


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """One sequence: its last n tokens' q [n, Hq, D] over keys and values [Hkv, L, D]; returns [n, Hq * D]."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, length, _ = keys.shape
    grouped = q.float().view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)
    scores = grouped @ keys[:, None].transpose(2, 3) * scale
    query_position = torch.arange(length - num_queries, length, device=q.device)[:, None]
    key_position = torch.arange(length, device=q.device)[None, :]
    hidden = key_position > query_position
    if sliding_window is not None:
        hidden = hidden | (key_position <= query_position - sliding_window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    mixed = weights @ values[:, None]
    return mixed.permute(2, 0, 1, 3).reshape(num_queries, num_heads * head_dim).to(q.dtype)
