"""The operations on a CPU, by the native library that csrc/ builds (`trine.kernels.reference` says what each means).

Call `available()` first: without the library every other function but `status` fails. Dtypes are float32, bfloat16 and
float16; products and sums are taken in float32. Every row of a result is the same, bit for bit, whatever other rows
are computed with it and however many threads there are.
"""

from __future__ import annotations

from typing import Literal

import torch

from trine.kernels.cpu.decoder import Decoder, can_run
from trine.kernels.cpu.native import load
from trine.kernels.cpu.weights import DTYPES, PackedWeight, pack_int8, pack_weight
from trine.kernels.types import PagedBatch, PenaltyTable

__all__ = [
    "Decoder",
    "PackedWeight",
    "add_rms_norm",
    "available",
    "can_run",
    "count_tokens",
    "embedding",
    "gelu",
    "isa",
    "layer_norm",
    "linear",
    "linear_silu_mul",
    "num_threads",
    "pack_int8",
    "pack_weight",
    "paged_attention",
    "penalise",
    "prepare_qkv",
    "rms_norm",
    "sample",
    "score",
    "set_isa",
    "set_num_threads",
    "silu_mul",
    "status",
    "supports",
]

_library, _status = load()
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
if _library is not None:
    _linear = _library.trine_linear
    _embedding = _library.trine_embedding
    _norm = _library.trine_norm
    _silu_mul = _library.trine_silu_mul
    _gelu = _library.trine_gelu
    _sample = _library.trine_sample
    _score = _library.trine_score
    _penalise = _library.trine_penalise
    _count_tokens = _library.trine_count_tokens
    _prepare_qkv = _library.trine_prepare_qkv
    _attention = _library.trine_attention


def available() -> bool:
    """Whether the library is built, loads, and this processor can run it."""
    return _library is not None


def status() -> str:
    """For `trine doctor`: the build of the kernels in use and its threads, or why there is none and what to do."""
    return _status if _library is None else f"{isa()}, {num_threads()} threads"


def supports(dtype: torch.dtype) -> bool:
    """Whether the operations take activations of this dtype."""
    return _library is not None and dtype in _FLOATS


def isa() -> str:
    """The instruction set in use: "avx2", "avx512", "avx512_bf16" or "amx"."""
    assert _library is not None
    name: bytes = _library.trine_isa()
    return name.decode()


def set_isa(name: str) -> bool:
    """For tests: use another build of the kernels from now on; False when this processor can't run it."""
    assert _library is not None
    return bool(_library.trine_set_isa(name.encode()) == 0)


def set_num_threads(count: int) -> None:
    """Threads of each operation, the calling one included."""
    assert _library is not None
    _library.trine_set_num_threads(count)


