"""Qwen3: the Llama block with an RMS norm over each query and key head."""

from __future__ import annotations

from trine.llm.config import ModelConfig
from trine.llm.models.llama import BlockOptions, LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Checkpoint names as Llama's, and `q_norm`, `k_norm` in each layer's attention."""

    @staticmethod
    def options(config: ModelConfig) -> BlockOptions:
        return BlockOptions(qkv_bias=config.attention_bias, output_bias=config.attention_bias, head_norm=True)
