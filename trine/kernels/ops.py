"""The operations that models call: one plain function each, sent to the back end of the tensors' device.

On a GPU that is `trine.kernels.triton`; on a CPU the native library `trine.kernels.cpu` where it is built and knows the
dtype, else `trine.kernels.reference`, whose docstrings say what each operation means. TRINE_KERNELS=reference in the
environment takes the reference everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal, cast

import torch

from trine.kernels import fp8, reference
from trine.kernels.fp8 import Fp8Weight, Rows, RowToNorm
from trine.kernels.types import AddNorm, Backend, DecoderLayer, Mixture, PackedWeight, PagedBatch, Weight

_reference_only = os.environ.get("TRINE_KERNELS", "") == "reference"


@contextmanager
def reference_only() -> Iterator[None]:
    """For tests: everything that is packed and computed within runs on the reference kernels."""
    before = _reference_only
    _set_reference_only(True)
    try:
        yield
    finally:
        _set_reference_only(before)


def _set_reference_only(value: bool) -> None:
    global _reference_only
    _reference_only = value
    _native.cache_clear()
    backend.cache_clear()
    _reader.cache_clear()


@cache
def _native() -> ModuleType | None:
    """The CPU library, or None when it is not there (not built, or another kind of processor)."""
    if _reference_only:
        return None
    native = import_module("trine.kernels.cpu")
    return native if native.available() else None


@cache
def backend(on_gpu: bool, dtype: torch.dtype) -> Backend:
    """The module whose functions run on tensors of this kind."""
    if on_gpu and not _reference_only:
        return cast(Backend, import_module("trine.kernels.triton"))
    native = None if on_gpu else _native()
    if native is not None and native.supports(dtype):
        return cast(Backend, native)
    return reference


def _of(x: torch.Tensor) -> Backend:
    return backend(x.is_cuda, x.dtype)


def set_num_threads(threads: int) -> None:
    """CPU threads that compute, the caller's included: of PyTorch and of the native library."""
    torch.set_num_threads(threads)
    native = _native()
    if native is not None:
        native.set_num_threads(threads)


def cpu_kernels() -> str:
    """What computes on the CPU: the native library's instruction set, or the reference."""
    native = _native()
    return "reference kernels" if native is None else f"native kernels ({native.isa()})"


