"""Convolutions: direct, Winograd's, depthwise and transposed, on images with their channels innermost."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from typing import Any

import torch

from trine.graph.ir import Node, Value
from trine.graph.native.args import ACTIVATIONS
from trine.graph.native.recorder import Recorder, native
from trine.graph.native.tensor import Tensor
from trine.graph.operators.convolution import window_pads

_PANEL = 16
_FEW_CHANNELS = 12
"""Below that the kernel can take the channels outermost, as models' inputs have them, at no cost."""
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.625, -0.625, 1.5, -1.5)}
"""What Winograd's kernels interpolate at, besides infinity, by the size of their tiles (csrc/kernels/winograd.h)."""


class ConvArgs(ctypes.Structure):
    """ConvArgs in csrc/kernels/conv_args.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "bias", "residual", "out")),
        *((name, c_int64) for name in ("images", "groups", "channels", "filters")),
        *((name, c_int64) for name in ("height", "width", "out_height", "out_width")),
        *((f"{name}_{axis}", c_int64) for name in ("kernel", "stride", "dilation") for axis in "hw"),
        *((name, c_int64) for name in ("pad_top", "pad_left")),
        *((f"x_{name}", c_int64) for name in ("channel", "pixel", "row", "image")),
        *((f"{which}_{name}", c_int64) for which in ("out", "residual") for name in ("pixel", "row", "image")),
        ("activation", c_int32),
        ("dtype", c_int32),
    )


@dataclass(frozen=True)
class _Conv:
    """What a convolution's kernel needs to know besides its images. `channels` are those of a group."""

    weight: Value
    bias: Value | None
    filters: int
    channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int]
    """Above and to the left; negative ones cut."""
    group: int
    activation: int


def _constants(node: Node, tape: Recorder) -> bool:
    """Whether weight and bias are constant, of float32, for two spatial dimensions."""
    weight, bias = node.inputs[1], node.input(2)
    if weight is None or not weight.is_constant or tape.float_tensor(weight) is None or weight.rank != 4:
        return False
    return bias is None or (bias.is_constant and tape.float_tensor(bias) is not None)


def _conv_of(tape: Recorder, node: Node, *, narrow: bool = False) -> tuple[Tensor, _Conv] | None:
    """A node's input (bfloat16 only if `narrow`) and constants; None where the kernels don't apply."""
    x = tape.real_tensor(node.inputs[0]) if narrow else tape.float_tensor(node.inputs[0])
    if x is None or node.output.static_shape is None or not _constants(node, tape) or 0 in x.shape:
        return None
    a, weight = node.attributes, node.inputs[1]
    assert weight is not None
    kernel = (int(weight.data.shape[2]), int(weight.data.shape[3]))
    if list(a.get("kernel_shape") or kernel) != list(kernel) or x.shape[1] != weight.data.shape[1] * a.get("group", 1):
        return None
    strides, dilations = list(a.get("strides") or [1, 1]), list(a.get("dilations") or [1, 1])
    pads = window_pads(list(x.shape[2:]), list(kernel), strides, dilations, a.get("pads"), a.get("auto_pad", "NOTSET"))
    conv = _Conv(
        weight,
        node.input(2),
        int(weight.data.shape[0]),
        int(weight.data.shape[1]),
        kernel,
        (strides[0], strides[1]),
        (dilations[0], dilations[1]),
        (pads[0], pads[1]),
        a.get("group", 1),
        ACTIVATIONS.index(a.get("activation", "")),
    )
    return x, conv


