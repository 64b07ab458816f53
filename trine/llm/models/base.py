"""What the engine asks of a language model, and how checkpoint names find their layers."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from trine.core.errors import ModelLoadError
from trine.llm.batch import Batch, CacheSpec
from trine.llm.config import ModelConfig
from trine.llm.layers.attention import Attention
from trine.llm.layers.module import Layer, WeightKey
from trine.llm.quantization.method import LinearMethod


@dataclass(frozen=True, slots=True)
class Build:
    """How a model is to be built. `max_model_len` is the longest context that will be served; without `cache_dtype`
    keys and values are kept in `dtype`.
    """

    device: torch.device
    dtype: torch.dtype
    method: LinearMethod
    max_model_len: int
    cache_dtype: torch.dtype | None = None


_EXPERT = re.compile(r"(.*\.experts)\.(\d+)")


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """From a checkpoint's tensor names to layers.

    A name loses the first of `prefixes` that it starts with. The rest is a module's path and a parameter; the path's
    last part may be a projection that is fused here: `fused` maps it to the module and the shard. `experts` does so for
    the projections of numbered experts (….experts.7.up_proj.weight), which all are one module: the shard is "7.up", and
    what is no weight is called "gate_up.weight_scale", say.
    `renamed` are modules' names here by what they are called in checkpoints. Names that match `ignored` are buffers
    that old tools saved, or heads that are not served.
    """

    prefixes: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    experts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def resolve(self, name: str) -> tuple[str, WeightKey] | None:
        """(module path, key) for a tensor's name; None when it is to be ignored."""
        for prefix in self.prefixes:
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        if any(re.search(pattern, name) for pattern in self.ignored):
            return None
        path, _, parameter = name.rpartition(".")
        for stored, own in self.renamed.items():
            path = path.replace(f".{stored}.", f".{own}.")
        parent, _, leaf = path.rpartition(".")
        expert = _EXPERT.fullmatch(parent)
        if expert and leaf in self.experts:
            name, shard = self.experts[leaf]
            return expert[1], WeightKey(
                name if parameter == "weight" else f"{name}.{parameter}", f"{expert[2]}.{shard}"
            )
        if leaf not in self.fused:
            return path, WeightKey(parameter)
        module, shard = self.fused[leaf]
        return f"{parent}.{module}", WeightKey(parameter, shard)

    def describe(self, path: str, key: WeightKey) -> str:
        """A checkpoint's name for what a layer wants: `resolve` backwards."""
        parent, _, leaf = path.rpartition(".")
        number, _, shard = key.shard.partition(".")
        for name, place in self.fused.items():
            if place == (leaf, key.shard):
                path = f"{parent}.{name}"
        for name, place in self.experts.items():
            if number.isdigit() and place == (key.name, shard):
                path, key = f"{path}.{number}.{name}", WeightKey("weight")
        for stored, own in self.renamed.items():
            path = path.replace(f".{own}.", f".{stored}.")
        return f"{path}.{key.name}"

    def ignoring(self, pattern: str) -> CheckpointNames:
        """The same names, with another pattern to ignore."""
        return replace(self, ignored=(*self.ignored, pattern))


class CausalLM(Layer, ABC):
    """A decoder on packed tokens: no batch dimension, no padding, no policy.

    `names` is the family's table from checkpoint to layers; a subclass builds its layers from the configuration.
    """

    names: CheckpointNames

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.config = config
        self.dtype = build.dtype
        self.layer_work = config.layer_weights // build.method.rate
        """Of a layer and a token, in multiplications of 16 bits."""

    @abstractmethod
    def forward(self, token_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        """token_ids [T] int64 to the last layer's normed hidden states [T, H]; extends the bound caches."""

    @abstractmethod
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, H] to logits [S, V] float32."""

    def attention_layers(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    def cache_specs(self) -> list[CacheSpec]:
        """One for each attention layer, in order."""
        return [layer.cache_spec for layer in self.attention_layers()]

    def bind_cache(self, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Give each attention layer its keys and values [num_blocks, num_kv_heads, block_size, head_dim]."""
        for layer, (k_cache, v_cache) in zip(self.attention_layers(), caches, strict=True):
            layer.bind_cache(k_cache, v_cache)


def require_activation(config: ModelConfig, supported: Sequence[str]) -> str:
    """The activation's name, or ModelLoadError when the family's code has no such activation."""
    if config.activation not in supported:
        raise ModelLoadError(
            f"hidden_act={config.activation!r} is not supported for {config.architecture}: "
            f"expected {', '.join(supported)}"
        )
    return config.activation
