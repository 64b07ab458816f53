"""Linear layers, alone or several fused into one matrix, in any quantisation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from trine.core.errors import ModelLoadError
from trine.kernels import fp8
from trine.kernels.fp8 import Rows
from trine.kernels.types import Weight
from trine.llm.layers.module import WeightedModule, WeightKey, empty_parameter
from trine.llm.layers.norm import RMSNorm
from trine.llm.quantization.method import LinearMethod

BLOCK = 128  # rows and columns that share a scale in checkpoints with a scale a block
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
INPUT_SCALE = "input_scale"


class Linear(WeightedModule):
    """y = x Wᵀ + b, with W [N, K].

    `outputs` is N, or the rows of each of several projections that share their input, by shard name, in order: one
    matrix product instead of two or three. `transposed` checkpoints (GPT-2's Conv1D) hold [K, N]. Checkpoints in float8
    hold a `weight_scale` too: one number, one a row, or one a block.
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
        self._float8 = False
        self._stored_scales: dict[str, torch.Tensor] = {}

    def expected_weights(self) -> dict[WeightKey, tuple[int, ...]]:
        expected: dict[WeightKey, tuple[int, ...]] = {}
        for shard, rows in self.shards.items():
            expected[WeightKey("weight", shard)] = (self.inputs, rows) if self.transposed else (rows, self.inputs)
            if self.has_bias:
                expected[WeightKey("bias", shard)] = (rows,)
        return expected

    def optional_weights(self) -> set[WeightKey]:
        return {WeightKey(name, shard) for name in (*WEIGHT_SCALES, INPUT_SCALE) for shard in self.shards}

    def create_weights(self, device: torch.device) -> None:
        self.weight = empty_parameter((self.outputs, self.inputs), self.dtype, device)
        self.bias = empty_parameter((self.outputs,), self.dtype, device) if self.has_bias else None

    def load_weight(self, key: WeightKey, tensor: torch.Tensor) -> None:
        if key.name in WEIGHT_SCALES:
            self._stored_scales[key.shard] = tensor.float().to(self.plain_weight().device)
            return
        if key.name == INPUT_SCALE:
            return  # tokens have scales of their own
        self._float8 = self._float8 or tensor.dtype == fp8.DTYPE
        start = 0
        for shard, rows in self.shards.items():
            if shard == key.shard:
                break
            start += rows
        parameter = getattr(self, key.name)
        transposed = self.transposed and key.name == "weight"
        parameter[start : start + rows].copy_(tensor.t() if transposed else tensor)

    def process_weights(self) -> None:
        weight = self.plain_weight()
        self.set_weight(self.method.process(weight, self._row_scales(weight)))
        self._stored_scales = {}

    def _row_scales(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The scales [N] of `weight`, which holds a checkpoint's float8 numbers; None if it is plain.

        Where not every row has one (blocks, or plain weights beside float8 ones), `weight` is rounded anew to such.
        """
        if self._float8 and not self._stored_scales:
            raise ModelLoadError(f"float8 weights {list(weight.shape)} come without weight_scale: is a file missing?")
        if not self._stored_scales:
            return None
        scales = [self._stored_scales.get(shard) for shard in self.shards]
        if all(own is not None and own.numel() in (1, n) for own, n in zip(scales, self.shards.values(), strict=True)):
            parts = zip(self.shards.values(), scales, strict=True)
            return torch.cat([own.reshape(-1).expand(rows) for rows, own in parts if own is not None])
        for part, own in zip(torch.split(weight, list(self.shards.values())), scales, strict=True):
            if own is not None:
                part.copy_(part.float() * spread_scales(own, part))
        row_scales = fp8.row_scales(weight)
        weight.copy_(fp8.saturate(weight, row_scales[:, None]))
        return row_scales

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

    def forward(self, x: Rows) -> torch.Tensor:
        """[T, K] to [T, N]."""
        return self.method.apply(x, self.weight, self.bias)

    def add(self, residual: torch.Tensor, x: Rows) -> torch.Tensor | None:
        """The product of x [T, K] as `ops.linear_add` gives it, to be added to `residual` [T, N]."""
        return self.method.apply_add(x, self.weight, self.bias, residual)

    def add_norm(self, residual: torch.Tensor, x: Rows, norm: RMSNorm, reader: Weight | None) -> Rows:
        """Add the product of x [T, K] to `residual` [T, N] in place; the norm of the sum, as `reader` takes it."""
        return self.method.apply_add_norm(x, self.weight, self.bias, residual, norm.weight, norm.eps, reader)


class GateUpLinear(Linear):
    """The two input projections of a SwiGLU block and the activation between them: silu(gate(x)) * up(x)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype, method: LinearMethod) -> None:
        super().__init__(inputs, {"gate": outputs, "up": outputs}, bias=bias, dtype=dtype, method=method)

    def gated(self, x: Rows, reader: Linear) -> Rows:
        """[T, K] to [T, N / 2], in the form that `reader` takes."""
        return self.method.apply_silu_mul(x, self.weight, self.bias, reader.weight)


def spread_scales(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One number, one a row, or one a block of 128 by 128: for every element of weight [N, K]."""
    rows, columns = weight.shape
    if scales.numel() == 1:
        return scales.reshape(1, 1)
    if scales.numel() == rows:
        return scales.reshape(rows, 1)
    if tuple(scales.shape) != (-(-rows // BLOCK), -(-columns // BLOCK)):
        raise ModelLoadError(
            f"weight_scale has shape {list(scales.shape)} for float8 weights {list(weight.shape)}: "
            f"expected one number, one a row, or one a block of {BLOCK} by {BLOCK}"
        )
    return scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]


def qkv_shards(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    """The rows of a fused query-key-value projection."""
    return {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
