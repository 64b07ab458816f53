"""Mixtral: the Mistral block with a mixture of experts in place of the MLP."""

from __future__ import annotations

from dataclasses import replace

from trine.llm.config import ModelConfig
from trine.llm.layers.module import Layer
from trine.llm.layers.moe import MixtureOfExperts
from trine.llm.models.base import Build
from trine.llm.models.mistral import MistralForCausalLM


class MixtralForCausalLM(MistralForCausalLM):
    """Checkpoint names as Mistral's, with `block_sparse_moe.gate` the router and `block_sparse_moe.experts.N`."""

    names = replace(
        MistralForCausalLM.names,
        experts={"w1": ("gate_up", "gate"), "w3": ("gate_up", "up"), "w2": ("down", "")},
        renamed={"block_sparse_moe": "mlp"},
    )

    def mlp(self, layer: int, config: ModelConfig, build: Build) -> Layer:
        assert config.experts is not None
        return MixtureOfExperts(config.hidden_size, config.experts, dtype=build.dtype, method=build.method)
