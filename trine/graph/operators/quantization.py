"""Numbers as scaled integers (or float8), and products of them."""

from __future__ import annotations

import torch
from torch import Tensor

from trine.graph.dtypes import FROM_TORCH, DType, from_onnx
from trine.graph.operators.algebra import matmul
from trine.graph.operators.casting import to_float8
from trine.graph.operators.convolution import conv_arguments, convolve
from trine.graph.operators.registry import operator

_RANGES = {DType.INT4: (-8, 7), DType.UINT4: (0, 15)}


def _spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point (a scalar, one an index of `axis`, or one a block along it) to broadcast over x."""
    if parameter.numel() == 1 and parameter.dim() <= 1:
        return parameter.reshape(())
    if block_size:
        repeated = parameter.repeat_interleave(block_size, axis)
        return repeated.narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def _quantize(x: Tensor, scale: Tensor, zero: Tensor | None, dtype: DType, saturate: bool = True) -> Tensor:
    """x / scale, to the nearest even, plus zero, held within dtype."""
    scaled = x / scale
    if dtype.value.startswith("float8"):
        return to_float8(scaled if zero is None else scaled + zero.to(scaled.dtype), dtype, saturate)
    low, high = _RANGES.get(dtype) or (torch.iinfo(dtype.torch).min, torch.iinfo(dtype.torch).max)
    rounded = torch.round(scaled.double() if dtype is DType.INT32 else scaled)
    if zero is not None:
        rounded = rounded + zero.to(rounded.dtype)
    return rounded.clamp(low, high).to(torch.int32).to(dtype.torch)


@operator("QuantizeLinear")
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """To the zero point's type, or `output_dtype`, or uint8. Computed in the scale's type, or in `precision`."""
    dtype = (
        from_onnx(output_dtype)
        if output_dtype
        else FROM_TORCH[zero_point.dtype]
        if zero_point is not None
        else DType.UINT8
    )
    if dtype is None:
        raise TypeError(f"QuantizeLinear to ONNX type {output_dtype} is not supported")
    wide = from_onnx(precision) if precision else None
    number = scale.dtype if wide is None else wide.torch
    if not x.is_floating_point():
        x = x.float()
    x, scale = x.to(number), scale.to(number)
    zero = None if zero_point is None else _spread(zero_point, x, axis, block_size)
    return _quantize(x, _spread(scale, x, axis, block_size), zero, dtype, bool(saturate))


@operator("DequantizeLinear")
def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """(x - zero) * scale, in the scale's type or `output_dtype`."""
    chosen = from_onnx(output_dtype) if output_dtype else None
    wide = x.to(torch.float32) if x.is_floating_point() else x.to(torch.int32)
    if zero_point is not None:
        wide = wide - _spread(zero_point.to(wide.dtype), x, axis, block_size)
    y = wide.float() * _spread(scale.float(), x, axis, block_size)
    return y.to(scale.dtype if chosen is None else chosen.torch)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To uint8 over the tensor's own range, which always includes zero."""
    low, high = torch.clamp(x.min(), max=0), torch.clamp(x.max(), min=0)
    scale = (high - low) / 255
    if scale == 0:
        scale = torch.ones((), dtype=x.dtype)
    zero = torch.clamp(torch.round(-low / scale), 0, 255).to(torch.uint8)
    return _quantize(x, scale, zero, DType.UINT8), scale, zero


def _centred(x: Tensor, zero: Tensor | None, rows: bool) -> Tensor:
    """x minus its zero point, in int32; a vector counts a row of a left operand, a column of a right one."""
    wide = x.to(torch.int32)
    if zero is None:
        return wide
    zero = zero.to(torch.int32)
    if zero.dim() == 1 and zero.numel() > 1 and rows:
        zero = zero[:, None]
    return wide - (zero if zero.numel() > 1 else zero.reshape(()))


@operator("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    return matmul(_centred(a, a_zero, True), _centred(b, b_zero, False))


@operator("QLinearMatMul")
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """The exact integer product, scaled and rounded once."""
    product = matmul(_centred(a, a_zero, True), _centred(b, b_zero, False)).double()
    left = a_scale.double()[:, None] if a_scale.dim() == 1 and a_scale.numel() > 1 else a_scale.double()
    ratio = left * b_scale.double() / y_scale.double()
    ratio = ratio.reshape(()) if ratio.numel() == 1 else ratio
    zero = y_zero if y_zero.numel() > 1 else y_zero.reshape(())
    return _quantize(product * ratio, torch.ones((), dtype=torch.float64), zero, FROM_TORCH[y_zero.dtype])


@operator("QLinearConv")
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """The exact integer convolution (bias in int32 of scale x_scale w_scale), scaled and rounded once."""
    strides, pads, dilations = conv_arguments(x, w, auto_pad, dilations, kernel_shape, pads, strides, group)
    spatial = [1] * (x.dim() - 2)
    zero = w_zero.to(torch.int32).reshape(-1, 1, *spatial)
    y = convolve(
        x.to(torch.int32) - x_zero.to(torch.int32), w.to(torch.int32) - zero, b, strides, pads, dilations, group
    )
    ratio = (x_scale.double() * w_scale.double() / y_scale.double()).reshape(1, -1, *spatial)
    return _quantize(
        y.double() * ratio, torch.ones((), dtype=torch.float64), y_zero.reshape(()), FROM_TORCH[y_zero.dtype]
    )
