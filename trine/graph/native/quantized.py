"""Convolutions, matrix products, sums and pooling on 8-bit integers; quantising and back (csrc/kernels/windows.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from math import prod
from typing import Any

import torch

from trine.graph.dtypes import DType
from trine.graph.errors import PlanError
from trine.graph.fitting_weights import TOGETHER, fitting
from trine.graph.ir import Node, Value
from trine.graph.native.args import ACTIVATIONS
from trine.graph.native.narrow import has_tiles
from trine.graph.native.recorder import Recorder, native
from trine.graph.native.tape import library
from trine.graph.native.tensor import NUMBERS, Tensor
from trine.graph.passes.quantized import scale_of

PANEL, BLOCK = 16, 32
_BYTES = (DType.UINT8, DType.INT8)
_FEW_CHANNELS = 8
_QUAD, _TILE_ROW = 4, 64
_LARGEST_WINDOW = 64
"""Places of a depthwise kernel."""


class Finish(ctypes.Structure):
    """Finish in csrc/kernels/quantized_args.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("scale", "bias", "columns", "residual", "out")),
        *((name, c_int64) for name in ("out_stride", "residual_stride")),
        *((name, c_int32) for name in ("out_dtype", "residual_dtype", "out_zero", "residual_zero")),
        *((name, c_float) for name in ("out_inverse", "residual_scale")),
        *((name, c_int32) for name in ("activation", "in_steps", "low", "high")),
    )


class WindowArgs(ctypes.Structure):
    """WindowArgs in csrc/kernels/quantized_args.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "shares")),
        ("finish", Finish),
        *((name, c_int64) for name in ("images", "groups", "channels", "filters", "depth")),
        *((name, c_int64) for name in ("height", "width", "out_height", "out_width")),
        *((name, c_int64) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w")),
        *((name, c_int64) for name in ("pad_top", "pad_left", "x_pixel", "x_row", "x_image")),
        *((name, c_int64) for name in ("x_channels", "x_channel", "out_step")),
        *((name, c_int32) for name in ("x_dtype", "x_zero", "fits")),
    )


class BytePoolArgs(ctypes.Structure):
    """BytePoolArgs in csrc/kernels/quantized_args.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "out")),
        *((name, c_int64) for name in ("images", "channels", "height", "width", "out_height", "out_width")),
        *((name, c_int64) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w")),
        *((name, c_int64) for name in ("pad_top", "pad_left")),
        ("dtype", c_int32),
    )


class ByteMeanArgs(ctypes.Structure):
    """ByteMeanArgs in csrc/kernels/quantized_args.h."""

    _fields_ = (
        ("x", c_void_p),
        ("finish", Finish),
        *((name, c_int64) for name in ("images", "pixels", "channels")),
        ("x_dtype", c_int32),
        ("x_zero", c_int32),
    )


class QuantizeArgs(ctypes.Structure):
    """QuantizeArgs in csrc/kernels/quantized_args.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "y")),
        *((name, c_int64) for name in ("count", "channels", "pixels")),
        ("scale", c_float),
        *((name, c_int32) for name in ("zero", "dtype", "back")),
    )


class AddBytesArgs(ctypes.Structure):
    """AddBytesArgs in csrc/kernels/quantized_args.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("a", "b", "y")),
        ("count", c_int64),
        *((name, c_float) for name in ("a_scale", "b_scale", "out_inverse")),
        *((name, c_int32) for name in ("a_zero", "b_zero", "out_zero", "a_dtype", "b_dtype", "out_dtype")),
        ("activation", c_int32),
    )


def depth_multiple() -> int:
    """What k is padded to: whole tiles for AMX, what AVX2 takes at once, steps of four bytes else."""
    isa = library().trine_isa()
    return 64 if isa in (b"amx", b"emulated") else 8 if isa == b"avx2" else 4


