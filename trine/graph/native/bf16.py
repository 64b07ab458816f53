"""Convolutions with weights in bfloat16 or float16: bfloat16's own arithmetic where the processor has it."""

from __future__ import annotations

from math import prod

import torch

from trine.graph.dtypes import DType
from trine.graph.ir import Node, Value, constant
from trine.graph.native.narrow import has_tiles, spreads
from trine.graph.native.quantized import (
    WindowArgs,
    finish,
    packed_weight,
    panels,
    panels_shape,
    pointers_of,
    row_args,
    row_constants,
    window_args,
)
from trine.graph.native.recorder import RULES, Recorder, native
from trine.graph.native.tape import library
from trine.graph.native.tensor import Tensor

_HAS_BF16 = (b"amx", b"avx512_bf16", b"emulated")
_STEP, _MULTIPLE = 2, 32
_IMAGE = 4
_POINTWISE = {"strides": [1, 1], "dilations": [1, 1], "pads": [0, 0], "group": 1}
_PLANAR, _WIDEST = 4, 8
"""Channels of an image that tiles read with its channels outermost, places of a line of the kernel."""


@native("ReducedConv")
def reduced_conv(tape: Recorder, node: Node) -> bool:
    """With tiles or pairs of bfloat16; else float32's kernels on the widened weight."""
    x, weight, bias = tape.real_tensor(node.inputs[0]), node.inputs[1], node.input(2)
    if x is None or not x.count or weight is None or not weight.is_constant or node.output.static_shape is None:
        return False
    if bias is not None and not bias.is_constant:
        return False
    group = node.attributes["group"]
    depthwise = group > 1 and weight.data.shape[1] == 1
    if weight.dtype is not DType.BFLOAT16 or depthwise or library().trine_isa() not in _HAS_BF16:
        return _widened(tape, node, weight)
    residual = tape.real_tensor(node.input(3))
    if min(node.attributes["pads"]) < 0 or (node.input(3) is not None and residual is None):
        return False
    if residual is not None and residual.shape != node.output.static_shape:
        return False
    if _is_planar(x, weight.data, node):
        return _planar_conv(tape, node, x, weight, bias, residual)
    x = tape.channels_last(x)
    y = tape.output(node.output, channels_last=True)
    args = window_args(x, y, weight.data, node.attributes)
    _emit(tape, node, args, x, y, residual, weight, bias, weight.data, f"{group}")
    return True


def _is_planar(x: Tensor, data: torch.Tensor, node: Node) -> bool:
    """Whether tiles can read a model's image as it comes: a few channels, outermost."""
    a = node.attributes
    few = a["group"] == 1 and x.shape[1] <= _PLANAR and 1 < data.shape[3] <= _WIDEST and a["dilations"][1] == 1
    return few and has_tiles() and x.dtype is DType.FLOAT32 and x.strides[3] == 1 and x.strides[1] != 1


def _planar_conv(
    tape: Recorder, node: Node, x: Tensor, weight: Value, bias: Value | None, residual: Tensor | None
) -> bool:
    """Of an image with its channels outermost, filled up to four."""
    y, channels = tape.output(node.output, channels_last=True), x.shape[1]
    data = torch.nn.functional.pad(weight.data, (0, 0, 0, 0, 0, _PLANAR - channels))
    args = window_args(x, y, data, node.attributes)
    args.channels, args.x_channels, args.x_channel = _PLANAR, channels, x.strides[1]
    args.x_pixel, args.x_row, args.x_image = 1, x.strides[2], x.strides[0]
    _emit(tape, node, args, x, y, residual, weight, bias, data, "planar")
    return True


