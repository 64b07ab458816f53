"""Old forms of operators, brought to the newest one. A converter changes the node in place; most are one line."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trine.graph.dtypes import DType, to_onnx
from trine.graph.importer.node import RawNode
from trine.graph.ir import Graph, Value, constant

Converter = Callable[[RawNode], None]
CONVERTERS: dict[str, list[Converter]] = {}


def converts(*ops: str) -> Callable[[Converter], Converter]:
    """Register a converter for operators; it looks at the version itself."""

    def register(function: Converter) -> Converter:
        for op in ops:
            CONVERTERS.setdefault(op, []).append(function)
        return function

    return register


def modernise(node: RawNode) -> None:
    """Bring `node` to the newest form. UnsupportedOperatorError for what has no such form."""
    if node.version < 6:
        node.attributes.pop("consumed_inputs", None)  # a hint to run in place
    for convert in CONVERTERS.get(node.op, ()):
        convert(node)


@converts("Squeeze", "Unsqueeze", "ReduceSum")
def _axes_before_13(node: RawNode) -> None:
    if node.version < 13:
        node.attribute_to_input("axes", 1)


@converts(
    "ReduceMean", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceSumSquare",
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
)  # fmt: skip
def _axes_before_18(node: RawNode) -> None:
    if node.version < 18:
        node.attribute_to_input("axes", 1)


@converts("Reshape")
def _reshape(node: RawNode) -> None:
    if node.version < 5:
        node.attribute_to_input("shape", 1)


@converts("TopK")
def _top_k(node: RawNode) -> None:
    if node.version < 10:
        node.attribute_to_input("k", 1)


@converts("Split")
def _split(node: RawNode) -> None:
    if node.version < 13:
        node.attribute_to_input("split", 1)


@converts("Slice")
def _slice(node: RawNode) -> None:
    if node.version < 10:
        for index, attribute in enumerate(("starts", "ends", "axes"), 1):
            node.attribute_to_input(attribute, index)


@converts("Clip")
def _clip(node: RawNode) -> None:
    if node.version < 11:
        for index, attribute in enumerate(("min", "max"), 1):
            node.attribute_to_input(attribute, index, node.dtype_of(0).torch)


@converts("Pad")
def _pad(node: RawNode) -> None:
    if node.version < 2 and "paddings" in node.attributes:
        node.attributes["pads"] = node.attributes.pop("paddings")
    if node.version < 11:
        node.attribute_to_input("pads", 1)
        node.attribute_to_input("value", 2, node.dtype_of(0).torch)


@converts("DFT")
def _dft(node: RawNode) -> None:
    if node.version < 20:
        node.attributes.setdefault("axis", 1)
        node.attribute_to_input("axis", 2)


@converts("Dropout")
def _dropout(node: RawNode) -> None:
    """Before 12 a model said nothing about training when it ran."""
    if node.version < 12:
        if node.version < 7 and not node.attributes.get("is_test", 0) and node.outputs > 1:
            raise node.unsupported("of operator set 6 in training mode is not supported: export for inference")
        for attribute in ("ratio", "is_test"):
            node.attributes.pop(attribute, None)


@converts("BatchNormalization")
def _batch_normalization(node: RawNode) -> None:
    if node.version < 14 and node.outputs > 1:
        raise node.unsupported("in training mode is not supported before operator set 14: export for inference")
    if node.version < 9 and node.attributes.pop("spatial", 1) == 0:
        raise node.unsupported("with spatial=0 is not supported: use spatial=1")
    if node.version < 7:
        node.attributes.pop("is_test", None)


@converts("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Greater", "Less", "Equal")
def _limited_broadcast(node: RawNode) -> None:
    """Before 7 the second operand was broadcast, on demand, from an axis of the first."""
    if node.version >= 7:
        return
    wanted = node.attributes.pop("broadcast", 0)
    axis = node.attributes.pop("axis", None)
    if not wanted or axis is None:
        return
    rank, own = node.rank_of(0), node.rank_of(1)
    missing = rank - (axis % rank) - own
    if missing > 0:
        axes = constant(f"{node.name}.axes", torch.arange(own, own + missing))
        node.inputs[1] = node.emit("Unsqueeze", [node.inputs[1], axes], {})


@converts("PRelu")
def _prelu(node: RawNode) -> None:
    """Before 7 the slope was a number, or one a channel."""
    if node.version < 7 and node.rank_of(1) == 1 and node.required(1).shape != (1,) and node.rank_of(0) > 2:
        axes = constant(f"{node.name}.axes", torch.arange(1, node.rank_of(0) - 1))
        node.inputs[1] = node.emit("Unsqueeze", [node.inputs[1], axes], {})


@converts("Gemm")
def _gemm(node: RawNode) -> None:
    if node.version < 7:
        node.attributes.pop("broadcast", None)


@converts("Softmax", "LogSoftmax", "Hardmax")
def _softmax(node: RawNode) -> None:
    """Before 13 the input was taken as a matrix, cut at `axis`."""
    if node.version >= 13:
        return
    axis = node.attributes.pop("axis", 1)
    x = node.required(0)
    if x.rank is not None and axis % x.rank == x.rank - 1:
        node.attributes["axis"] = -1
        return
    shape = node.emit("Shape", [x], {})
    flat = node.emit("Flatten", [x], {"axis": axis})
    rows = node.emit(node.op, [flat], {"axis": -1})
    node.op, node.inputs = "Reshape", [rows, shape]
    node.attributes["allowzero"] = 1


@converts("Concat")
def _concat(node: RawNode) -> None:
    if node.version < 4:
        node.attributes.setdefault("axis", 1)


@converts("Selu")
def _selu(node: RawNode) -> None:
    if node.version < 6:
        node.attributes.setdefault("alpha", 1.6732)
        node.attributes.setdefault("gamma", 1.0507)


@converts("Cast")
def _cast(node: RawNode) -> None:
    to = node.attributes.get("to")
    if isinstance(to, str):
        from onnx import TensorProto

        if to not in TensorProto.DataType.keys():  # noqa: SIM118
            raise node.unsupported(f"to {to!r} is not supported")
        node.attributes["to"] = TensorProto.DataType.Value(to)


@converts("CastLike")
def _cast_like(node: RawNode) -> None:
    """A Cast, since types are known when a model is imported."""
    node.attributes["to"] = to_onnx(node.dtype_of(1))
    node.op, node.inputs = "Cast", node.inputs[:1]


@converts("Upsample", "Resize")
def _resize(node: RawNode) -> None:
    """Upsample, and Resize before 11: by scales, from the origin, to the element on the left."""
    if node.op == "Resize" and node.version >= 11:
        return
    if node.op == "Upsample" and node.version < 9:
        if "scales" not in node.attributes and "height_scale" in node.attributes:
            scales = [1.0, 1.0, node.attributes.pop("height_scale"), node.attributes.pop("width_scale")]
            node.attributes["scales"] = scales
        node.attribute_to_input("scales", 1, torch.float32)
    mode = node.attributes.get("mode", "nearest")
    node.attributes["mode"] = {"bilinear": "linear"}.get(mode, mode)
    node.attributes |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    node.op, node.inputs = "Resize", [node.required(0), None, node.required(1)]


@converts("Scatter")
def _scatter(node: RawNode) -> None:
    node.op = "ScatterElements"


@converts("Tile")
def _tile(node: RawNode) -> None:
    """The first version repeats along one axis."""
    if node.version >= 6:
        return
    tiles, axis = node.required(1), node.required(2)
    if not (tiles.is_constant and axis.is_constant):
        raise node.unsupported("of operator set 1 needs constant tiles and axis")
    repeats = torch.ones(node.rank_of(0), dtype=torch.int64)
    repeats[int(axis.data)] = int(tiles.data)
    node.inputs = [node.inputs[0], constant(f"{node.name}.repeats", repeats)]


@converts("Scan")
def _scan(node: RawNode) -> None:
    """The first version has a batch axis, and lengths as its first input."""
    if node.version < 9:
        node.attributes["batched"] = 1
        if "directions" in node.attributes:
            node.attributes["scan_input_directions"] = node.attributes.pop("directions")


@converts("RNN", "LSTM", "GRU")
def _recurrent(node: RawNode) -> None:
    if node.version < 7:
        node.attributes.pop("output_sequence", None)


@converts("RoiAlign")
def _roi_align(node: RawNode) -> None:
    if node.version < 16:
        node.attributes["coordinate_transformation_mode"] = "output_half_pixel"


@converts("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike")
def _random(node: RawNode) -> None:
    node.attributes["normal"] = int("Normal" in node.op)


@converts("Optional")
def _optional(node: RawNode) -> None:
    node.attributes.pop("type", None)


@converts("QuantizeLinear")
def _quantize(node: RawNode) -> None:
    """Four-bit types are stored in bytes: the node must say which it means."""
    zero: Value | None = node.input(2)
    if zero is not None and zero.dtype in (DType.INT4, DType.UINT4):
        node.attributes["output_dtype"] = to_onnx(zero.dtype)


@converts("Loop")
def _loop(node: RawNode) -> None:
    """What the scanned outputs are when the body never runs."""
    body = node.attributes.get("body")
    if not isinstance(body, Graph):
        return
    scanned = body.outputs[len(node.inputs) - 1 :]
    shapes = [(value.dtype, value.static_shape) for value in scanned]
    if scanned and all(dtype is not None and shape is not None for dtype, shape in shapes):
        node.attributes["scan_shapes"] = [
            [to_onnx(dtype), *shape] for dtype, shape in shapes if dtype and shape is not None
        ]
