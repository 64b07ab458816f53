"""Mistral: the Llama block without biases, with a sliding window in every layer if the configuration sets one."""

from __future__ import annotations

from trine.llm.config import ModelConfig
from trine.llm.models.llama import BlockOptions, LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Checkpoint names as Llama's. The window comes with `config.layer_windows`."""

    @staticmethod
    def options(config: ModelConfig) -> BlockOptions:
        return BlockOptions()
