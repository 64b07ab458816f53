"""GPT-2: learned positions, layer norms with biases, GELU, projections stored transposed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from trine.kernels import ops
from trine.llm.batch import Batch
from trine.llm.config import ModelConfig
from trine.llm.layers.attention import Attention
from trine.llm.layers.embedding import Embedding, OutputProjection, TiedEmbedding
from trine.llm.layers.linear import Linear
from trine.llm.layers.module import Layer
from trine.llm.layers.norm import LayerNorm
from trine.llm.models.base import Build, CausalLM, CheckpointNames, require_activation

_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _projection(inputs: int, outputs: int, build: Build) -> Linear:
    return Linear(inputs, outputs, bias=True, dtype=build.dtype, method=build.method, transposed=True)


class GPT2Attention(Attention):
    """Multi-head attention; its scale may fall with depth."""

    def __init__(self, config: ModelConfig, build: Build, layer: int) -> None:
        scale = config.head_dim**-0.5 if config.hf.get("scale_attn_weights", True) else 1.0
        if config.hf.get("scale_attn_by_inverse_layer_idx", False):
            scale /= layer + 1
        dtype = build.cache_dtype or build.dtype
        super().__init__(config.num_heads, config.num_heads, config.head_dim, dtype=dtype, scale=scale)
        self.c_attn = _projection(config.hidden_size, 3 * config.hidden_size, build)
        self.c_proj = _projection(config.hidden_size, config.hidden_size, build)

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.c_proj(super().forward(self.c_attn(x), batch))


class GPT2MLP(Layer):
    """proj(gelu(fc(x)))."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        activation = require_activation(config, (*_TANH, "gelu"))
        self.approximate: Literal["tanh", "none"] = "tanh" if activation in _TANH else "none"
        self.c_fc = _projection(config.hidden_size, config.intermediate_size, build)
        self.c_proj = _projection(config.intermediate_size, config.hidden_size, build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(ops.gelu(self.c_fc(x), self.approximate))


class GPT2Block(nn.Module):
    """Attention and MLP, each on the norm of the residual stream and added back to it."""

    def __init__(self, config: ModelConfig, build: Build, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.norm_eps, build.dtype)
        self.attn = GPT2Attention(config, build, layer)
        self.ln_2 = LayerNorm(config.hidden_size, config.norm_eps, build.dtype)
        self.mlp = GPT2MLP(config, build)

    def forward(self, residual: torch.Tensor, batch: Batch) -> None:
        """Updates `residual` [T, H] in place."""
        residual += self.attn(self.ln_1(residual), batch)
        residual += self.mlp(self.ln_2(residual))


class GPT2LMHeadModel(CausalLM):
    """The decoder. Checkpoints come with and without the "transformer." prefix, old ones with the causal mask."""

    names = CheckpointNames(prefixes=("transformer.",), ignored=(r"\.attn\.(bias|masked_bias)$",))

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__(config, build)
        self.wte: Embedding
        if config.tie_word_embeddings:
            self.wte = TiedEmbedding(config.vocab_size, config.hidden_size, build.dtype, build.method)
        else:
            self.wte = Embedding(config.vocab_size, config.hidden_size, build.dtype)
            self.lm_head = OutputProjection(
                config.hidden_size, config.vocab_size, bias=False, dtype=build.dtype, method=build.method
            )
        self.wpe = Embedding(config.max_model_len, config.hidden_size, build.dtype)
        self.h = nn.ModuleList(GPT2Block(config, build, layer) for layer in range(config.num_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps, build.dtype)

    def forward(self, token_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        residual = self.wte(token_ids) + self.wpe(batch.positions)
        for block in self.h:
            block(residual, batch)
        return self.ln_f(residual)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self.wte if isinstance(self.wte, TiedEmbedding) else self.lm_head
        return head.logits(hidden)