def in_panels(matrix: torch.Tensor) -> torch.Tensor:
    """[groups, n, k] to [groups, ceil(n / 16), k, 16], the last panel filled up with zeros."""
    groups, n, k = matrix.shape
    full = matrix
    if n % _PANEL:
        full = matrix.new_zeros(groups, -(-n // _PANEL) * _PANEL, k)
        full[:, :n] = matrix
    return full.reshape(groups, -1, _PANEL, k).transpose(2, 3).contiguous()


def _filters(weight: torch.Tensor, group: int, planar: bool) -> torch.Tensor:
    """[F, C, H, W] in panels; k in the order (y, x, channel), or if `planar` (channel, y, x)."""
    rows = weight if planar else weight.permute(0, 2, 3, 1)
    return in_panels(rows.reshape(group, weight.shape[0] // group, -1))


def winograd_filters(weight: torch.Tensor, tile: int) -> torch.Tensor:
    """[F, C, 3, 3] transformed for Winograd's F(tile x tile, 3 x 3), in panels: [(tile + 2)², F / 16, C, 16]."""
    points = _POINTS[tile]
    rows = []
    for point in points:
        scale = 1.0
        for other in points:
            scale *= point - other if other != point else 1.0
        rows.append([1 / scale, point / scale, point * point / scale])
    rows.append([0.0, 0.0, 1.0])
    g = torch.tensor(rows, dtype=torch.float64)
    spread = (torch.kron(g, g) @ weight.reshape(-1, 9).T.double()).float()
    return in_panels(spread.reshape(-1, *weight.shape[:2]))


def _padded_bias(bias: torch.Tensor, group: int) -> torch.Tensor:
    """[F] to [groups, whole panels]."""
    return in_panels(bias.reshape(group, -1, 1)).reshape(group, -1)


def _image(tape: Recorder, x: Tensor) -> Tensor:
    """x if its channels are neighbours, else a copy."""
    return x if x.strides[1] == 1 or x.shape[1] == 1 else tape.channels_last(x)


def _place(which: str, x: Tensor) -> dict[str, int]:
    """The strides of an image among a kernel's arguments."""
    return {f"{which}_pixel": x.strides[3], f"{which}_row": x.strides[2], f"{which}_image": x.strides[0]}


def _step(
    tape: Recorder, kernel: str, conv: _Conv, x: Tensor, y: Tensor, weight: Tensor, residual: Tensor | None
) -> None:
    bias = None
    if conv.bias is not None:
        data, group = conv.bias.data, 1 if kernel == "depthwise" else conv.group
        make: Callable[[], torch.Tensor] = lambda: _padded_bias(data, group)  # noqa: E731
        bias = tape.constant(conv.bias, f"panels:{group}", make)
    args = ConvArgs(
        images=x.shape[0],
        groups=conv.group,
        channels=conv.channels,
        filters=conv.filters // conv.group,
        height=x.shape[2],
        width=x.shape[3],
        out_height=y.shape[2],
        out_width=y.shape[3],
        kernel_h=conv.kernel[0],
        kernel_w=conv.kernel[1],
        stride_h=conv.strides[0],
        stride_w=conv.strides[1],
        dilation_h=conv.dilations[0],
        dilation_w=conv.dilations[1],
        pad_top=conv.pads[0],
        pad_left=conv.pads[1],
        x_channel=1 if x.shape[1] == 1 else x.strides[1],
        activation=conv.activation,
        dtype=x.number,
        **_place("x", x),
        **_place("out", y),
        **(_place("residual", residual) if residual is not None else {}),
    )
    in_place = []
    if residual is not None and residual.buffer is not x.buffer:
        in_place = [(residual, y)]
    pointers = {"x": x, "weight": weight, "bias": bias, "residual": residual, "out": y}
    tape.step(kernel, args, pointers, in_place=in_place)


def _residual(tape: Recorder, node: Node) -> tuple[bool, Tensor | None]:
    """Whether the kernels can add what the node adds, and that."""
    if node.input(3) is None:
        return True, None
    residual = tape.real_tensor(node.input(3))
    if residual is None or residual.shape != node.output.static_shape:
        return False, None
    return True, _image(tape, residual)


def _add(tape: Recorder, node: Node, kernel: str, layout: str, make: Callable[[_Conv], torch.Tensor]) -> bool:
    """The node's step, on an image with its channels innermost."""
    found = _conv_of(tape, node, narrow=kernel == "depthwise")
    fits, residual = _residual(tape, node)
    if found is None or not fits:
        return False
    x, conv = found
    weight = tape.constant(conv.weight, layout, lambda: make(conv))
    y = tape.image_output(node.output)
    if y.dtype is not x.dtype or (residual is not None and residual.dtype is not x.dtype):
        return False
    _step(tape, kernel, conv, _image(tape, x), y, weight, residual)
    return True


@native("FusedConv", "depthwise")
@native("Conv", "depthwise")
def depthwise(tape: Recorder, node: Node) -> bool:
    """Each channel by itself."""
    found = _conv_of(tape, node, narrow=True)
    if found is None or found[1].channels != 1 or found[1].filters != found[1].group or found[1].group == 1:
        return False

    def make(conv: _Conv) -> torch.Tensor:
        return in_panels(conv.weight.data.flatten(1)[None])

    return _add(tape, node, "depthwise", "depthwise", make)


def _winograd(tape: Recorder, node: Node, tile: int, least: int) -> bool:
    """For kernels of 3 x 3 in steps of one; fewer than `least` tiles do not pay for reading the larger weight."""
    found = _conv_of(tape, node)
    shape = node.output.static_shape
    if found is None or shape is None:
        return False
    conv = found[1]
    plain = conv.kernel == (3, 3) and conv.strides == (1, 1) and conv.dilations == (1, 1) and conv.group == 1
    if not plain or conv.channels % _PANEL or conv.filters % _PANEL:
        return False
    if shape[0] * -(-shape[2] // tile) * -(-shape[3] // tile) < least:
        return False
    layout = f"winograd{tile}"
    return _add(tape, node, layout, layout, lambda conv: winograd_filters(conv.weight.data, tile))


@native("FusedConv", "winograd4")
@native("Conv", "winograd4")
def winograd4(tape: Recorder, node: Node) -> bool:
    """A quarter of the multiplications. Rounding errors are those of a plain sum (docs/performance.md)."""
    return _winograd(tape, node, 4, 12)


@native("FusedConv", "winograd2")
@native("Conv", "winograd2")
def winograd2(tape: Recorder, node: Node) -> bool:
    """Less than half of the multiplications."""
    return _winograd(tape, node, 2, 12)


@native("FusedConv", "direct")
@native("Conv", "direct")
def direct(tape: Recorder, node: Node) -> bool:
    """A matrix product that reads the image where it lies; pointwise convolutions as well."""
    found = _conv_of(tape, node)
    if found is None:
        return False
    x, conv = found
    planar = conv.group == 1 and conv.dilations[1] == 1 and x.strides[3] == 1
    if not planar or x.strides[1] == 1 or conv.channels >= _FEW_CHANNELS:
        return _add(
            tape, node, "conv", f"conv:{conv.group}", lambda conv: _filters(conv.weight.data, conv.group, False)
        )
    fits, residual = _residual(tape, node)
    if not fits:
        return False
    weight = tape.constant(conv.weight, "conv:planar", lambda: _filters(conv.weight.data, 1, True))
    y = tape.image_output(node.output)
    if y.dtype is not x.dtype or (residual is not None and residual.dtype is not x.dtype):
        return False
    _step(tape, "conv", conv, x, y, weight, residual)
    return True


@dataclass(frozen=True)
class _Phase:
    """Every `stride`-th output of a transposed convolution along one axis: a plain convolution of its own."""

    first: int
    count: int
    taps: tuple[int, ...]
    """Elements of the kernel, in the order in which the plain convolution has them."""
    pad: int


def _phases(size: int, kernel: int, stride: int, pad: int) -> list[_Phase]:
    """Output o sums x[(o + pad - k) / stride] * w[k] over all k for which that is whole."""
    phases = []
    for first in range(min(stride, size)):
        remainder = (first + pad) % stride
        taps = tuple(range(remainder, kernel, stride))[::-1]
        shift = (first + pad - remainder) // stride
        phases.append(_Phase(first, -(-(size - first) // stride), taps, len(taps) - 1 - shift))
    return phases


@native("ConvTranspose")
def transposed(tape: Recorder, node: Node) -> bool:
    """As many plain convolutions as the strides have places, each of which writes every so many pixels."""
    x, shape, a = tape.float_tensor(node.inputs[0]), node.output.static_shape, node.attributes
    if x is None or shape is None or not _constants(node, tape) or 0 in x.shape:
        return False
    if (
        a.get("auto_pad", "NOTSET") != "NOTSET"
        or a.get("output_shape")
        or any(d != 1 for d in a.get("dilations") or [])
    ):
        return False
    pads, strides, group = a.get("pads") or [0] * 4, a.get("strides") or [1, 1], a.get("group", 1)
    weight: Any = node.inputs[1]
    data = weight.data  # [channels, filters of a group, height, width]
    if min(pads) < 0 or x.shape[1] != data.shape[0]:
        return False
    y = tape.image_output(node.output)
    filters, channels = data.shape[1] * group, data.shape[0] // group
    base = _Conv(weight, node.input(2), filters, channels, (1, 1), (1, 1), (1, 1), (0, 0), group, 0)
    x = _image(tape, x)
    for above in _phases(shape[2], data.shape[2], strides[0], pads[0]):
        for left in _phases(shape[3], data.shape[3], strides[1], pads[1]):
            part = y.slice(2, above.first, above.count, strides[0]).slice(3, left.first, left.count, strides[1])
            # Without a tap, what is left is a kernel of one zero.
            kernel = (max(len(above.taps), 1), max(len(left.taps), 1))

            def make(above: _Phase = above, left: _Phase = left, kernel: tuple[int, int] = kernel) -> torch.Tensor:
                return _filters(_phase_weight(data, group, above.taps, left.taps, kernel), group, False)

            packed = tape.constant(weight, f"transposed:{group}:{above.taps}:{left.taps}", make)
            pad = (above.pad if above.taps else 0, left.pad if left.taps else 0)
            _step(tape, "conv", replace(base, kernel=kernel, pads=pad), x, part, packed, None)
    return True


def _phase_weight(
    data: torch.Tensor, group: int, rows: tuple[int, ...], columns: tuple[int, ...], kernel: tuple[int, int]
) -> torch.Tensor:
    """Elements (rows, columns) of a transposed convolution's weight, as a plain one's: [filters, channels, …]."""
    if not rows or not columns:
        return data.new_zeros(data.shape[1] * group, data.shape[0] // group, *kernel)
    taken = data[:, :, list(rows)][:, :, :, list(columns)]
    grouped = taken.reshape(group, -1, *taken.shape[1:]).transpose(1, 2)
    return grouped.reshape(-1, *grouped.shape[2:])
