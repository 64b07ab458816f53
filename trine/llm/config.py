"""A checkpoint's config.json, read once into facts that the engine and the models use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch

from trine.core.errors import ConfigurationError, ModelLoadError

Json = dict[str, Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What is taken from generation_config.json besides the end-of-sequence tokens."""

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

_FAMILY_DEFAULTS: Mapping[str, Json] = {
    "bert": {"hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "gpt2": {
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "hidden_act": "gelu_new",
        "rms_norm_eps": 1e-5,
    },
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
    "mixtral": {
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
    },
}
"""What a family means by a key that config.json leaves out, where that is not the same for all."""

_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
    "num_local_experts": "num_experts",
}
"""Other names for common keys: GPT-2's, and Qwen's before Transformers 5."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: `rotary_dim` elements of each head turn, at base `theta`, scaled as `kind` says.

    `parameters` are the scaling's own numbers (factor, low_freq_factor, …) by config.json's names.
    `original_max_len` is the context length before scaling.
    """

    kind: RopeType
    theta: float
    rotary_dim: int
    original_max_len: int
    parameters: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts: `top_k` of `count` gated MLPs of `intermediate_size` compute each token.

    `normalize`: the chosen experts' weights are made to add up to one. `dense_layers` have an ordinary MLP instead.
    """

    count: int
    top_k: int
    intermediate_size: int
    normalize: bool
    dense_layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The facts of a checkpoint. `hf` is config.json as it was read, for what only one family needs.

    `layer_windows` has each layer's sliding window (None: full attention); `sliding_window` is the window if any layer
    has one. `max_model_len` is the longest context that the positions allow. `eos_token_ids` come from
    generation_config.json where that has them, as in Transformers' `generate`; so do `sampling_defaults`, the values of
    `SamplingParams` that the checkpoint's authors advise.
    """

    architecture: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    norm_eps: float
    activation: str
    rope: RopeConfig | None
    experts: ExpertsConfig | None
    layer_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, Any]
    dtype: torch.dtype
    hf: Json = field(repr=False, compare=False)

    @property
    def sliding_window(self) -> int | None:
        return next((window for window in self.layer_windows if window is not None), None)

    @property
    def layer_weights(self) -> int:
        """About how many weights of a layer each token meets: with a mixture, those of the experts it chooses."""
        inner = self.experts.top_k * self.experts.intermediate_size if self.experts else self.intermediate_size
        return self.hidden_size * (2 * (self.num_heads + self.num_kv_heads) * self.head_dim + 3 * inner)

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelConfig:
        """Read config.json and generation_config.json. Raises ModelLoadError naming the wrong or missing key."""
        directory = Path(directory)
        generation = read_json(directory / "generation_config.json") or {}
        hf = read_json(directory / "config.json")
        if hf is None:
            raise ModelLoadError(
                f"{directory} has no config.json: give a directory with a Hugging Face checkpoint "
                "(config.json, *.safetensors, tokenizer.json)"
            )
        try:
            return cls.from_dict(hf, generation, source=str(directory / "config.json"))
        except ModelLoadError:
            _require_supported(hf)  # what is missing may only be named otherwise in a family that is not served
            raise

    @classmethod
    def from_dict(cls, hf: Json, generation: Json | None = None, *, source: str = "config.json") -> ModelConfig:
        """Interpret config.json's contents; `source` names them in errors."""
        facts = _Facts(hf, source)
        num_layers = facts.integer("num_hidden_layers")
        num_heads = facts.integer("num_attention_heads")
        hidden_size = facts.integer("hidden_size")
        head_dim = facts.optional_integer("head_dim") or hidden_size // num_heads
        num_kv_heads = facts.optional_integer("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise ModelLoadError(
                f"{source}: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
            )
        position_limit = facts.integer("max_position_embeddings")
        rope = None if facts.model_type in ("gpt2", "bert") else _rope(facts, head_dim, position_limit)
        return cls(
            architecture=facts.architecture,
            model_type=facts.model_type,
            hidden_size=hidden_size,
            intermediate_size=facts.optional_integer("intermediate_size") or 4 * hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=facts.integer("vocab_size"),
            max_model_len=position_limit if rope is None else _scaled_length(rope, position_limit),
            norm_eps=float(facts.get("rms_norm_eps", facts.get("layer_norm_eps", 1e-6))),
            activation=str(facts.get("hidden_act", "silu")),
            rope=rope,
            experts=_experts(facts, num_layers) if facts.model_type in ("mixtral", "qwen3_moe") else None,
            layer_windows=_layer_windows(facts, num_layers),
            tie_word_embeddings=bool(facts.get("tie_word_embeddings", False)),
            attention_bias=bool(facts.get("attention_bias", False)),
            mlp_bias=bool(facts.get("mlp_bias", False)),
            bos_token_id=facts.optional_integer("bos_token_id"),
            eos_token_ids=_token_ids((generation or {}).get("eos_token_id"), facts.get("eos_token_id")),
            sampling_defaults=_sampling_defaults(generation or {}, Path(source).with_name("generation_config.json")),
            dtype=_dtype(facts),
            hf=hf,
        )


