"""Token embeddings and the output projection, which may be one matrix."""

from __future__ import annotations

import torch

from trine.kernels import ops
from trine.kernels.types import Weight
from trine.llm.layers.linear import Linear
from trine.llm.layers.module import WeightedModule, WeightKey, empty_parameter
from trine.llm.quantization.method import LinearMethod


class Embedding(WeightedModule):
    """Rows of a table [num_rows, size] by index."""

    weight: Weight

    def __init__(self, num_rows: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.size = size
        self.dtype = dtype

    def expected_weights(self) -> dict[WeightKey, tuple[int, ...]]:
        return {WeightKey("weight"): (self.num_rows, self.size)}

    def create_weights(self, device: torch.device) -> None:
        self.weight = empty_parameter((self.num_rows, self.size), self.dtype, device)

    def load_weight(self, key: WeightKey, tensor: torch.Tensor) -> None:
        getattr(self, key.name).copy_(tensor)

    def weight_bytes(self) -> int:
        return self.weight.nbytes

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """[T] to [T, size]."""
        return ops.embedding(indices, self.weight, self.dtype)


class TiedEmbedding(Embedding):
    """The table of a model whose output projection is the same matrix: kept once, as the linear kernels want it."""

    def __init__(self, num_rows: int, size: int, dtype: torch.dtype, method: LinearMethod) -> None:
        super().__init__(num_rows, size, dtype)
        self.method = method.for_output()

    def process_weights(self) -> None:
        if isinstance(self.weight, torch.Tensor):
            packed = self.method.process(self.weight)
            if packed is not self.weight:
                del self.weight
                self.weight = packed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, size] to [S, num_rows] float32."""
        return self.method.apply(hidden, self.weight, None, torch.float32)


class OutputProjection(Linear):
    """A projection to the vocabulary with weights of its own."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype, method: LinearMethod) -> None:
        super().__init__(inputs, outputs, bias=bias, dtype=dtype, method=method.for_output())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, K] to [S, V] float32."""
        return self.method.apply(hidden, self.weight, self.bias, torch.float32)
