"""Llama 2, 3, 3.1 and what shares its block: Mistral, Qwen2 and Qwen3 are this with other options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from trine.kernels import ops, types
from trine.kernels.fp8 import Rows
from trine.kernels.types import Weight
from trine.llm.batch import Batch
from trine.llm.config import ModelConfig
from trine.llm.layers.attention import Attention
from trine.llm.layers.embedding import Embedding, OutputProjection, TiedEmbedding
from trine.llm.layers.linear import GateUpLinear, Linear, qkv_shards
from trine.llm.layers.module import Layer
from trine.llm.layers.moe import MixtureOfExperts
from trine.llm.layers.norm import RMSNorm
from trine.llm.layers.rotary import cos_sin_table
from trine.llm.models.base import Build, CausalLM, CheckpointNames, require_activation


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """Where the families that share the block differ."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False


class SelfAttention(Attention):
    """Projections around paged attention."""

    def __init__(
        self, config: ModelConfig, build: Build, options: BlockOptions, window: int | None, cos_sin: torch.Tensor
    ) -> None:
        size = config.head_dim
        super().__init__(
            config.num_heads,
            config.num_kv_heads,
            size,
            dtype=build.cache_dtype or build.dtype,
            sliding_window=window,
            cos_sin=cos_sin,
            q_norm=RMSNorm(size, config.norm_eps, build.dtype) if options.head_norm else None,
            k_norm=RMSNorm(size, config.norm_eps, build.dtype) if options.head_norm else None,
        )
        shards = qkv_shards(config.num_heads, config.num_kv_heads, size)
        self.qkv_proj = Linear(
            config.hidden_size, shards, bias=options.qkv_bias, dtype=build.dtype, method=build.method
        )
        self.o_proj = Linear(
            config.num_heads * size,
            config.hidden_size,
            bias=options.output_bias,
            dtype=build.dtype,
            method=build.method,
        )


class GatedMLP(Layer):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, build: Build, bias: bool) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = GateUpLinear(config.hidden_size, inner, bias=bias, dtype=build.dtype, method=build.method)
        self.down_proj = Linear(inner, config.hidden_size, bias=bias, dtype=build.dtype, method=build.method)

    def add_norm(self, residual: torch.Tensor, x: Rows, norm: RMSNorm, reader: Weight | None) -> Rows:
        """Add to the residual stream; the norm of the sum, as `reader` takes it."""
        return self.down_proj.add_norm(residual, self.gate_up_proj.gated(x, self.down_proj), norm, reader)


class DecoderLayer(Layer):
    """Attention and MLP, each on the norm of the residual stream and added back to it."""

    def __init__(
        self,
        config: ModelConfig,
        build: Build,
        options: BlockOptions,
        window: int | None,
        cos_sin: torch.Tensor,
        mlp: Layer,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, build.dtype)
        self.self_attn = SelfAttention(config, build, options, window, cos_sin)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, build.dtype)
        self.mlp = mlp

    def forward(
        self,
        x: Rows,
        residual: torch.Tensor,
        batch: Batch,
        norm: RMSNorm,
        reader: Weight | None,
        rows: torch.Tensor | None = None,
    ) -> Rows:
        """x is this layer's norm of `residual` [T, H], to which the layer adds in place; returns what comes next: the
        norm of the sum, as the product with `reader` takes it, or a tensor without a reader.

        With `rows` [R] int64, the tokens that the last layer is wanted of, it returns [R, H]: other tokens' keys and
        values are all that is needed of them, and nothing is added to `residual`.
        """
        attention, own = self.self_attn, self.post_attention_layernorm
        q = attention.project(attention.qkv_proj, x, batch)
        if rows is None:
            attended = attention.attend_for(attention.o_proj.weight, q, batch)
        elif len(rows):
            attended, residual = attention.attend(q, batch)[rows], residual[rows]
        else:
            return residual[rows]
        if isinstance(self.mlp, GatedMLP):
            x = attention.o_proj.add_norm(residual, attended, own, self.mlp.gate_up_proj.weight)
            return self.mlp.add_norm(residual, x, norm, reader)
        assert isinstance(self.mlp, MixtureOfExperts)
        y, num_used = attention.o_proj.add(residual, attended), batch.num_used if rows is None else None
        return self.mlp.add_norm(residual, y, own, norm, reader, num_used)

    def as_operation(self) -> types.DecoderLayer | None:
        """The same for a back end that runs a whole stack of layers at once; None for what no such back end knows."""
        attention, mlp = self.self_attn, self.mlp
        if not isinstance(mlp, GatedMLP):
            return None
        return types.DecoderLayer(
            qkv=attention.qkv_proj.weight,
            output=attention.o_proj.weight,
            gate_up=mlp.gate_up_proj.weight,
            down=mlp.down_proj.weight,
            qkv_bias=attention.qkv_proj.bias,
            output_bias=attention.o_proj.bias,
            gate_up_bias=mlp.gate_up_proj.bias,
            down_bias=mlp.down_proj.bias,
            input_norm=self.input_layernorm.weight,
            post_norm=self.post_attention_layernorm.weight,
            q_norm=None if attention.q_norm is None else attention.q_norm.weight,
            k_norm=None if attention.k_norm is None else attention.k_norm.weight,
            k_cache=attention.k_cache,
            v_cache=attention.v_cache,
            sliding_window=attention.cache_spec.sliding_window,
        )


