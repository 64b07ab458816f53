"""Rows of a table by index. Bound by memory: each row is read once and written once, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trine.kernels import reference
from trine.kernels.triton.device import next_power_of_2
from trine.kernels.triton.launch import launch
from trine.kernels.types import Weight


@triton.jit
def _embedding_kernel(token_ids_ptr, weight_ptr, y_ptr, size, weight_stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight_row_ptr = weight_ptr + tl.load(token_ids_ptr + row) * weight_stride
    for start in range(0, size, block):
        columns = start + tl.arange(0, block)
        x = tl.load(weight_row_ptr + columns, mask=columns < size, other=0.0)
        tl.store(y_ptr + row * size + columns, x.to(y_ptr.dtype.element_ty), mask=columns < size)


def embedding(token_ids: torch.Tensor, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Rows `token_ids` [T] int64 of weight [V, H], as [T, H] in `dtype`.

    The first kernel of a model, so it is not launched early: it starts when the step's inputs are complete, which those
    behind it rely on.
    """
    if not isinstance(weight, torch.Tensor):
        return reference.embedding(token_ids, weight, dtype)
    size = weight.shape[1]
    y = torch.empty((token_ids.shape[0], size), dtype=dtype, device=weight.device)
    if token_ids.shape[0]:
        launch(
            _embedding_kernel,
            (token_ids.shape[0],),
            token_ids,
            weight,
            y,
            size,
            weight.stride(0),
            block=min(next_power_of_2(size), 4096),
            num_warps=4,
        )
    return y
