"""Qwen2 and Qwen2.5: the Llama block with biases on queries, keys and values."""

from __future__ import annotations

from trine.llm.config import ModelConfig
from trine.llm.models.llama import BlockOptions, LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Checkpoint names as Llama's. Upper layers may have a sliding window."""

    @staticmethod
    def options(config: ModelConfig) -> BlockOptions:
        return BlockOptions(qkv_bias=True)