def attention_refusals(
    device_type: str, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> list[str]:
    """Why `paged_attention` can't serve layers of this shape on such a device; empty when it can."""
    if device_type != "cuda" or _reference_only:
        return []
    return cast(list[str], import_module("trine.kernels.triton").supports(num_heads, num_kv_heads, head_dim, dtype))


def pack_weight(weight: torch.Tensor) -> Weight:
    """`weight` [N, K] in the layout that `linear` runs fastest on; the tensor itself where that is none other.

    The caller drops its own reference: the packed weight never aliases the tensor unless it is the tensor.
    """
    native = _native() if weight.device.type == "cpu" else None
    if native is None or not native.supports(weight.dtype):
        return weight
    return cast(PackedWeight, native.pack_weight(weight))


def pack_int8(weight: torch.Tensor) -> PackedWeight:
    """`weight` [N, K] rounded to int8 with float scales."""
    native = _native() if weight.device.type == "cpu" else None
    if native is None or not native.supports(weight.dtype):
        return reference.pack_int8(weight)
    return cast(PackedWeight, native.pack_int8(weight))


def pack_fp8(weight: torch.Tensor, scales: torch.Tensor | None = None) -> PackedWeight:
    """`weight` [N, K] rounded to float8 with a scale a row; with `scales` [N] it holds such numbers already."""
    return fp8.pack_fp8(weight, scales)


@cache
def _reader(kind: type, on_gpu: bool) -> ModuleType:
    """The module whose `linear` reads weights of a type: for tensors on a CPU and its own integers the reference."""
    if issubclass(kind, Fp8Weight):
        return import_module("trine.kernels.triton.fp8") if on_gpu and not _reference_only else fp8
    if on_gpu and not _reference_only:
        return import_module("trine.kernels.triton")
    if issubclass(kind, torch.Tensor | reference.Int8Weight):
        return reference
    native = _native()
    if native is None:
        raise TypeError(f"no back end here reads a {kind.__name__}")
    return native


def linear(
    x: Rows, weight: Weight, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N]: [T, N] of x's dtype, or `out_dtype`."""
    y: torch.Tensor = _reader(type(weight), x.is_cuda).linear(x, weight, bias, out_dtype)
    return y


ADDED_ROWS = 512
"""Rows from which on the library's product adds to what is there for nothing: its sums leave while others are made."""


def linear_add(x: Rows, weight: Weight, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor | None:
    """`linear(x, weight, bias)`, or parts [P, T, N] that add up to it, for a norm that adds it to `residual` [T, N]; or
    None after adding it in place, where that saves a pass.
    """
    y = _linear_parts(x, weight, bias)
    if y is None and bias is None:
        y = _streamed_parts(x, weight)
    if y is not None:
        return y
    if (
        isinstance(weight, torch.Tensor)
        and isinstance(x, torch.Tensor)
        and x.is_cuda
        and x.shape[0] >= ADDED_ROWS
        and bias is None
        and not _reference_only
    ):
        residual.addmm_(x, weight.t())
        return None
    return linear(x, weight, bias)


def _linear_parts(x: Rows, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`linear` of some hundred rows as parts [P, T, N] that add up to it, which is the next kernel's to do, where the
    back end is faster so.
    """
    if not x.is_cuda or _reference_only or not isinstance(weight, torch.Tensor | Fp8Weight):
        return None
    parts: torch.Tensor | None = _gpu_parts().in_parts(x, weight, bias)
    return parts


@cache
def _gpu_parts() -> ModuleType:
    return import_module("trine.kernels.triton.parts")


def _streamed_parts(x: Rows, weight: Weight) -> torch.Tensor | None:
    """The same of few rows, for a norm."""
    reads_parts = isinstance(weight, torch.Tensor | Fp8Weight)
    if not x.is_cuda or _reference_only or not reads_parts:
        return None
    y: torch.Tensor | None = _reader(type(weight), True).linear_parts(x, weight)
    return y


def linear_silu_mul(x: Rows, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`silu_mul(linear(x, weight, bias))`, in one pass where the back end can: [T, K] to [T, I], weight [2I, K]."""
    if isinstance(weight, torch.Tensor) and not (x.is_cuda and not _reference_only):
        return silu_mul(linear(x, weight, bias))
    y: torch.Tensor = _reader(type(weight), x.is_cuda).linear_silu_mul(x, weight, bias)
    return y


def _rounds_for(reader: Weight, x: Rows) -> bool:
    """Whether the kernel that makes x's successor, [T, …] like x, rounds it for the product with `reader`."""
    return isinstance(reader, Fp8Weight) and x.is_cuda and not _reference_only and _gpu_fp8().rounds(x.shape[0])


@cache
def _gpu_fp8() -> ModuleType:
    return import_module("trine.kernels.triton.fp8")


def linear_silu_mul_for(reader: Weight, x: Rows, weight: Weight, bias: torch.Tensor | None = None) -> Rows:
    """`linear_silu_mul` in the form that the product with `reader` takes fastest."""
    if not _rounds_for(reader, x):
        return linear_silu_mul(x, weight, bias)
    if isinstance(weight, Fp8Weight):
        return cast(Rows, _gpu_fp8().linear_silu_mul_rows(x, weight, bias))
    return cast(Rows, _gpu_fp8().silu_mul_rows(linear(x, weight, bias)))


def _norms_itself(reader: Weight | None, x: torch.Tensor) -> bool:
    """Whether the product of x [T, H] with `reader` takes x before its norm, and computes that itself."""
    if not (isinstance(reader, torch.Tensor | Fp8Weight) and x.is_cuda) or _reference_only:
        return False
    norms: bool = _gpu_one_row().norms_itself(reader, x)
    return norms


@cache
def _gpu_one_row() -> ModuleType:
    return import_module("trine.kernels.triton.small_linear")


def rms_norm_for(reader: Weight, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Rows:
    """`rms_norm` in the form that the product with `reader` takes fastest."""
    if _norms_itself(reader, x):
        return RowToNorm(x, weight, eps)
    if not _rounds_for(reader, x):
        return rms_norm(x, weight, eps)
    return cast(Rows, _gpu_fp8().rms_norm_rows(x, weight, eps))


def add_rms_norm_for(reader: Weight, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Rows:
    """`add_rms_norm` in the form that the product with `reader` takes fastest."""
    if not _rounds_for(reader, x):
        return add_rms_norm(x, residual, weight, eps)
    return cast(Rows, _gpu_fp8().add_rms_norm_rows(x, residual, weight, eps))


def linear_add_norm(
    x: Rows,
    weight: Weight,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    reader: Weight | None,
) -> Rows:
    """Add `linear(x, weight, bias)` to `residual` [T, N] in place; the RMS norm of the sum with weight `norm` [N], in
    the form that the product with `reader` takes fastest, or a tensor without a reader.
    """
    added = isinstance(weight, torch.Tensor | Fp8Weight) and _norms_itself(reader, residual)
    if added and _gpu_one_row().add(x, weight, bias, residual):
        return RowToNorm(residual, norm, eps)
    y = linear_add(x, weight, bias, residual)
    if reader is None:
        return rms_norm(residual, norm, eps) if y is None else add_rms_norm(y, residual, norm, eps)
    return rms_norm_for(reader, residual, norm, eps) if y is None else add_rms_norm_for(reader, y, residual, norm, eps)


def embedding(token_ids: torch.Tensor, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Rows `token_ids` [T] of weight [V, H], as [T, H] in `dtype`.

    Reads every weight that `linear` reads, so that tied embeddings need only one.
    """
    y: torch.Tensor = _reader(type(weight), token_ids.is_cuda).embedding(token_ids, weight, dtype)
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension of x [T, H]."""
    return _of(x).rms_norm(x, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x [T, H] to `residual` in place; returns the sum's RMS norm."""
    return _of(x).add_rms_norm(x, residual, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last dimension of x [T, H]."""
    return _of(x).layer_norm(x, weight, bias, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate_up [T, 2I]: [T, I]."""
    return _of(gate_up).silu_mul(gate_up)


def gelu(x: torch.Tensor, approximate: Literal["tanh", "none"]) -> torch.Tensor:
    """The Gaussian error linear unit, exact ("none") or its tanh approximation."""
    return _of(x).gelu(x, approximate)


def mixture(
    x: torch.Tensor | None,
    before: AddNorm,
    weights: Mixture,
    after: AddNorm,
    reader: Weight | None,
    num_used: torch.Tensor | None = None,
) -> Rows:
    """`before` with x [T, H] or what `linear_add` gave; of each token the chosen experts' gated MLPs, summed with their
    weights; `after` with that, in the form that the product with `reader` takes fastest, or a tensor without one.

    Rows from the number in `num_used` [1] int32 on are padding, of which anything may become. On a GPU weights are
    stacked. Elsewhere `linear` computes expert by expert.
    """
    residual, gate_up, down = before.residual, weights.gate_up, weights.down
    if isinstance(gate_up, Sequence) or isinstance(down, Sequence) or not residual.is_cuda or _reference_only:
        if x is None:
            y = rms_norm(residual, before.weight, before.eps)
        else:
            y = add_rms_norm(x, residual, before.weight, before.eps)
        choice = reference.route(y, weights.gate, weights.top_k, weights.normalize)
        each = _expert_by_expert(gate_up), _expert_by_expert(down)
        y = reference.experts(y, *each, *choice, linear_silu_mul, linear)
        return add_rms_norm(y, after.residual, after.weight, after.eps)
    rounds = reader is not None and _rounds_for(reader, residual)
    own = None if rounds else after
    y = import_module("trine.kernels.triton.moe").mixture(x, before, weights, own, num_used=num_used)
    return add_rms_norm_for(reader, y, after.residual, after.weight, after.eps) if reader is not None and rounds else y


def _expert_by_expert(weight: Weight | Sequence[Weight]) -> Sequence[Weight]:
    if isinstance(weight, Sequence):
        return weight
    if isinstance(weight, Fp8Weight):
        return [Fp8Weight(values, scales) for values, scales in zip(weight.values, weight.scales, strict=True)]
    assert isinstance(weight, torch.Tensor), f"stacked experts can't be a {type(weight).__name__}"
    return list(weight)


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

    A float8 cache holds them divided by `k_scale` and `v_scale`. qkv is dead afterwards: a back end may work in it.
    """
    arguments = (
        qkv, num_heads, num_kv_heads, head_dim, positions, cos_sin, q_norm, k_norm, eps, k_cache, v_cache, slots
    )  # fmt: skip
    if k_cache.dtype == fp8.DTYPE:
        q: torch.Tensor = _cached_as_fp8(qkv).prepare_qkv(*arguments, k_scale, v_scale)
        return q
    return _of(qkv).prepare_qkv(*arguments)


def linear_prepare_qkv(
    x: Rows,
    weight: Weight,
    bias: torch.Tensor | None,
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
    """`prepare_qkv` of `linear(x, weight, bias)`, in one pass where the back end can."""
    plain = isinstance(weight, torch.Tensor | Fp8Weight) and k_cache.dtype == x.dtype
    if plain and x.is_cuda and not _reference_only and cos_sin is not None and q_norm is None and k_norm is None:
        q: torch.Tensor | None = _reader(type(weight), True).linear_prepare_qkv(
            x, weight, bias, num_heads, num_kv_heads, head_dim, positions, cos_sin, k_cache, v_cache, slots
        )
        if q is not None:
            return q
    qkv = _linear_parts(x, weight, bias)
    if qkv is None:
        qkv = linear(x, weight, bias)
    return prepare_qkv(
        qkv, num_heads, num_kv_heads, head_dim, positions, cos_sin, q_norm, k_norm, eps,
        k_cache, v_cache, slots, k_scale, v_scale,
    )  # fmt: skip


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
    """Causal attention of q [T, Hq, D] over the paged cache, window included: [T, Hq * D].

    What a float8 cache holds is to be multiplied by `k_scale` and `v_scale`.
    """
    if k_cache.dtype == fp8.DTYPE:
        y: torch.Tensor = _cached_as_fp8(q).paged_attention(
            q, k_cache, v_cache, batch, scale, sliding_window, k_scale, v_scale
        )
        return y
    return _of(q).paged_attention(q, k_cache, v_cache, batch, scale, sliding_window)


def paged_attention_for(
    reader: Weight,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Rows:
    """`paged_attention` in the form that the product with `reader` takes fastest."""
    if k_cache.dtype == q.dtype and _rounds_for(reader, q):
        rows: Rows | None = _gpu_fp8().attention_rows(q, k_cache, v_cache, batch, scale, sliding_window)
        if rows is not None:
            return rows
    return paged_attention(q, k_cache, v_cache, batch, scale, sliding_window, k_scale, v_scale)


def _cached_as_fp8(x: torch.Tensor) -> ModuleType:
    """The back end for tensors like x that works on float8 caches: the native library does not."""
    return import_module("trine.kernels.triton") if x.is_cuda and not _reference_only else reference


def decoder(
    layers: Sequence[DecoderLayer],
    final_norm: torch.Tensor,
    *,
    eps: float,
    num_heads: int,
    scale: float,
    cos_sin: torch.Tensor | None,
) -> Callable[[torch.Tensor, PagedBatch], torch.Tensor] | None:
    """The whole stack as one call, where the back end has such: from embeddings [T, H], which it overwrites, to normed
    hidden states of all tokens or of `batch.output_rows`. None where layers run one by one.
    """
    native = None if final_norm.is_cuda else _native()
    if native is None or not native.can_run(layers, final_norm):
        return None
    return cast(
        Callable[[torch.Tensor, PagedBatch], torch.Tensor],
        native.Decoder(layers, final_norm, eps=eps, num_heads=num_heads, scale=scale, cos_sin=cos_sin),
    )
