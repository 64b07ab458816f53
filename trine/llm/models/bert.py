"""BERT as an encoder of sentences (Devlin et al. 2018): packed tokens in, hidden states out, no cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from trine.kernels import ops
from trine.llm.config import ModelConfig
from trine.llm.layers.embedding import Embedding
from trine.llm.layers.linear import Linear, qkv_shards
from trine.llm.layers.module import Layer
from trine.llm.layers.norm import LayerNorm
from trine.llm.models.base import Build, CheckpointNames, require_activation

Runs = Sequence[tuple[int, int]]
"""(count, length) of consecutive sequences of equal length in the packed order: attention needs no padding."""


class Embeddings(Layer):
    """Word, position and segment (always the first) embeddings."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, size, build.dtype)
        self.position_embeddings = Embedding(config.max_model_len, size, build.dtype)
        self.token_type_embeddings = Embedding(int(config.hf.get("type_vocab_size", 2)), size, build.dtype)
        self.LayerNorm = LayerNorm(size, config.norm_eps, build.dtype)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        segments = torch.zeros_like(token_ids)
        x = self.word_embeddings(token_ids) + self.token_type_embeddings(segments)
        return self.LayerNorm(x + self.position_embeddings(positions))


class SelfAttention(Layer):
    """Every token sees its whole sequence."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        shards = qkv_shards(config.num_heads, config.num_heads, config.head_dim)
        self.qkv = Linear(config.hidden_size, shards, bias=True, dtype=build.dtype, method=build.method)

    def forward(self, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        qkv = self.qkv(x)
        outputs = []
        start = 0
        for count, length in runs:
            packed = qkv[start : start + count * length]
            start += count * length
            q, k, v = packed.view(count, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v)
            outputs.append(mixed.transpose(1, 2).reshape(count * length, -1))
        return torch.cat(outputs)


class AddNorm(Layer):
    """LayerNorm(residual + dense(x))."""

    def __init__(self, inputs: int, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.dense = Linear(inputs, config.hidden_size, bias=True, dtype=build.dtype, method=build.method)
        self.LayerNorm = LayerNorm(config.hidden_size, config.norm_eps, build.dtype)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm.add(self.dense(x), residual)


class Attention(Layer):
    """Self-attention, added to its input and normed."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.self = SelfAttention(config, build)
        self.output = AddNorm(config.hidden_size, config, build)

    def forward(self, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        return self.output(self.self(x, runs), x)


class Intermediate(Layer):
    """gelu(dense(x))."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        require_activation(config, ("gelu",))
        self.dense = Linear(
            config.hidden_size, config.intermediate_size, bias=True, dtype=build.dtype, method=build.method
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.gelu(self.dense(x), "none")


class EncoderLayer(Layer):
    """Attention and MLP, each normed after its sum with the input (post-norm)."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.attention = Attention(config, build)
        self.intermediate = Intermediate(config, build)
        self.output = AddNorm(config.intermediate_size, config, build)

    def forward(self, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        x = self.attention(x, runs)
        return self.output(self.intermediate(x), x)


class Encoder(Layer):
    """The stack of layers."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config, build) for _ in range(config.num_layers))

    def forward(self, x: torch.Tensor, runs: Runs) -> torch.Tensor:
        for layer in self.layer:
            x = layer(x, runs)
        return x


class BertModel(Layer):
    """The encoder without its pooler, which sentence embeddings do not use. Modules have the checkpoint's names."""

    names = CheckpointNames(
        prefixes=("bert.",),
        fused={"query": ("qkv", "q"), "key": ("qkv", "k"), "value": ("qkv", "v")},
        ignored=(r"^embeddings\.position_ids$", r"^pooler\.", r"^cls\."),
    )

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, build)
        self.encoder = Encoder(config, build)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, runs: Runs) -> torch.Tensor:
        """token_ids and positions [T] of sequences packed in order of length (`runs`) to hidden states [T, H]."""
        return self.encoder(self.embeddings(token_ids, positions), runs)
