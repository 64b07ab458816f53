"""Convolutions, matrix products and sums on 8-bit integers, as the compiler makes them of models with scales.

An integer q stands for (q - zero) * scale. Products are summed exactly, in integers; what follows (scale, bias,
residual, activation) is done in float32, and the result is rounded once, to the nearest, ties to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trine.graph.dtypes import DType
from trine.graph.operators.algebra import activate
from trine.graph.operators.convolution import convolve
from trine.graph.operators.registry import operator

_EXACT_IN_FLOAT32 = 1 << 24
_LARGEST_PRODUCT = 255 * 128


def _centred(x: Tensor, zero: int, products: int) -> Tensor:
    """x - zero in a float type in which sums of so many products with 8-bit weights are exact."""
    exact = torch.float32 if products * _LARGEST_PRODUCT <= _EXACT_IN_FLOAT32 else torch.float64
    return x.to(exact) - zero


def _real(x: Tensor, scale: float, zero: int) -> Tensor:
    """What integers stand for; float32 as it is."""
    return x if x.is_floating_point() else (x.to(torch.float32) - zero) * scale


def _rounded(y: Tensor, scale: float, zero: int, dtype: str) -> Tensor:
    """y as integers of `dtype`, or as it is for float32."""
    if dtype == DType.FLOAT32:
        return y
    kind = DType(dtype).torch
    limits = torch.iinfo(kind)
    return (torch.round(y / scale) + zero).clamp(limits.min, limits.max).to(torch.int32).to(kind)


@operator("QuantizedConv")
def quantized_conv(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "",
    dilations: list[int],
    group: int,
    pads: list[int],
    strides: list[int],
    x_zero: int,
    residual_scale: float = 1.0,
    residual_zero: int = 0,
    y_dtype: str = "float32",
    y_scale: float = 1.0,
    y_zero: int = 0,
) -> Tensor:
    """x uint8 or int8 [N, C, H, W], w int8 [M, C / group, kh, kw]; `scale` [M] float32 is x's times the weight's.

    activation(conv(x - x_zero, w) * scale + bias + residual), as float32 or integers.
    """
    wide = _centred(x, x_zero, w[0].numel())
    sums = convolve(wide, w.to(wide.dtype), None, strides, pads, dilations, group).to(torch.float32)
    y = sums * scale.reshape(-1, 1, 1)
    if bias is not None:
        y = y + bias.reshape(-1, 1, 1)
    if residual is not None:
        y = y + _real(residual, residual_scale, residual_zero)
    return _rounded(activate(y, activation), y_scale, y_zero, y_dtype)


@operator("QuantizedLinear")
def quantized_linear(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    activation: str = "",
    x_zero: int,
    residual_scale: float = 1.0,
    residual_zero: int = 0,
    y_dtype: str = "float32",
    y_scale: float = 1.0,
    y_zero: int = 0,
) -> Tensor:
    """x uint8 or int8 [..., K], w int8 [N, K], `scale` [N] float32: as QuantizedConv.

    `columns` [N] multiplies the activation's results: what equalises them before they are rounded.
    """
    wide = _centred(x, x_zero, w.shape[1])
    y = torch.matmul(wide, w.to(wide.dtype).T).to(torch.float32) * scale
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + _real(residual, residual_scale, residual_zero)
    y = activate(y, activation)
    return _rounded(y if columns is None else y * columns, y_scale, y_zero, y_dtype)


@operator("QuantizedAdd")
def quantized_add(
    a: Tensor,
    b: Tensor,
    *,
    activation: str = "",
    a_scale: float,
    a_zero: int,
    b_scale: float,
    b_zero: int,
    y_scale: float,
    y_zero: int,
    y_dtype: str,
) -> Tensor:
    """activation(a + b) of integers with a scale each; one broadcasts to the other."""
    y = activate(_real(a, a_scale, a_zero) + _real(b, b_scale, b_zero), activation)
    return _rounded(y, y_scale, y_zero, y_dtype)


@operator("QuantizedGlobalAveragePool")
def quantized_global_average_pool(
    x: Tensor, *, x_scale: float, x_zero: int, y_scale: float = 1.0, y_zero: int = 0, y_dtype: str = "float32"
) -> Tensor:
    """The mean of each channel of x [N, C, H, W]: from an exact sum."""
    count = x.shape[2] * x.shape[3]
    sums = (x.to(torch.int32) - x_zero).sum((2, 3), keepdim=True, dtype=torch.int64)
    return _rounded(sums.to(torch.float32) * (x_scale / count), y_scale, y_zero, y_dtype)


@operator("ReducedConv")
def reduced_conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "",
    dilations: list[int],
    group: int,
    pads: list[int],
    strides: list[int],
) -> Tensor:
    """FusedConv with w in bfloat16 or float16: x is rounded to w's type, products are summed in float32."""
    y = convolve(x.to(w.dtype).to(torch.float32), w.to(torch.float32), b, strides, pads, dilations, group)
    return activate(y if residual is None else y + residual, activation)


@operator("ReducedLinear")
def reduced_linear(
    x: Tensor, w: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, activation: str = ""
) -> Tensor:
    """Linear with w in bfloat16 or float16: x is rounded to w's type, products are summed in float32."""
    y = torch.matmul(x.to(w.dtype).to(torch.float32), w.to(torch.float32).T)
    if bias is not None:
        y = y + bias
    return activate(y if residual is None else y + residual, activation)