def num_threads() -> int:
    """Threads of each operation, the calling one included."""
    assert _library is not None
    return int(_library.trine_num_threads())


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, K] times the transpose of weight [N, K], plus bias [N] of x's dtype: [T, N] of x's dtype or `out_dtype`."""
    if x.stride(1) != 1:
        x = x.contiguous()
    dtype = x.dtype if out_dtype is None else out_dtype
    out = torch.empty((x.shape[0], weight.rows), dtype=dtype)
    _linear(
        weight.handle,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.stride(0),
        DTYPES[x.dtype],
        DTYPES[dtype],
        0,
    )
    return out


def linear_silu_mul(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """silu_mul(linear(x, weight, bias)): x [T, K], weight [2I, K] (gate, then up) give [T, I]."""
    columns = weight.rows // 2
    if columns % 16:
        return silu_mul(linear(x, weight, bias))
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((x.shape[0], columns), dtype=x.dtype)
    dtype = DTYPES[x.dtype]
    _linear(weight.handle, x.data_ptr(), _pointer(bias), out.data_ptr(), x.shape[0], x.stride(0), dtype, dtype, 1)
    return out


def embedding(token_ids: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Rows `token_ids` [T] int64 of weight [V, H], as [T, H] in `dtype`. An index out of range is an IndexError."""
    token_ids = token_ids.contiguous()
    count = token_ids.shape[0]
    out = torch.empty((count, weight.columns), dtype=dtype)
    if _embedding(weight.handle, token_ids.data_ptr(), out.data_ptr(), count, DTYPES[dtype]) != 0:
        low, high = int(token_ids.min()), int(token_ids.max())
        raise IndexError(f"token ids from {low} to {high} in a table of {weight.rows} rows")
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension of x [..., H]."""
    x = x.contiguous()
    y = torch.empty_like(x)
    size = weight.shape[0]
    _norm(x.data_ptr(), None, weight.data_ptr(), None, y.data_ptr(), x.numel() // size, size, eps, DTYPES[x.dtype])
    return y


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x [T, H] to the contiguous `residual` [T, H] in place; returns the sum's RMS norm."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, size = x.shape
    _norm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), None, y.data_ptr(), rows, size, eps, DTYPES[x.dtype])
    return y


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension of x [..., H]."""
    x = x.contiguous()
    y = torch.empty_like(x)
    size = weight.shape[0]
    _norm(
        x.data_ptr(),
        None,
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        x.numel() // size,
        size,
        eps,
        DTYPES[x.dtype],
    )
    return y


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate_up [T, 2I]: [T, I]."""
    gate_up = gate_up.contiguous()
    rows, columns = gate_up.shape
    y = torch.empty((rows, columns // 2), dtype=gate_up.dtype)
    _silu_mul(gate_up.data_ptr(), y.data_ptr(), rows, columns // 2, DTYPES[y.dtype])
    return y


def gelu(x: torch.Tensor, approximate: Literal["tanh", "none"]) -> torch.Tensor:
    """The Gaussian error linear unit, exact ("none") or by its tanh approximation."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _gelu(x.data_ptr(), y.data_ptr(), x.numel(), approximate == "tanh", DTYPES[x.dtype])
    return y


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
) -> torch.Tensor:
    """Norm and rotate the heads of qkv [T, (Hq + 2 Hkv) D], write keys and values to the cache; queries [T, Hq, D]."""
    qkv = qkv.contiguous()
    tokens = qkv.shape[0]
    q = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype)
    _prepare_qkv(
        qkv.data_ptr(),
        q.data_ptr(),
        positions.data_ptr(),
        None if cos_sin is None else cos_sin.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slots.data_ptr(),
        tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        0 if cos_sin is None else cos_sin.shape[1],
        k_cache.shape[2],
        eps,
        DTYPES[qkv.dtype],
        DTYPES[k_cache.dtype],
    )
    return q


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of q [T, Hq, D] over the paged cache, window included: [T, Hq * D]."""
    q = q.contiguous()
    tokens, heads, head_dim = q.shape
    out = torch.empty((tokens, heads * head_dim), dtype=q.dtype)
    block_table = batch.block_table
    _attention(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        batch.query_start.data_ptr(),
        batch.seq_lens.data_ptr(),
        block_table.data_ptr(),
        batch.seq_lens.shape[0],
        block_table.stride(0),
        heads,
        k_cache.shape[1],
        head_dim,
        k_cache.shape[2],
        sliding_window or 0,
        scale,
        DTYPES[q.dtype],
        DTYPES[k_cache.dtype],
    )
    return out


def sample(logits: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """The token of each row of logits [B, V] float32, -1 where one is NaN or none is finite: [B] int64.

    params [B, 5] float64: a uniform number in [0, 1), the temperature (0 is greedy: the first of the largest), top_k
    (0 is off), top_p (1 is off), the logarithm of min_p (minus infinity is off). trine.llm.sampling.distribution says
    what they mean, and draws the same tokens but for the last bits of its exponentials.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    params = params.contiguous()
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    _sample(logits.data_ptr(), params.data_ptr(), out.data_ptr(), rows, size, logits.stride(0))
    return out


def score(
    logits: torch.Tensor, targets: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the log-probabilities of logits [B, V] float32 are made of: logit - largest - log(total).

    targets [B] int64 in [0, V), k at most V -> the largest logit [B] float32; total [B] float64, the sum of e^(logit -
    largest); the target's rank [B] int64, 1 and the number of larger logits; the ids of the k largest logits [B, k]
    int64, the largest first, of equal ones the smallest id.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets = targets.contiguous()
    rows, size = logits.shape
    largest = torch.empty(rows, dtype=torch.float32)
    total = torch.empty(rows, dtype=torch.float64)
    rank = torch.empty(rows, dtype=torch.int64)
    top_ids = torch.empty((rows, k), dtype=torch.int64)
    results = (largest.data_ptr(), total.data_ptr(), rank.data_ptr(), top_ids.data_ptr())
    _score(logits.data_ptr(), targets.data_ptr(), *results, k, rows, size, logits.stride(0))
    return largest, total, rank, top_ids


def penalise(table: PenaltyTable, rows: torch.Tensor, logits: torch.Tensor, lines: torch.Tensor) -> None:
    """Penalise the lines `lines` [P] int64 of logits [B, V] float32 in place; `rows` [P] are theirs in the table."""
    arguments = _penalty_arguments(table, rows)
    _penalise(*arguments, logits.data_ptr(), lines.data_ptr(), logits.shape[1], logits.stride(0))


def count_tokens(table: PenaltyTable, rows: torch.Tensor, tokens: torch.Tensor) -> None:
    """Count a token [P] int64 of each of the table's `rows` [P] int64, which have room for one entry more."""
    _count_tokens(*_penalty_arguments(table, rows), tokens.contiguous().data_ptr())


def _penalty_arguments(table: PenaltyTable, rows: torch.Tensor) -> tuple[int, ...]:
    tensors = (table.ids, table.occurrences, table.sizes, table.strengths, rows)
    return *(tensor.data_ptr() for tensor in tensors), len(rows), table.ids.shape[1]
