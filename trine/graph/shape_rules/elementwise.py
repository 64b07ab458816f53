"""Operators that work element by element, and those that keep their input's shape."""

from __future__ import annotations

from math import prod

from trine.graph.dtypes import DType, from_onnx
from trine.graph.ir import Node
from trine.graph.shape_rules.common import (
    Context,
    Facts,
    axis_of,
    broadcast_all,
    first,
    present,
    refuse,
    rule,
    same_types,
)


@rule("Add Sub Mul Div Mod Max Min Sum Mean BitwiseAnd BitwiseOr BitwiseXor PRelu BitShift")
def _arithmetic(node: Node, context: Context) -> Facts:
    values = present(node)
    dtype = same_types(node, values)
    if dtype in (DType.BOOL, DType.STRING):
        raise refuse(node, f"does not take {dtype}")
    return [(dtype, broadcast_all(node, values))]


@rule("Pow")
def _pow(node: Node, context: Context) -> Facts:
    return [(first(node).dtype, broadcast_all(node, present(node)))]


@rule("Greater Less GreaterOrEqual LessOrEqual Equal And Or Xor")
def _comparison(node: Node, context: Context) -> Facts:
    same_types(node, present(node))
    return [(DType.BOOL, broadcast_all(node, present(node)))]


@rule("Where")
def _where(node: Node, context: Context) -> Facts:
    values = present(node)
    if values[0].dtype not in (DType.BOOL, None):
        raise refuse(node, f"has a condition of {values[0].dtype}, not bool")
    return [(same_types(node, values[1:]), broadcast_all(node, values))]


_FLOAT_ONLY = (
    "Acos Acosh Asin Asinh Atan Atanh Cos Cosh Exp Log Sigmoid Sin Sinh Sqrt Tan Tanh Floor Ceil Round "
    "Softplus Softsign HardSwish Mish LeakyRelu Elu Celu Selu HardSigmoid ThresholdedRelu Gelu Swish Reciprocal "
    "Softmax LogSoftmax Hardmax LpNormalization LRN MeanVarianceNormalization InstanceNormalization "
    "GroupNormalization BatchNormalization LayerNormalization RMSNormalization"
)


@rule(_FLOAT_ONLY)
def _float_unary(node: Node, context: Context) -> Facts:
    x = first(node)
    if x.dtype is not None and not x.dtype.is_float:
        raise refuse(node, f"does not take {x.dtype}")
    return [(x.dtype, x.shape)]


_SAME_AS_FIRST = (
    "Abs Neg Sign Erf Relu BitwiseNot Clip Shrink Identity CumSum CumProd Trilu ReverseSequence ScatterElements "
    "ScatterND TensorScatter"
)


@rule(_SAME_AS_FIRST)
def _unary(node: Node, context: Context) -> Facts:
    return [(first(node).dtype, first(node).shape)]


@rule("Dropout")
def _dropout(node: Node, context: Context) -> Facts:
    return [(first(node).dtype, first(node).shape), (DType.BOOL, first(node).shape)]


@rule("Not IsNaN IsInf")
def _to_bool(node: Node, context: Context) -> Facts:
    return [(DType.BOOL, first(node).shape)]


@rule("Cast BitCast")
def _cast(node: Node, context: Context) -> Facts:
    dtype = from_onnx(node.attributes["to"])
    if dtype is None:
        raise refuse(node, f"to ONNX type {node.attributes['to']} is not supported")
    return [(dtype, first(node).shape)]


def _check_scale(node: Node) -> None:
    """That a scale for each place of an axis, and its zero points, are as many as the axis has."""
    x, scale, zero = first(node), node.input(1), node.input(2)
    sizes = [
        prod(value.static_shape) for value in (scale, zero) if value is not None and value.static_shape is not None
    ]
    if len(set(sizes)) > 1:
        raise refuse(node, f"has {sizes[0]} scales and {sizes[1]} zero points")
    if scale is None or scale.rank != 1 or scale.static_shape == (1,) or x.shape is None:
        return
    if not node.attributes.get("block_size", 0):
        length = x.shape[axis_of(node, len(x.shape), 1)]
        if isinstance(length, int) and scale.static_shape not in (None, (length,)):
            raise refuse(node, f"has {list(scale.shape or ())} scales for an axis of {length}")


@rule("QuantizeLinear")
def _quantize(node: Node, context: Context) -> Facts:
    _check_scale(node)
    zero = node.input(2)
    given = node.attributes.get("output_dtype", 0)
    return [(from_onnx(given) if given else DType.UINT8 if zero is None else zero.dtype, first(node).shape)]


@rule("DequantizeLinear")
def _dequantize(node: Node, context: Context) -> Facts:
    _check_scale(node)
    scale = node.input(1)
    given = node.attributes.get("output_dtype", 0)
    return [(from_onnx(given) if given else None if scale is None else scale.dtype, first(node).shape)]


@rule("DynamicQuantizeLinear")
def _dynamic_quantize(node: Node, context: Context) -> Facts:
    return [(DType.UINT8, first(node).shape), (DType.FLOAT32, ()), (DType.UINT8, ())]
