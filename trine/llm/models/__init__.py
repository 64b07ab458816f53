"""Model families, one file each, by the architecture that config.json names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from trine.core.errors import ModelLoadError
from trine.llm.models.base import CausalLM

if TYPE_CHECKING:
    from trine.llm.models.bert import BertModel

DECODERS = {
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""Architecture name, which is also the class's, to module."""

ENCODERS = {"BertModel": "bert"}
"""The same for models that compute embeddings."""


def decoder_class(architecture: str) -> type[CausalLM]:
    """The class that serves an architecture. Raises ModelLoadError naming the supported ones."""
    if architecture in ENCODERS:
        raise ModelLoadError(
            f"architecture {architecture!r} is an encoder: it computes embeddings (POST /v1/embeddings, "
            "trine.llm.embedding.EmbeddingModel), it does not generate text"
        )
    if architecture not in DECODERS:
        raise ModelLoadError(
            f"architecture {architecture!r} (architectures in config.json) is not supported; "
            f"supported: {', '.join(sorted((*DECODERS, *ENCODERS)))}"
        )
    module = import_module(f"trine.llm.models.{DECODERS[architecture]}")
    return cast(type[CausalLM], getattr(module, architecture))


def encoder_class(architecture: str) -> type[BertModel]:
    """The class that computes embeddings with an architecture. Raises ModelLoadError naming the supported ones."""
    if architecture not in ENCODERS:
        raise ModelLoadError(
            f"architecture {architecture!r} (architectures in config.json) is not supported for embeddings; "
            f"supported: {', '.join(sorted(ENCODERS))}"
        )
    module = import_module(f"trine.llm.models.{ENCODERS[architecture]}")
    return cast("type[BertModel]", getattr(module, architecture))
