"""Small random checkpoints of every family, written by Transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 199
LLAMA_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
GPT2_SHAPE |= {"bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Case:
    """A configuration of a family. `layout` "old" rewrites config.json as Transformers 4 wrote it."""

    name: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    layout: str = "new"

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.0, 1.1] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0] * 2}
LONGROPE |= {"original_max_position_embeddings": 64}

MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 16}

CASES = [
    Case("grouped", "Llama"),
    Case("every-head-its-own", "Llama", {"num_key_value_heads": 4}),
    Case("one-kv-head", "Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    Case("biases", "Llama", {"attention_bias": True, "mlp_bias": True}),
    Case("wide-heads", "Llama", {"head_dim": 24, "rms_norm_eps": 1e-5}),
    Case("odd-sizes", "Llama", {"hidden_size": 60, "intermediate_size": 77, "num_attention_heads": 6}),
    Case("theta", "Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    Case("theta-old", "Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "old"),
    Case("linear", "Llama", rope("linear", factor=3.0)),
    Case("linear-old", "Llama", rope("linear", factor=3.0), "old"),
    Case("dynamic", "Llama", rope("dynamic", factor=2.0)),
    Case("llama3", "Llama", rope("llama3", **LLAMA3)),
    Case("llama3-old", "Llama", rope("llama3", **LLAMA3), "old"),
    Case("yarn", "Llama", rope("yarn", **YARN)),
    Case("yarn-mscale", "Llama", rope("yarn", **YARN, mscale=1.2, mscale_all_dim=0.8, beta_fast=16.0, beta_slow=2.0)),
    Case("yarn-attention-factor", "Llama", rope("yarn", **YARN, attention_factor=1.3, truncate=False), "old"),
    Case("window", "Mistral", {"sliding_window": 20}),
    Case("window-of-one-block", "Mistral", {"sliding_window": 16, "num_key_value_heads": 4}),
    Case("no-window", "Mistral", {"sliding_window": None, "head_dim": 32}),
    Case("default-window", "Mistral", {}, "old"),
    Case("plain", "Qwen2"),
    Case("tied", "Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    Case("window", "Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    Case("window-old", "Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}, "old"),
    Case("window-unused", "Qwen2", {"use_sliding_window": False, "sliding_window": 20, "max_window_layers": 1}, "old"),
    Case("yarn", "Qwen2", rope("yarn", **YARN), "old"),
    Case("wide-heads", "Qwen3", {"head_dim": 32}),
    Case("default-heads", "Qwen3", {"tie_word_embeddings": True}),
    Case("biases", "Qwen3", {"head_dim": 16, "attention_bias": True}),
    Case("yarn", "Qwen3", {"head_dim": 32, **rope("yarn", **YARN)}),
    Case("window", "Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    Case("normalized", "Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    Case("not-normalized", "Qwen3Moe", {**MOE, "tie_word_embeddings": True}),
    Case("dense-layers", "Qwen3Moe", {**MOE, "num_hidden_layers": 3, "mlp_only_layers": [0]}),
    Case("sparse-step", "Qwen3Moe", {**MOE, "num_hidden_layers": 3, "decoder_sparse_step": 2}),
    Case("window-old", "Qwen3Moe", {**MOE, "use_sliding_window": True, "sliding_window": 20}, "old"),
    Case("every-expert", "Qwen3Moe", {**MOE, "num_experts_per_tok": 8, "attention_bias": True}),
    Case("plain", "Mixtral", {"num_local_experts": 4}),
    Case("one-of-five", "Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 1, "head_dim": 32}),
    Case("window-old", "Mixtral", {"num_local_experts": 4, "sliding_window": 20}, "old"),
    Case("plain", "GPT2"),
    Case("untied", "GPT2", {"tie_word_embeddings": False, "n_inner": 100}),
    Case("exact-gelu", "GPT2", {"activation_function": "gelu", "layer_norm_epsilon": 1e-4}),
    Case("scales", "GPT2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    Case("old", "GPT2", {}, "old"),
]


def build(case: Case, directory: Path, *, seed: int = 0) -> transformers.PreTrainedModel:
    """Write the checkpoint to `directory`; returns Transformers' model of it."""
    head = "GPT2LMHeadModel" if case.family == "GPT2" else f"{case.family}ForCausalLM"
    shape = GPT2_SHAPE if case.family == "GPT2" else LLAMA_SHAPE
    config = getattr(transformers, f"{case.family}Config")(**(shape | case.changes))
    torch.manual_seed(seed)
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases too: a bias that is left out must show. Large enough that greedy output has no near ties.
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.2))
    model.save_pretrained(directory)
    if case.layout == "old":
        _write_old_layout(directory / "config.json")
    return model


def _write_old_layout(path: Path) -> None:
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    scaling = config.pop("rope_parameters", None)
    if scaling is not None:
        config["rope_theta"] = scaling.pop("rope_theta")
        if scaling["rope_type"] != "default":
            scaling["type"] = scaling.pop("rope_type")
            config["rope_scaling"] = scaling
    for key in ("tie_word_embeddings", "head_dim", "sliding_window"):  # left out where it was the class's default
        if config.get(key) == {"tie_word_embeddings": config["model_type"] == "gpt2", "sliding_window": 4096}.get(key):
            config.pop(key, None)
    path.write_text(json.dumps(config))
