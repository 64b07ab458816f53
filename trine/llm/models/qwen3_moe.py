"""Qwen3-MoE: the Qwen3 block with a mixture of experts in place of the MLP, in all layers or some."""

from __future__ import annotations

from dataclasses import replace

from trine.llm.config import ModelConfig
from trine.llm.layers.module import Layer
from trine.llm.layers.moe import MixtureOfExperts
from trine.llm.models.base import Build
from trine.llm.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """Checkpoint names as Qwen3's, with `mlp.gate` the router and `mlp.experts.N` the experts."""

    names = replace(
        Qwen3ForCausalLM.names,
        experts={"gate_proj": ("gate_up", "gate"), "up_proj": ("gate_up", "up"), "down_proj": ("down", "")},
    )

    def mlp(self, layer: int, config: ModelConfig, build: Build) -> Layer:
        assert config.experts is not None
        if layer in config.experts.dense_layers:
            return super().mlp(layer, config, build)
        return MixtureOfExperts(config.hidden_size, config.experts, dtype=build.dtype, method=build.method)
