"""Pooling and resizing, on images with their channels innermost."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch

from trine.graph.ir import Node
from trine.graph.native.packed import constant_tensor
from trine.graph.native.recorder import Recorder, native
from trine.graph.native.tensor import Tensor
from trine.graph.operators.convolution import window_pads
from trine.graph.operators.image import ResizedAxis, resize_axes

_MAX, _MEAN, _MEAN_WITH_PADDING = 0, 1, 2
_STRIDES = tuple((f"{which}_{name}", c_int64) for which in ("x", "out") for name in ("pixel", "row", "image"))


class PoolArgs(ctypes.Structure):
    """PoolArgs in csrc/kernels/conv_args.h."""

    _fields_ = (
        ("x", c_void_p),
        ("out", c_void_p),
        *((name, c_int64) for name in ("images", "channels", "height", "width", "out_height", "out_width")),
        *((f"{name}_{axis}", c_int64) for name in ("kernel", "stride", "dilation") for axis in "hw"),
        *((f"pad_{side}", c_int64) for side in ("top", "left", "bottom", "right")),
        *_STRIDES,
        ("kind", c_int32),
        ("dtype", c_int32),
    )


class ResizeArgs(ctypes.Structure):
    """ResizeArgs in csrc/kernels/conv_args.h."""

    _fields_ = (
        ("x", c_void_p),
        ("out", c_void_p),
        *((name, c_void_p) for name in ("row_low", "row_high", "column_low", "column_high")),
        *((name, c_void_p) for name in ("row_weight", "column_weight")),
        *((name, c_int64) for name in ("images", "channels", "out_height", "out_width")),
        *_STRIDES,
    )


def _places(x: Tensor, y: Tensor) -> dict[str, int]:
    return {
        f"{which}_{name}": image.strides[axis]
        for which, image in (("x", x), ("out", y))
        for name, axis in (("pixel", 3), ("row", 2), ("image", 0))
    }


def _pool(
    tape: Recorder, node: Node, kind: int, kernel: list[int], strides: list[int], dilations: list[int], pads: list[int]
) -> bool:
    x = tape.real_tensor(node.inputs[0])
    if x is None or len(x.shape) != 4 or len(node.outputs) != 1 or node.output.static_shape is None or 0 in x.shape:
        return False
    if min(pads) < 0:
        return False
    x = x if x.strides[1] == 1 or x.shape[1] == 1 else tape.channels_last(x)
    y = tape.image_output(node.output)
    if y.dtype is not x.dtype:
        return False
    args = PoolArgs(
        images=x.shape[0],
        channels=x.shape[1],
        height=x.shape[2],
        width=x.shape[3],
        out_height=y.shape[2],
        out_width=y.shape[3],
        kernel_h=kernel[0],
        kernel_w=kernel[1],
        stride_h=strides[0],
        stride_w=strides[1],
        dilation_h=dilations[0],
        dilation_w=dilations[1],
        pad_top=pads[0],
        pad_left=pads[1],
        pad_bottom=pads[2],
        pad_right=pads[3],
        kind=kind,
        dtype=x.number,
        **_places(x, y),
    )
    tape.step("pool", args, {"x": x, "out": y})
    return True


def _window(tape: Recorder, node: Node, kind: int) -> bool:
    x, a = tape.tensor(node.inputs[0]), node.attributes
    kernel = a.get("kernel_shape")
    if x is None or len(x.shape) != 4 or not kernel or len(kernel) != 2:
        return False
    strides, dilations = list(a.get("strides") or [1, 1]), list(a.get("dilations") or [1, 1])
    pads = window_pads(list(x.shape[2:]), list(kernel), strides, dilations, a.get("pads"), a.get("auto_pad", "NOTSET"))
    return _pool(tape, node, kind, list(kernel), strides, dilations, pads)


@native("MaxPool")
def max_pool(tape: Recorder, node: Node) -> bool:
    """Without the second output."""
    return _window(tape, node, _MAX)


@native("AveragePool")
def average_pool(tape: Recorder, node: Node) -> bool:
    return _window(tape, node, _MEAN_WITH_PADDING if node.attributes.get("count_include_pad") else _MEAN)


def _global(tape: Recorder, node: Node, kind: int) -> bool:
    x = tape.tensor(node.inputs[0])
    return x is not None and len(x.shape) == 4 and _pool(tape, node, kind, list(x.shape[2:]), [1, 1], [1, 1], [0] * 4)


@native("GlobalMaxPool")
def global_max_pool(tape: Recorder, node: Node) -> bool:
    return _global(tape, node, _MAX)


@native("GlobalAveragePool")
def global_average_pool(tape: Recorder, node: Node) -> bool:
    return _global(tape, node, _MEAN)


def _resized_axes(node: Node, shape: tuple[int, ...]) -> dict[int, ResizedAxis] | None:
    """By axis; None where they depend on what is known only when the model runs."""
    given: list[torch.Tensor | None] = []
    for value in (node.input(1), node.input(2), node.input(3)):
        if value is not None and not value.is_constant:
            return None
        given.append(None if value is None else value.data)
    a = node.attributes
    coordinates = a.get("coordinate_transformation_mode", "half_pixel")
    policy = a.get("keep_aspect_ratio_policy", "stretch")
    axes = resize_axes(shape, given[0], given[1], given[2], a.get("axes"), coordinates, policy)
    return None if "crop" in coordinates else {axis.axis: axis for axis in axes}


def _mix(axis: ResizedAxis | None, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """For each output element two input elements and the second's weight; None if there are more than two."""
    if axis is None:
        places = torch.arange(length, dtype=torch.int32)
        return places, places, torch.zeros(length)
    weights = axis.weights("linear", 0.0, False, False)
    used = weights != 0
    low = used.int().argmax(1)
    high = axis.length - 1 - used.flip(1).int().argmax(1)
    second = torch.where(high > low, weights.gather(1, high[:, None])[:, 0], torch.zeros(len(low), dtype=torch.float64))
    if bool((high - low > 1).any()) or not torch.allclose(weights.sum(1), torch.ones(len(low), dtype=torch.float64)):
        return None
    return low.int(), high.int(), second.float()