@native("ReducedLinear", "tiles")
def reduced_linear(tape: Recorder, node: Node) -> bool:
    """Rows by a matrix, on tiles: as a convolution over one line of pixels."""
    x, weight, bias = tape.real_tensor(node.inputs[0]), node.inputs[1], node.input(2)
    if x is None or weight is None or not weight.is_constant or weight.dtype is not DType.BFLOAT16 or not has_tiles():
        return False
    if node.output.static_shape is None or (bias is not None and not bias.is_constant) or not x.shape or not x.count:
        return False
    residual = tape.real_tensor(node.input(3))
    if node.input(3) is not None and (residual is None or residual.shape != node.output.static_shape):
        return False
    n, k = weight.data.shape
    x, y = tape.rows(x), tape.output(node.output)
    args = row_args(prod(x.shape[:-1]), k, n, x)
    residual = None if residual is None else tape.rows(residual)
    _emit(tape, node, args, x, y, residual, weight, bias, weight.data[:, :, None, None], "1")
    return True


@native("ConvTranspose", "tiles")
def transposed(tape: Recorder, node: Node) -> bool:
    """Where each result is written once, of images in bfloat16: a product for each line of the kernel."""
    x, weight, bias = tape.real_tensor(node.inputs[0]), node.inputs[1], node.input(2)
    if x is None or x.dtype is not DType.BFLOAT16 or weight is None or not spreads(node):
        return False
    if node.output.static_shape is None or (bias is not None and not bias.is_constant):
        return False
    x, y = tape.channels_last(x), tape.output(node.output, channels_last=True)
    filters, (lines, places) = weight.data.shape[1], weight.data.shape[2:]
    many = None if bias is None else tape.packed.companion(bias, f"times{places}", lambda: _repeated(bias, places))
    for line in range(lines):
        data = weight.data[:, :, line].permute(2, 1, 0).reshape(places * filters, -1, 1, 1)
        args = window_args(x, x, data, _POINTWISE)
        args.out_step = lines
        part = y.slice(2, line, x.shape[2], lines)
        _emit(tape, node, args, x, part, None, weight, many, data.to(torch.bfloat16), f"line{line}")
    return True


def _repeated(value: Value, times: int) -> Value:
    return constant(f"{value.name}.{times}", value.data.repeat(times))


def _emit(
    tape: Recorder,
    node: Node,
    args: WindowArgs,
    x: Tensor,
    y: Tensor,
    residual: Tensor | None,
    weight: Value,
    bias: Value | None,
    data: torch.Tensor,
    layout: str,
) -> None:
    """The step of a product with weights `data`: in panels, with what follows."""
    if residual is not None and len(y.shape) == _IMAGE:
        residual = tape.channels_last(residual)
    group = args.groups
    shape = panels_shape(data, group, _STEP, _MULTIPLE)
    name = f"bf16:{_STEP}x{_MULTIPLE}:{layout}"
    packed = packed_weight(tape, weight, name, shape, lambda: panels(data, group, _STEP, _MULTIPLE))
    args.depth = packed.shape[2] * _STEP
    args.finish, finished = finish(node, y, residual)
    args.finish.out_dtype = y.number
    args.finish.out_stride = args.finish.residual_stride = group * args.filters
    finished |= row_constants(tape, group, None, bias)
    in_place = [] if residual is None else [(residual, y)]
    tape.step("bf16_conv", args, pointers_of(type(args), {"x": x, "weight": packed}, finished), in_place=in_place)


def _widened(tape: Recorder, node: Node, weight: Value) -> bool:
    """As a FusedConv of float32, whose packed weights the plan keeps under the same name."""
    wide = tape.packed.companion(weight, "float32", lambda: constant(f"{weight.name}.float32", _float32(weight)))
    stand_in = Node("FusedConv", [node.inputs[0], wide, *node.inputs[2:]], [], dict(node.attributes), node.name)
    stand_in.outputs = node.outputs
    return any(rule(tape, stand_in) for rule in RULES.get("FusedConv", {}).values())


def _float32(weight: Value) -> torch.Tensor:
    data: torch.Tensor = weight.data
    return data.to(torch.float32)
