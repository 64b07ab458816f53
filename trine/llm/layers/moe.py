"""Mixture of experts: a router sends each token to a few of many MLPs (Shazeer et al. 2017, Jiang et al. 2024)."""

from __future__ import annotations

import torch
from torch import nn

from trine.kernels import ops
from trine.kernels.fp8 import Fp8Weight
from trine.kernels.types import Weight
from trine.llm.config import ExpertsConfig
from trine.llm.layers.module import Layer, WeightedModule, WeightKey, empty_parameter
from trine.llm.quantization.method import LinearMethod


class Experts(WeightedModule):
    """The experts of one layer: down(silu(gate(x)) * up(x)) each, without biases.

    Checkpoints hold each expert's projections apart. Here they are stacked, gate over up: gate_up [E, 2I, H] and down
    [E, H, I], as tensors or in float8 with a scale a row; or a list of packed weights where the back end computes
    expert by expert.
    """

    gate_up: Weight | list[Weight]
    down: Weight | list[Weight]

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, dtype: torch.dtype, method: LinearMethod) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.config = config
        self.dtype = dtype
        self.method = method

    def expected_weights(self) -> dict[WeightKey, tuple[int, ...]]:
        inner, hidden = self.config.intermediate_size, self.hidden_size
        return {
            WeightKey(name, f"{expert}.{shard}"): shape
            for expert in range(self.config.count)
            for name, shard, shape in (
                ("gate_up", "gate", (inner, hidden)),
                ("gate_up", "up", (inner, hidden)),
                ("down", "", (hidden, inner)),
            )
        }

    def create_weights(self, device: torch.device) -> None:
        count, inner, hidden = self.config.count, self.config.intermediate_size, self.hidden_size
        self.gate_up = empty_parameter((count, 2 * inner, hidden), self.dtype, device)
        self.down = empty_parameter((count, hidden, inner), self.dtype, device)

    def load_weight(self, key: WeightKey, tensor: torch.Tensor) -> None:
        expert, _, shard = key.shard.partition(".")
        target = getattr(self, key.name)[int(expert)]
        inner = self.config.intermediate_size
        {"gate": target[:inner], "up": target[inner:], "": target}[shard].copy_(tensor)

    def process_weights(self) -> None:
        for name in ("gate_up", "down"):
            stacked = getattr(self, name)
            delattr(self, name)
            setattr(self, name, self._process(stacked))

    def _process(self, stacked: nn.Parameter) -> Weight | list[Weight]:
        """The form of weights [E, N, K] that `forward` reads."""
        if not stacked.is_cuda:
            return [self.method.process(weight) for weight in stacked]
        count, rows, inputs = stacked.shape
        packed = self.method.process(stacked.view(count * rows, inputs))
        if isinstance(packed, Fp8Weight):
            return Fp8Weight(packed.values.view(stacked.shape), packed.scales.view(count, rows))
        return stacked

    def weight_bytes(self) -> int:
        return sum(
            sum(weight.nbytes for weight in weights) if isinstance(weights, list) else weights.nbytes
            for weights in (self.gate_up, self.down)
        )

    def forward(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [T, H], each token's chosen experts [T, K] int32 and their weights [T, K] float32: [T, H]."""
        return ops.experts(x, self.gate_up, self.down, weights, chosen)


class Router(WeightedModule):
    """Chooses each token's experts by the softmax of a linear layer, which is never quantised."""

    weight: nn.Parameter

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.config = config
        self.dtype = dtype

    def expected_weights(self) -> dict[WeightKey, tuple[int, ...]]:
        return {WeightKey("weight"): (self.config.count, self.hidden_size)}

    def create_weights(self, device: torch.device) -> None:
        self.weight = empty_parameter((self.config.count, self.hidden_size), self.dtype, device)

    def load_weight(self, key: WeightKey, tensor: torch.Tensor) -> None:
        getattr(self, key.name).copy_(tensor)

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] to weights [T, K] float32 and experts [T, K] int32."""
        return ops.route(x, self.weight, self.config.top_k, self.config.normalize)


class MixtureOfExperts(Layer):
    """The MLP of a decoder layer, as a mixture."""

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, dtype: torch.dtype, method: LinearMethod) -> None:
        super().__init__()
        self.gate = Router(hidden_size, config, dtype=dtype)
        self.experts = Experts(hidden_size, config, dtype=dtype, method=method)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] to [T, H]."""
        return self.experts(x, *self.gate.choose(x))
