"""Descriptors of matrices for Hopper's copy engine (TMA): which tiles of them a kernel asks for."""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@cache  # as a kernel is launched some thirty times a layer, and a layout's own checks take several microseconds
def _layout(row_bytes: int, bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, row_bytes), element_bitwidth=bits, rank=2)


def tiles_of(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """Tiles [rows, columns] = `block` of x [..., C], whose rows are evenly spaced and their elements side by side.

    A tile's row has 32, 64 or a multiple of 128 bytes, and a tile has 8 rows or more.
    """
    columns = x.shape[-1]
    spacing = x.stride(-2) if x.shape[-2] > 1 else columns  # a lone row's stride may be anything
    layout = _layout(block[1] * x.itemsize, 8 * x.itemsize)
    return TensorDescriptor(x, [x.numel() // columns, columns], [spacing, 1], block, layout)