@native("Resize")
def resize(tape: Recorder, node: Node) -> bool:
    """The nearest element, or a mean of two by two weighted by distance, along height and width."""
    x, a = tape.float_tensor(node.inputs[0]), node.attributes
    if x is None or len(x.shape) != 4 or node.output.static_shape is None or 0 in x.shape:
        return False
    mode = a.get("mode", "nearest")
    if mode not in ("nearest", "linear") or a.get("antialias") or a.get("exclude_outside"):
        return False
    axes = _resized_axes(node, x.shape)
    if axes is None or not axes.keys() <= {2, 3}:
        return False
    tables: dict[str, torch.Tensor] = {}
    for name, index in (("row", 2), ("column", 3)):
        axis = axes.get(index)
        if mode == "nearest":
            places = torch.arange(x.shape[index])
            if axis is not None:
                places = axis.nearest(a.get("nearest_mode", "round_prefer_floor"))
            tables[f"{name}_low"] = places.int()
            continue
        mixed = _mix(axis, x.shape[index])
        if mixed is None:
            return False
        tables[f"{name}_low"], tables[f"{name}_high"], tables[f"{name}_weight"] = mixed
    x = x if x.strides[1] == 1 or x.shape[1] == 1 else tape.channels_last(x)
    y = tape.image_output(node.output)
    args = ResizeArgs(
        images=x.shape[0], channels=x.shape[1], out_height=y.shape[2], out_width=y.shape[3], **_places(x, y)
    )
    pointers = {name: constant_tensor(table.contiguous()) for name, table in tables.items()}
    tape.step("resize", args, {"x": x, "out": y, **pointers})
    return True
