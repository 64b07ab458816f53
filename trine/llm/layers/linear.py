"""Linear layers, alone or several fused into one matrix, in any quantisation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from trine.kernels.types import Weight
from trine.llm.layers.module import WeightedModule, WeightKey, empty_parameter
from trine.llm.quantization.method import LinearMethod


class Linear(WeightedModule):
    """y = x Wᵀ + b, with W [N, K].

    `outputs` is N, or the rows of each of several projections that share their input, by shard name, in order: one
    matrix product instead of two or three. `transposed` checkpoints (GPT-2's Conv1D) hold [K, N].
    """

    weight: Weight
    bias: nn.Parameter | None

    def __init__(
        self,
        inputs: int,
        outputs: int | Mapping[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        method: LinearMethod,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.shards = {"": outputs} if isinstance(outputs, int) else dict(outputs)
        self.inputs = inputs
        self.outputs = sum(self.shards.values())
        self.has_bias = bias
        self.dtype = dtype
        self.method = method
        self.transposed = transposed

    def expected_weights(self) -> dict[WeightKey, tuple[int, ...]]:
        expected: dict[WeightKey, tuple[int, ...]] = {}
        for shard, rows in self.shards.items():
            expected[WeightKey("weight", shard)] = (self.inputs, rows) if self.transposed else (rows, self.inputs)
            if self.has_bias:
                expected[WeightKey("bias", shard)] = (rows,)
        return expected

    def create_weights(self, device: torch.device) -> None:
        self.weight = empty_parameter((self.outputs, self.inputs), self.dtype, device)
        self.bias = empty_parameter((self.outputs,), self.dtype, device) if self.has_bias else None

    def load_weight(self, key: WeightKey, tensor: torch.Tensor) -> None:
        start = 0
        for shard, rows in self.shards.items():
            if shard == key.shard:
                break
            start += rows
        parameter = getattr(self, key.name)
        transposed = self.transposed and key.name == "weight"
        parameter[start : start + rows].copy_(tensor.t() if transposed else tensor)

    def process_weights(self) -> None:
        self.set_weight(self.method.process(self.plain_weight()))

    def plain_weight(self) -> torch.Tensor:
        """The weight as it was loaded; there is none once it is packed."""
        if not isinstance(self.weight, torch.Tensor):
            raise TypeError(f"the weight is packed already, as {type(self.weight).__name__}")
        return self.weight

    def set_weight(self, weight: Weight) -> None:
        """Replace the weight: what was there is freed (unless somebody else holds it)."""
        if weight is not self.weight:
            del self.weight
            self.weight = weight

    def weight_bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] to [T, N]."""
        return self.method.apply(x, self.weight, self.bias)


class GateUpLinear(Linear):
    """The two input projections of a SwiGLU block and the activation between them: silu(gate(x)) * up(x)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype, method: LinearMethod) -> None:
        super().__init__(inputs, {"gate": outputs, "up": outputs}, bias=bias, dtype=dtype, method=method)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] to [T, N / 2]."""
        return self.method.apply_silu_mul(x, self.weight, self.bias)


def qkv_shards(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    """The rows of a fused query-key-value projection."""
    return {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