def resolve_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """The torch dtype for a user's choice: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16"."""
    if name != "auto" and name not in DTYPES:
        raise ConfigurationError(f"dtype={name!r} is unknown: give one of auto, {', '.join(DTYPES)}", param="dtype")
    return config.dtype if name == "auto" else DTYPES[name]


def read_json(path: Path) -> Json | None:
    """A JSON object from a file; None when there is no such file. Raises ModelLoadError when it is not one."""
    value = _read(path)
    if value is not None and not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def read_json_list(path: Path) -> list[Json] | None:
    """A JSON array of objects from a file; None when there is no such file. Raises ModelLoadError otherwise."""
    value = _read(path)
    if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise ModelLoadError(f"{path} holds something else than a JSON array of objects")
    return value


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} can't be read as JSON: {error}") from error


def _require_supported(hf: Json) -> None:
    from trine.llm.models import ENCODERS, decoder_class  # not above: the families import this module

    for architecture in (hf.get("architectures") or [])[:1]:
        if architecture not in ENCODERS:
            decoder_class(architecture)


class _Facts:
    """config.json with the family's defaults and aliases behind it. A key set to null counts as given."""

    def __init__(self, hf: Json, source: str) -> None:
        self.hf = hf
        self.source = source
        architectures = hf.get("architectures") or []
        if not architectures:
            raise ModelLoadError(
                f"{source}: architectures is missing; it must name the model class, e.g. LlamaForCausalLM"
            )
        self.architecture = str(architectures[0])
        self.model_type = str(hf.get("model_type", ""))
        self._defaults = _FAMILY_DEFAULTS.get(self.model_type, {})

    def get(self, key: str, default: Any = None) -> Any:
        for name in (key, _ALIASES.get(key)):
            if name in self.hf:
                return self.hf[name]
        return self._defaults.get(key, default)

    def integer(self, key: str) -> int:
        value = self.optional_integer(key)
        if value is None or value < 1:
            raise ModelLoadError(f"{self.source}: {key}={value!r}, expected a positive integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        value = self.get(key)
        if isinstance(value, list):  # several token ids: the first is the main one
            value = value[0] if value else None
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ModelLoadError(f"{self.source}: {key}={value!r}, expected an integer")
        return value


def _token_ids(*choices: int | list[int] | None) -> tuple[int, ...]:
    """The first of the choices that is given, as a tuple."""
    for choice in choices:
        if choice is not None:
            return tuple(choice) if isinstance(choice, list) else (choice,)
    return ()


def _sampling_defaults(generation: Json, source: Path) -> Json:
    """The advised sampling parameters. Without `do_sample` Transformers itself decodes greedily, and the values stand
    for when it does not; a server samples unless it is told otherwise, so they count either way.
    """
    found = {name: generation[name] for name in SAMPLING_DEFAULTS if generation.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelLoadError(f"{source}: {name}={value!r}, expected a number")
    return found


def _dtype(facts: _Facts) -> torch.dtype:
    """torch_dtype (or dtype, its name since Transformers 5); float32 when neither is there."""
    name = facts.get("dtype") or facts.get("torch_dtype") or "float32"
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ModelLoadError(f"{facts.source}: dtype={name!r}, expected one of {', '.join(DTYPES)}")
    return dtype


def _layer_windows(facts: _Facts, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window. Mistral: the same for all; Qwen: layer_types, else from max_window_layers on."""
    window = facts.optional_integer("sliding_window")
    if facts.model_type in ("mistral", "mixtral"):
        return (window,) * num_layers
    if facts.model_type == "qwen3_moe":
        return (window if facts.get("use_sliding_window", False) else None,) * num_layers
    if facts.model_type not in ("qwen2", "qwen3") or not facts.get("use_sliding_window", False):
        return (None,) * num_layers
    kinds = facts.get("layer_types")
    if kinds is None:
        first = facts.optional_integer("max_window_layers") or 0
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise ModelLoadError(f"{facts.source}: layer_types has {len(kinds)} entries for {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _experts(facts: _Facts, num_layers: int) -> ExpertsConfig:
    """Mixture-of-experts settings. Layer i is dense if `mlp_only_layers` lists it or decoder_sparse_step skips it."""
    count, top_k = facts.integer("num_local_experts"), facts.integer("num_experts_per_tok")
    if top_k > count:
        raise ModelLoadError(f"{facts.source}: num_experts_per_tok={top_k}, but there are {count} experts")
    dense = set(facts.get("mlp_only_layers") or [])
    step = facts.optional_integer("decoder_sparse_step") or 1
    return ExpertsConfig(
        count=count,
        top_k=top_k,
        intermediate_size=facts.optional_integer("moe_intermediate_size") or facts.integer("intermediate_size"),
        normalize=bool(facts.get("norm_topk_prob", False)),
        dense_layers=frozenset(i for i in range(num_layers) if i in dense or (i + 1) % step),
    )


def _rope(facts: _Facts, head_dim: int, position_limit: int) -> RopeConfig:
    """Rotary settings from `rope_parameters` (Transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    given = cast(Json, facts.get("rope_parameters") or facts.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in given.values()):
        raise ModelLoadError(
            f"{facts.source}: rope_parameters differ between layer types, which no supported family does"
        )
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ROPE_TYPES:
        raise ModelLoadError(f"{facts.source}: rope_type={kind!r} is not known; supported: {', '.join(ROPE_TYPES)}")
    theta = given.get("rope_theta") or facts.get("rope_theta") or 10000.0
    partial = given.get("partial_rotary_factor") or facts.get("partial_rotary_factor") or 1.0
    original = position_limit
    if kind in ("llama3", "yarn", "longrope"):
        outer = facts.get("original_max_position_embeddings")
        original = int(outer or given.get("original_max_position_embeddings") or position_limit)
    names = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    parameters = {key: value for key, value in given.items() if key not in names}
    required = {"linear": ("factor",), "dynamic": ("factor",), "longrope": ("short_factor", "long_factor")}
    required["llama3"] = ("factor", "low_freq_factor", "high_freq_factor")
    for key in required.get(kind, ()):
        if parameters.get(key) is None:
            raise ModelLoadError(f"{facts.source}: rope scaling {kind!r} needs {key}")
    if kind in ("yarn", "longrope") and parameters.get("factor") is None:
        parameters["factor"] = position_limit / original
    return RopeConfig(kind, float(theta), int(head_dim * partial), original, parameters)


def _scaled_length(rope: RopeConfig, position_limit: int) -> int:
    """The context length with scaling: max_position_embeddings counts it already, except as written by older tools."""
    factor = float(rope.parameters.get("factor") or 1.0)
    if rope.kind in ("linear", "dynamic"):
        return int(position_limit * factor)
    if rope.kind == "yarn":
        return max(position_limit, int(rope.original_max_len * factor))
    return position_limit
