"""Attention over the paged cache."""

from __future__ import annotations

from typing import Any

import torch

from trine.kernels import ops
from trine.kernels.fp8 import Rows
from trine.kernels.types import Weight
from trine.llm.batch import Batch, CacheSpec
from trine.llm.layers.linear import Linear
from trine.llm.layers.module import WeightedModule, WeightKey
from trine.llm.layers.norm import RMSNorm


class Attention(WeightedModule):
    """From the fused query-key-value projection of T tokens to their mixed values, through one layer's cache.

    `dtype` is the cache's. In float8 it holds keys and values divided by `k_scale` and `v_scale`, which are 1 unless
    the checkpoint holds others. `cos_sin` is the rotary table (None: positions enter elsewhere), `q_norm` and `k_norm`
    norm each head (Qwen3).
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        scale: float | None = None,
        sliding_window: int | None = None,
        cos_sin: torch.Tensor | None = None,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.cache_spec = CacheSpec(num_kv_heads, head_dim, dtype, sliding_window)
        self.cos_sin = cos_sin
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.k_scale = 1.0
        self.v_scale = 1.0

    def expected_weights(self) -> dict[WeightKey, tuple[int, ...]]:
        return {}

    def optional_weights(self) -> set[WeightKey]:
        return {WeightKey("k_scale"), WeightKey("v_scale")}

    def create_weights(self, device: torch.device) -> None:
        pass

    def load_weight(self, key: WeightKey, tensor: torch.Tensor) -> None:
        setattr(self, key.name, float(tensor))

    def bind_cache(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Use these tensors [num_blocks, num_kv_heads, block_size, head_dim] as the cache."""
        self.k_cache = k_cache
        self.v_cache = v_cache

    def forward(self, qkv: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, (Hq + 2 Hkv) D] to [T, Hq D]; writes the tokens' keys and values to the cache."""
        return self.attend(ops.prepare_qkv(qkv, *self._preparation(batch)), batch)

    def project(self, projection: Linear, x: Rows, batch: Batch) -> torch.Tensor:
        """The queries [T, Hq, D] of the projection of x [T, H]; writes the tokens' keys and values to the cache."""
        return ops.linear_prepare_qkv(x, projection.weight, projection.bias, *self._preparation(batch))

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, Hq, D] to [T, Hq D]."""
        window = self.cache_spec.sliding_window
        return ops.paged_attention(q, self.k_cache, self.v_cache, batch, self.scale, window, self.k_scale, self.v_scale)

    def attend_for(self, reader: Weight, q: torch.Tensor, batch: Batch) -> Rows:
        """`attend`, in the form that the product with `reader` takes fastest."""
        window = self.cache_spec.sliding_window
        return ops.paged_attention_for(
            reader, q, self.k_cache, self.v_cache, batch, self.scale, window, self.k_scale, self.v_scale
        )

    def _preparation(self, batch: Batch) -> tuple[Any, ...]:
        """What `ops.prepare_qkv` takes after the projection."""
        return (
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            batch.positions,
            self.cos_sin,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            0.0 if self.q_norm is None else self.q_norm.eps,
            self.k_cache,
            self.v_cache,
            batch.slots,
            self.k_scale,
            self.v_scale,
        )