class LlamaForCausalLM(CausalLM):
    """The decoder. Subclasses say how their family differs."""

    names = CheckpointNames(
        prefixes=("model.",),
        fused={
            "q_proj": ("qkv_proj", "q"),
            "k_proj": ("qkv_proj", "k"),
            "v_proj": ("qkv_proj", "v"),
            "gate_proj": ("gate_up_proj", "gate"),
            "up_proj": ("gate_up_proj", "up"),
        },
        ignored=(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",),
    )

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__(config, build)
        require_activation(config, ("silu", "swish"))
        assert config.rope is not None
        cos_sin = cos_sin_table(config.rope, build.max_model_len, build.device)
        options = self.options(config)
        self.embed_tokens: Embedding
        if config.tie_word_embeddings:
            self.embed_tokens = TiedEmbedding(config.vocab_size, config.hidden_size, build.dtype, build.method)
        else:
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, build.dtype)
            self.lm_head = OutputProjection(
                config.hidden_size, config.vocab_size, bias=False, dtype=build.dtype, method=build.method
            )
        self.layers = nn.ModuleList(
            DecoderLayer(config, build, options, window, cos_sin, self.mlp(layer, config, build))
            for layer, window in enumerate(config.layer_windows)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, build.dtype)
        self.stack: Callable[[torch.Tensor, Batch], torch.Tensor] | None = None

    @staticmethod
    def options(config: ModelConfig) -> BlockOptions:
        return BlockOptions(config.attention_bias, config.attention_bias, config.mlp_bias)

    def mlp(self, layer: int, config: ModelConfig, build: Build) -> Layer:
        """What follows attention in layer number `layer`."""
        return GatedMLP(config, build, self.options(config).mlp_bias)

    def bind_cache(self, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().bind_cache(caches)
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        attention = layers[0].self_attn
        operations = [operation for layer in layers if (operation := layer.as_operation()) is not None]
        if len(operations) < len(layers):
            return
        self.stack = ops.decoder(
            operations,
            self.norm.weight,
            eps=self.norm.eps,
            num_heads=attention.num_heads,
            scale=attention.scale,
            cos_sin=attention.cos_sin,
        )

    def forward(self, token_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        residual = self.embed_tokens(token_ids)
        if self.stack is not None:
            return self.stack(residual, batch)
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        x = layers[0].input_layernorm.for_product(residual, layers[0].self_attn.qkv_proj.weight)
        for layer, following in pairwise(layers):
            x = layer(x, residual, batch, following.input_layernorm, following.self_attn.qkv_proj.weight)
        rows = batch.output_rows
        if rows is not None and len(rows) >= len(token_ids):
            rows = None
        hidden = layers[-1](x, residual, batch, self.norm, None, rows)
        assert isinstance(hidden, torch.Tensor)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.embed_tokens if isinstance(self.embed_tokens, TiedEmbedding) else self.lm_head
        return head.logits(hidden)
