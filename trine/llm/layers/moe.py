"""Mixture of experts: a router sends each token to a few of many MLPs (Shazeer et al. 2017, Jiang et al. 2024)."""

from __future__ import annotations

import torch
from torch import nn

from trine.core.errors import ModelLoadError
from trine.kernels import fp8, ops
from trine.kernels.fp8 import Rows
from trine.kernels.types import AddNorm, Mixture, Weight
from trine.llm.config import ExpertsConfig
from trine.llm.layers.linear import INPUT_SCALE, WEIGHT_SCALES, spread_scales
from trine.llm.layers.module import Layer, WeightedModule, WeightKey, empty_parameter
from trine.llm.layers.norm import RMSNorm
from trine.llm.quantization.method import LinearMethod


class Experts(WeightedModule):
    """The experts of one layer: down(silu(gate(x)) * up(x)) each, without biases.

    Checkpoints hold each expert's projections apart. Here they are stacked, gate over up: gate_up [E, 2I, H] and down
    [E, H, I], as tensors or in float8 with a scale a row; or a list of packed weights where the back end computes
    expert by expert. Checkpoints in float8 hold a scale too for each projection: one number, one a row, or one a block.
    """

    gate_up: Weight | list[Weight]
    down: Weight | list[Weight]

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, dtype: torch.dtype, method: LinearMethod) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.config = config
        self.dtype = dtype
        self.method = method
        inner = config.intermediate_size
        self._shards = {"gate_up": {"gate": inner, "up": inner}, "down": {"": hidden_size}}
        self._inputs = {"gate_up": hidden_size, "down": inner}
        self._optional = {
            WeightKey(f"{key.name}.{scale}", key.shard)
            for key in self.expected_weights()
            for scale in (*WEIGHT_SCALES, INPUT_SCALE)
        }
        self._float8: set[str] = set()
        self._stored_scales: dict[WeightKey, torch.Tensor] = {}

    def expected_weights(self) -> dict[WeightKey, tuple[int, ...]]:
        return {
            WeightKey(name, f"{expert}.{shard}"): (rows, self._inputs[name])
            for expert in range(self.config.count)
            for name, shards in self._shards.items()
            for shard, rows in shards.items()
        }

    def optional_weights(self) -> set[WeightKey]:
        return self._optional

    def create_weights(self, device: torch.device) -> None:
        count, inner, hidden = self.config.count, self.config.intermediate_size, self.hidden_size
        self.gate_up = empty_parameter((count, 2 * inner, hidden), self.dtype, device)
        self.down = empty_parameter((count, hidden, inner), self.dtype, device)

    def load_weight(self, key: WeightKey, tensor: torch.Tensor) -> None:
        name, _, scale = key.name.partition(".")
        if scale in WEIGHT_SCALES:
            self._stored_scales[WeightKey(name, key.shard)] = tensor.float()
        elif not scale:  # tokens have scales of their own
            self._part(name, key.shard, getattr(self, name)).copy_(tensor)
            if tensor.dtype == fp8.DTYPE:
                self._float8.add(name)

    def _part(self, name: str, shard: str, stacked: torch.Tensor) -> torch.Tensor:
        """The rows of one projection of one expert, "7.up", in what is stacked [E, N, ...]."""
        expert, _, own = shard.partition(".")
        start = 0
        for other, rows in self._shards[name].items():
            if other == own:
                break
            start += rows
        return stacked[int(expert), start : start + rows]

    def process_weights(self) -> None:
        for name in self._shards:
            stacked = getattr(self, name)
            delattr(self, name)
            setattr(self, name, self._process(stacked, self._row_scales(name, stacked)))
        self._stored_scales = {}

    def _row_scales(self, name: str, stacked: torch.Tensor) -> torch.Tensor | None:
        """The scales [E, N] of weights that hold a checkpoint's float8 numbers; None if they are plain.

        Numbers with a scale a block are rounded anew to have one a row.
        """
        stored = {key.shard: scales for key, scales in self._stored_scales.items() if key.name == name}
        if not stored and name not in self._float8:
            return None
        row_scales = torch.empty(stacked.shape[:2], dtype=torch.float32, device=stacked.device)
        for key in self.expected_weights():
            if key.name != name:
                continue
            if key.shard not in stored:
                raise ModelLoadError(f"float8 weights of expert {key.shard} ({name}) come without weight_scale")
            scales, target = stored[key.shard].to(stacked.device), self._part(name, key.shard, row_scales)
            part = self._part(name, key.shard, stacked)
            if scales.numel() in (1, target.numel()):
                target.copy_(scales.reshape(-1).expand(target.shape))
                continue
            part.copy_(part.float() * spread_scales(scales, part))
            target.copy_(fp8.row_scales(part))
            part.copy_(fp8.saturate(part, target[:, None]))
        return row_scales

    def _process(self, stacked: nn.Parameter, scales: torch.Tensor | None) -> Weight | list[Weight]:
        """The form of weights [E, N, K] that `forward` reads."""
        count, rows, inputs = stacked.shape
        if not stacked.is_cuda:
            each = [None] * count if scales is None else list(scales)
            return [self.method.process(weight, own) for weight, own in zip(stacked, each, strict=True)]
        packed = self.method.process(stacked.view(count * rows, inputs), None if scales is None else scales.view(-1))
        if isinstance(packed, fp8.Fp8Weight):
            return fp8.Fp8Weight(packed.values.view(stacked.shape), packed.scales.view(count, rows))
        if not isinstance(packed, torch.Tensor):
            raise TypeError(f"stacked experts can't be a {type(packed).__name__}")
        return stacked if scales is None else packed.view(stacked.shape)

    def weight_bytes(self) -> int:
        return sum(
            sum(weight.nbytes for weight in weights) if isinstance(weights, list) else weights.nbytes
            for weights in (self.gate_up, self.down)
        )


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


class MixtureOfExperts(Layer):
    """The MLP of a decoder layer, as a mixture."""

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, dtype: torch.dtype, method: LinearMethod) -> None:
        super().__init__()
        self.gate = Router(hidden_size, config, dtype=dtype)
        self.experts = Experts(hidden_size, config, dtype=dtype, method=method)

    def add_norm(
        self,
        residual: torch.Tensor,
        x: torch.Tensor | None,
        own: RMSNorm,
        norm: RMSNorm,
        reader: Weight | None,
        num_used: torch.Tensor | None,
    ) -> Rows:
        """Add x, what `ops.linear_add` gave, to `residual` [T, H] in place, then the mixture of the sum's norm, `own`;
        the norm of what the residual stream is then, as `reader` takes it. `num_used`: see `Batch`.
        """
        config = self.gate.config
        weights = Mixture(self.gate.weight, self.experts.gate_up, self.experts.down, config.top_k, config.normalize)
        before, after = (AddNorm(residual, one.weight, one.eps) for one in (own, norm))
        return ops.mixture(x, before, weights, after, reader, num_used)
