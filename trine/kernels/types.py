"""What the back ends agree on: the tensors of a paged batch, weights in a back end's own layout, the operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

SHORT_CONTEXT = 4096
"""Tokens up to which attention of one sequence is a chain of latencies, and has a kernel of its own."""


class PagedBatch(Protocol):
    """The part of `trine.llm.batch.Batch` that attention reads; see there for the meaning of each tensor."""

    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    output_rows: torch.Tensor | None
    settled: bool
    prefill_tiles: torch.Tensor | None


class PenaltyTable(Protocol):
    """The part of `trine.llm.sampling.penalties.PenaltyTable` that is tensors; see there for the meaning of each."""

    ids: torch.Tensor
    occurrences: torch.Tensor
    sizes: torch.Tensor
    strengths: torch.Tensor


class PackedWeight(Protocol):
    """A weight [N, K] in a back end's own layout or precision. Only the back end that made it can read it."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def nbytes(self) -> int: ...


Weight = torch.Tensor | PackedWeight


@dataclass(frozen=True, slots=True)
class AddNorm:
    """What is done with [T, H]: it is added to `residual` [T, H] in place, and the sum's RMS norm [T, H] taken."""

    residual: torch.Tensor
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of experts: the router's `gate` [E, H], which chooses `top_k` for a token and may `normalize` their
    weights; the experts' gate_up [E, 2I, H], gates over ups, and down [E, H, I], stacked or a list.
    """

    gate: torch.Tensor
    gate_up: Weight | Sequence[Weight]
    down: Weight | Sequence[Weight]
    top_k: int
    normalize: bool


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer of a decoder of the Llama kind: fused projections, norms, its cache. Biases, head norms may be none."""

    qkv: Weight
    output: Weight
    gate_up: Weight
    down: Weight
    qkv_bias: torch.Tensor | None
    output_bias: torch.Tensor | None
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    sliding_window: int | None


class Backend(Protocol):
    """The operations; `trine.kernels.reference` says in PyTorch what each one means."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor: ...

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor: ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...

    def gelu(self, x: torch.Tensor, approximate: Literal["tanh", "none"]) -> torch.Tensor: ...

    def prepare_qkv(
        self,
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
    ) -> torch.Tensor: ...

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: PagedBatch,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor: ...