def panels(data: torch.Tensor, groups: int, step: int, multiple: int) -> torch.Tensor:
    """Weights [groups * filters, channels, kh, kw] as [groups][panels][k / step][16][step], k = (y, x, channel)."""
    filters = data.shape[0] // groups
    rows = data.reshape(groups, filters, *data.shape[1:]).movedim(2, -1).reshape(groups, filters, -1)
    depth = -(-rows.shape[2] // multiple) * multiple
    count = -(-filters // PANEL)
    padded = torch.zeros(groups, count * PANEL, depth, dtype=data.dtype)
    padded[:, :filters, : rows.shape[2]] = rows
    return padded.view(groups, count, PANEL, depth // step, step).transpose(2, 3).contiguous()


def in_panels(row: torch.Tensor, groups: int) -> torch.Tensor:
    """[groups * filters] as [groups][panels * 16], zeros between."""
    filters = row.numel() // groups
    padded = torch.zeros(groups, -(-filters // PANEL) * PANEL, dtype=row.dtype)
    padded[:, :filters] = row.view(groups, filters)
    return padded


def finish(node: Node, y: Tensor, residual: Tensor | None) -> tuple[Finish, dict[str, Any]]:
    """What follows the sums, and what its pointers name."""
    a = node.attributes
    dtype = DType(a.get("y_dtype", DType.FLOAT32))
    found = Finish(
        out_dtype=NUMBERS[dtype],
        out_zero=a.get("y_zero", 0),
        out_inverse=1 / a.get("y_scale", 1.0),
        residual_zero=a.get("residual_zero", 0),
        residual_scale=a.get("residual_scale", 1.0),
        activation=ACTIVATIONS.index(a.get("activation", "")),
    )
    if residual is not None:
        found.residual_dtype = residual.number
    return found, {"residual": residual, "out": y}


def in_steps(
    tape: Recorder, node: Node, args: WindowArgs, groups: int | None, residual: Tensor | None
) -> dict[str, Tensor | None] | None:
    """Makes the Finish count in steps of the result, and gives its scale and bias, in panels (groups None: in blocks);
    None where it can't.
    """
    a, scale, bias = node.attributes, node.inputs[2], node.input(3)
    clamps = ("", "relu", "relu6")
    floats = residual is not None and residual.dtype is DType.FLOAT32
    if "y_scale" not in a or a.get("activation", "") not in clamps or node.input(5) is not None or floats:
        return None
    assert scale is not None
    dtype, step, zero, f = DType(a["y_dtype"]), a["y_scale"], a["y_zero"], args.finish
    limits = torch.iinfo(dtype.torch)
    ends = {"": (limits.min, limits.max), "relu": (zero, limits.max), "relu6": (zero, zero + round(6 / step))}
    low, high = ends[a.get("activation", "")]
    f.in_steps, f.low, f.high = 1, max(low, limits.min), min(high, limits.max)
    f.residual_scale = 0.0 if residual is None else f.residual_scale / step
    shift = f.residual_scale * f.residual_zero

    def place(row: torch.Tensor) -> torch.Tensor:
        return in_blocks(row) if groups is None else in_panels(row, groups)

    def scales() -> torch.Tensor:
        return place((scale.data.double() / step).float())

    def biases() -> torch.Tensor:
        start = torch.zeros_like(scale.data) if bias is None else bias.data
        return place((start.double() / step - shift).float())

    count = scale.data.numel()
    shape = (-(-max(count, BLOCK) // BLOCK), 4, 8) if groups is None else _row_shape(count, groups)
    found: dict[str, Tensor | None] = {"scale": packed_weight(tape, scale, f"steps:{groups}:{step!r}", shape, scales)}
    if bias is not None or shift:
        name = f"biases:{groups}:{step!r}:{shift!r}"
        found["bias"] = packed_weight(tape, scale if bias is None else bias, name, shape, biases)
    return found


def pointers_of(args: type[ctypes.Structure], named: dict[str, Any], finished: dict[str, Any]) -> dict[str | int, Any]:
    """By place: those of the arguments, and those of the Finish among them."""
    start = args.finish.offset
    return {**named, **{start + getattr(Finish, name).offset: tensor for name, tensor in finished.items()}}


def packed_weight(
    tape: Recorder, weight: Value, layout: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]
) -> Tensor:
    """As `tape.constant`. PlanError where the plan file has one of another shape: kernels would read beyond it."""
    found = tape.constant(weight, layout, make)
    if found.shape != shape:
        raise PlanError(f"the plan's packed weight {weight.name!r} has the wrong size: build the plan again")
    return found


def panels_shape(data: torch.Tensor, groups: int, step: int, multiple: int) -> tuple[int, ...]:
    """Of `panels`."""
    filters, depth = data.shape[0] // groups, data[0].numel()
    return groups, -(-filters // PANEL), -(-depth // multiple) * multiple // step, PANEL, step


def _row_shape(count: int, groups: int) -> tuple[int, int]:
    return groups, -(-(count // groups) // PANEL) * PANEL


def row_constants(
    tape: Recorder, groups: int, scale: Value | None, bias: Value | None, columns: Value | None = None
) -> dict[str, Any]:
    """What there is one number a column of, in panels."""
    found = {"scale": scale, "bias": bias, "columns": columns}
    return {
        name: packed_weight(
            tape,
            value,
            f"panels:{groups}",
            _row_shape(value.data.numel(), groups),
            lambda value=value: in_panels(value.data, groups),  # type: ignore[misc]
        )
        for name, value in found.items()
        if value is not None
    }


def window_args(x: Tensor, y: Tensor, weight: torch.Tensor, attributes: dict[str, Any]) -> WindowArgs:
    """The shape of a convolution over images with their channels innermost."""
    n, channels, height, width = x.shape
    groups, (kh, kw) = attributes["group"], weight.shape[2:]
    pads, strides, dilations = attributes["pads"], attributes["strides"], attributes["dilations"]
    return WindowArgs(
        images=n,
        groups=groups,
        channels=channels // groups,
        filters=weight.shape[0] // groups,
        height=height,
        width=width,
        out_height=y.shape[2],
        out_width=y.shape[3],
        kernel_h=kh,
        kernel_w=kw,
        stride_h=strides[0],
        stride_w=strides[1],
        dilation_h=dilations[0],
        dilation_w=dilations[1],
        pad_top=pads[0],
        pad_left=pads[1],
        x_pixel=channels,
        x_row=width * channels,
        x_image=height * width * channels,
        x_dtype=x.number,
    )


def row_args(rows: int, k: int, n: int, x: Tensor) -> WindowArgs:
    """A product of rows by a matrix, as a convolution over one line of pixels."""
    one = dict.fromkeys(["images", "groups", "height", "out_height", "kernel_h", "kernel_w"], 1)
    steps = dict.fromkeys(["stride_h", "stride_w", "dilation_h", "dilation_w"], 1)
    return WindowArgs(
        **one, **steps, channels=k, filters=n, width=rows, out_width=rows, x_pixel=k, x_row=rows * k, x_dtype=x.number
    )


def _operands(tape: Recorder, node: Node) -> tuple[Tensor, Value, Tensor | None] | None:
    """x, the weight and the residual of a quantised product, where kernels take them."""
    x, weight, scale, bias = tape.tensor(node.inputs[0]), node.inputs[1], node.inputs[2], node.input(3)
    if x is None or x.dtype not in _BYTES or not x.count or weight is None or not weight.is_constant:
        return None
    if scale is None or not scale.is_constant or (bias is not None and not bias.is_constant):
        return None
    residual = tape.tensor(node.input(4))
    if node.input(4) is not None and (residual is None or residual.dtype not in (*_BYTES, DType.FLOAT32)):
        return None
    if residual is not None and residual.shape != node.output.static_shape:
        return None
    return x, weight, residual


def _emit(
    tape: Recorder, node: Node, args: WindowArgs, x: Tensor, y: Tensor, residual: Tensor | None, weight: Value
) -> None:
    """The step of a quantised product: packed weights, their sums, what follows."""
    groups = args.groups
    data = weight.data.reshape(*weight.data.shape, *[1] * (4 - weight.data.dim()))
    if args.x_channels:
        data = torch.nn.functional.pad(data, (0, 0, 0, 0, 0, args.channels - args.x_channels))
    args.fits = fitting(data) if library().trine_isa() == b"avx2" else TOGETHER
    step, multiple = (2, 2) if args.fits == 1 else (4, depth_multiple())
    shape = panels_shape(data, groups, step, multiple)
    layout = f"int8:{step}x{multiple}:{groups}:{args.x_channels}"
    packed = packed_weight(tape, weight, layout, shape, lambda: panels(data, groups, step, multiple))
    args.depth = packed.shape[2] * step
    args.x_zero = node.attributes["x_zero"]
    share = _shares(tape, weight, groups, x, args.x_zero)
    args.finish, finished = finish(node, y, residual)
    args.finish.out_stride = args.finish.residual_stride = groups * args.filters
    finished |= in_steps(tape, node, args, groups, residual) or row_constants(
        tape, groups, node.inputs[2], node.input(3), node.input(5)
    )
    named = {"x": x, "weight": packed, "shares": share}
    in_place = [] if residual is None else [(residual, y)]
    tape.step("quantized_conv", args, pointers_of(WindowArgs, named, finished), in_place=in_place)


def _shares(tape: Recorder, weight: Value, groups: int, x: Tensor, zero: int) -> Tensor:
    """The zero point (of unsigned bytes: signed ones are read as 128 more) times each filter's sum of weights."""
    zero += 128 if x.dtype is DType.INT8 else 0

    def make() -> torch.Tensor:
        return in_panels(weight.data.flatten(1).sum(1, dtype=torch.int32) * zero, groups)

    return packed_weight(tape, weight, f"shares:{groups}:{zero}", _row_shape(len(weight.data), groups), make)


@native("QuantizedConv")
def quantized_conv(tape: Recorder, node: Node) -> bool:
    """Any kernel, stride, dilation, padding and groups; a filter for each channel by a kernel of its own."""
    found = _operands(tape, node)
    if found is None or min(node.attributes["pads"]) < 0 or node.output.static_shape is None:
        return False
    x, weight, residual = found
    x = tape.channels_last(x)
    residual = None if residual is None else tape.channels_last(residual)
    data = weight.data
    y = tape.output(node.output, channels_last=True)
    args = window_args(x, y, data, node.attributes)
    if args.channels == 1 and args.filters == 1 and prod(data.shape[2:]) <= _LARGEST_WINDOW and args.groups > 1:
        _depthwise(tape, node, args, (x, y, residual), weight)
    else:
        if has_tiles() and args.channels < _QUAD and args.groups == 1 and _is_short(args):
            args.channels, args.x_channels, args.x_channel = _QUAD, args.channels, 1
        _emit(tape, node, args, x, y, residual, weight)
    return True


def _is_short(args: WindowArgs) -> bool:
    """Whether a line of the kernel, four channels a pixel, fits a row of a tile."""
    return bool(1 < args.kernel_w <= _TILE_ROW // _QUAD and args.dilation_w == 1)


def _depthwise(
    tape: Recorder, node: Node, args: WindowArgs, tensors: tuple[Tensor, Tensor, Tensor | None], weight: Value
) -> None:
    x, y, residual = tensors
    data, channels = weight.data, len(weight.data)
    args.fits = min(2, fitting(data, depthwise=True))
    places = 2 if args.fits == 1 else 4
    blocks = -(-max(channels, BLOCK) // BLOCK)
    shape = (blocks, data.shape[3], -(-data.shape[2] // places), 4, 8, 4)
    packed = packed_weight(tape, weight, f"depthwise:{places}", shape, lambda: depthwise_quads(data, places))
    args.x_zero = zero = node.attributes["x_zero"]
    unsigned = zero + (128 if x.dtype is DType.INT8 else 0)

    def shares() -> torch.Tensor:
        return in_blocks(data.flatten(1).sum(1, dtype=torch.int32) * unsigned)

    share = packed_weight(tape, weight, f"shares:blocks:{unsigned}", (blocks, 4, 8), shares)
    args.finish, finished = finish(node, y, residual)
    args.finish.out_stride = args.finish.residual_stride = channels
    steps = None if residual is not None else in_steps(tape, node, args, None, residual)
    finished |= steps or row_constants(tape, 1, node.inputs[2], node.input(3))
    # A last block of fewer than 32 channels is computed together with some before it, again.
    in_place = [] if residual is None or channels % BLOCK else [(residual, y)]
    named = {"x": x, "weight": packed, "shares": share}
    tape.step("depthwise8", args, pointers_of(WindowArgs, named, finished), in_place=in_place)


def in_blocks(rows: torch.Tensor) -> torch.Tensor:
    """[channels, ...] as [blocks, 4, 8, ...], in the order of csrc/kernels/depthwise8.h."""
    rows = torch.cat([rows, rows.new_zeros(max(0, BLOCK - len(rows)), *rows.shape[1:])])
    starts = torch.tensor([max(0, min(first, len(rows) - BLOCK)) for first in range(0, len(rows), BLOCK)])
    low = torch.arange(4)
    inside = torch.stack([torch.cat([low + 4 * part, low + 16 + 4 * part]) for part in range(4)])
    return rows[starts[:, None, None] + inside]


def depthwise_quads(data: torch.Tensor, places: int) -> torch.Tensor:
    """Weights [channels, 1, kh, kw] as [blocks, kw, quads, 4, 8, 4]; with 2 places a quad, every other is empty."""
    columns = data[:, 0].transpose(1, 2)  # [channels, kw, kh]
    columns = torch.nn.functional.pad(columns, (0, -columns.shape[2] % places))
    columns = columns.reshape(*columns.shape[:2], -1, places)
    if places == 2:
        columns = torch.stack([columns, torch.zeros_like(columns)], 4).flatten(3)
    return in_blocks(columns).permute(0, 3, 4, 1, 2, 5).contiguous()


@native("QuantizedLinear")
def quantized_linear(tape: Recorder, node: Node) -> bool:
    """Rows by a matrix."""
    found = _operands(tape, node)
    if found is None or node.output.static_shape is None:
        return False
    x, weight, residual = found
    x = tape.rows(x)
    residual = None if residual is None else tape.rows(residual)
    n, k = weight.data.shape
    y = tape.output(node.output)
    _emit(tape, node, row_args(prod(x.shape[:-1]), k, n, x), x, y, residual, weight)
    return True


def _dense(tape: Recorder, x: Tensor) -> Tensor:
    """Without holes, in one of the two orders that values have."""
    return x if x.is_channels_last else tape.rows(x)


def _convert(tape: Recorder, node: Node, op: str) -> bool:
    scale, x = scale_of(node, op), tape.tensor(node.inputs[0])
    if scale is None or x is None or node.output.static_shape is None:
        return False
    x = _dense(tape, x)
    back = op == "DequantizeLinear"
    # What becomes bytes is read with the channels innermost: few of them are turned at once.
    turned = not back and len(x.shape) == 4 and 1 < x.shape[1] <= _FEW_CHANNELS and not x.is_channels_last and x.count
    y = tape.output(node.output, channels_last=bool(turned) or not x.is_contiguous)
    args = QuantizeArgs(count=x.count, scale=scale.scale, zero=scale.zero, dtype=NUMBERS[scale.dtype], back=back)
    if turned:
        args.channels, args.pixels = x.shape[1], x.shape[2] * x.shape[3]
    tape.step("quantize", args, {"x": x, "y": y})
    return True


@native("QuantizeLinear")
def quantize_linear(tape: Recorder, node: Node) -> bool:
    """With one scale."""
    return _convert(tape, node, "QuantizeLinear")


@native("DequantizeLinear")
def dequantize_linear(tape: Recorder, node: Node) -> bool:
    """With one scale."""
    return _convert(tape, node, "DequantizeLinear")


@native("QuantizedAdd")
def quantized_add(tape: Recorder, node: Node) -> bool:
    """Of integers of one shape."""
    a, b = tape.tensor(node.inputs[0]), tape.tensor(node.inputs[1])
    if a is None or b is None or a.shape != b.shape or a.shape != node.output.static_shape:
        return False
    if a.dtype not in _BYTES or b.dtype not in _BYTES:
        return False
    last = a.is_channels_last and not a.is_contiguous
    a, b = (tape.channels_last(a), tape.channels_last(b)) if last else (tape.rows(a), tape.rows(b))
    y = tape.output(node.output, channels_last=last)
    names = node.attributes
    args = AddBytesArgs(
        count=a.count,
        a_scale=names["a_scale"],
        b_scale=names["b_scale"],
        out_inverse=1 / names["y_scale"],
        a_zero=names["a_zero"],
        b_zero=names["b_zero"],
        out_zero=names["y_zero"],
        a_dtype=a.number,
        b_dtype=b.number,
        out_dtype=y.number,
        activation=ACTIVATIONS.index(names["activation"]),
    )
    tape.step("add_bytes", args, {"a": a, "b": b, "y": y}, in_place=[(a, y), (b, y)])
    return True


@native("MaxPool", "bytes")
def max_pool_bytes(tape: Recorder, node: Node) -> bool:
    """Over two dimensions of images."""
    x, a = tape.tensor(node.inputs[0]), node.attributes
    if x is None or x.dtype not in _BYTES or len(x.shape) != 4 or node.output.static_shape is None or not x.count:
        return False
    if sum(bool(value.name) for value in node.outputs) != 1 or a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    x = tape.channels_last(x)
    y = tape.output(node.output, channels_last=True)
    n, channels, height, width = x.shape
    pads = [0] * 4 if a.get("auto_pad") == "VALID" else a.get("pads") or [0] * 4
    strides, dilations = a.get("strides") or [1, 1], a.get("dilations") or [1, 1]
    args = BytePoolArgs(
        images=n,
        channels=channels,
        height=height,
        width=width,
        out_height=y.shape[2],
        out_width=y.shape[3],
        kernel_h=a["kernel_shape"][0],
        kernel_w=a["kernel_shape"][1],
        stride_h=strides[0],
        stride_w=strides[1],
        dilation_h=dilations[0],
        dilation_w=dilations[1],
        pad_top=pads[0],
        pad_left=pads[1],
        dtype=x.number,
    )
    tape.step("max_pool_bytes", args, {"x": x, "out": y})
    return True


@native("QuantizedGlobalAveragePool")
def global_average_pool(tape: Recorder, node: Node) -> bool:
    """The mean over the pixels of images."""
    x = tape.tensor(node.inputs[0])
    if x is None or x.dtype not in _BYTES or len(x.shape) != 4 or not x.count:
        return False
    x = tape.channels_last(x)
    y = tape.output(node.output)
    n, channels, height, width = x.shape
    factor = node.attributes["x_scale"] / (height * width)
    args = ByteMeanArgs(images=n, pixels=height * width, channels=channels, x_dtype=x.number)
    args.x_zero = node.attributes["x_zero"]
    args.finish, finished = finish(node, y, None)
    args.finish.out_stride = channels
    source = node.inputs[0]
    assert source is not None
    factors = torch.full((-(-channels // PANEL) * PANEL,), factor)
    scale = tape.constant(source, f"mean:{channels}:{factor}", lambda: factors)
    tape.step("mean_bytes", args, pointers_of(ByteMeanArgs, {"x": x}, {**finished, "scale": scale}))
    return True
