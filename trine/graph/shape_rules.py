"""One rule an operator: the dtype and shape of its outputs from those of its inputs.

A rule also refuses what the operator does not take (operands of different types, shapes that can't be broadcast): the
mistake is named when a model is built, not when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from trine.graph.dims import add, broadcast, divide, floor_divide, multiply, unknown, window
from trine.graph.dtypes import DType, from_onnx
from trine.graph.errors import UnsupportedOperatorError
from trine.graph.ir import Dim, Graph, Node, Shape, Value

Fact: TypeAlias = tuple[DType | None, Shape | None]
Facts: TypeAlias = list[Fact]


class Context(Protocol):
    """What a rule may ask."""

    def elements(self, value: Value | None) -> tuple[Dim, ...] | None:
        """The contents of a small integer vector (or scalar), if known."""


Rule = Callable[[Node, Context], Facts]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = function
        return function

    return register


def refuse(node: Node, reason: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(node.op, node.name, reason)


def _x(node: Node) -> Value:
    x = node.input(0)
    if x is None:
        raise refuse(node, "needs its first input")
    return x


def _axis(node: Node, rank: int, default: int) -> int:
    axis: int = node.attributes.get("axis", default)
    if not -rank <= axis < rank:
        raise refuse(node, f"has axis {axis}, but its input has {rank} dimensions")
    return axis % rank


def _same_types(node: Node, values: list[Value]) -> DType | None:
    kinds = [value.dtype for value in values if value.dtype is not None]
    if len(set(kinds)) > 1:
        raise refuse(node, f"has operands of types {kinds[0]} and {next(k for k in kinds if k is not kinds[0])}")
    return kinds[0] if kinds else None


def _broadcast(node: Node, values: list[Value]) -> Shape | None:
    shape: Shape = ()
    for value in values:
        if value.shape is None:
            return None
        joined = broadcast(shape, value.shape)
        if joined is None:
            raise refuse(node, f"can't broadcast {' and '.join(str(list(v.shape or ())) for v in values)}")
        shape = joined
    return shape


def _present(node: Node) -> list[Value]:
    return [value for value in node.inputs if value is not None]


@rule("Add Sub Mul Div Mod Max Min Sum Mean BitwiseAnd BitwiseOr BitwiseXor PRelu BitShift")
def _arithmetic(node: Node, context: Context) -> Facts:
    values = _present(node)
    dtype = _same_types(node, values)
    if dtype in (DType.BOOL, DType.STRING):
        raise refuse(node, f"does not take {dtype}")
    return [(dtype, _broadcast(node, values))]


@rule("Pow")
def _pow(node: Node, context: Context) -> Facts:
    return [(_x(node).dtype, _broadcast(node, _present(node)))]


@rule("Greater Less GreaterOrEqual LessOrEqual Equal And Or Xor")
def _comparison(node: Node, context: Context) -> Facts:
    _same_types(node, _present(node))
    return [(DType.BOOL, _broadcast(node, _present(node)))]


@rule("Where")
def _where(node: Node, context: Context) -> Facts:
    values = _present(node)
    if values[0].dtype not in (DType.BOOL, None):
        raise refuse(node, f"has a condition of {values[0].dtype}, not bool")
    return [(_same_types(node, values[1:]), _broadcast(node, values))]


_FLOAT_ONLY = (
    "Acos Acosh Asin Asinh Atan Atanh Cos Cosh Exp Log Sigmoid Sin Sinh Sqrt Tan Tanh Floor Ceil Round "
    "Softplus Softsign HardSwish Mish LeakyRelu Elu Celu Selu HardSigmoid ThresholdedRelu Gelu Swish Reciprocal "
    "Softmax LogSoftmax Hardmax LpNormalization LRN MeanVarianceNormalization InstanceNormalization "
    "GroupNormalization BatchNormalization LayerNormalization RMSNormalization"
)


@rule(_FLOAT_ONLY)
def _float_unary(node: Node, context: Context) -> Facts:
    x = _x(node)
    if x.dtype is not None and not x.dtype.is_float:
        raise refuse(node, f"does not take {x.dtype}")
    return [(x.dtype, x.shape)]


_SAME_AS_FIRST = (
    "Abs Neg Sign Erf Relu BitwiseNot Clip Shrink Identity CumSum CumProd Trilu ReverseSequence ScatterElements "
    "ScatterND TensorScatter"
)


@rule(_SAME_AS_FIRST)
def _unary(node: Node, context: Context) -> Facts:
    return [(_x(node).dtype, _x(node).shape)]


@rule("Dropout")
def _dropout(node: Node, context: Context) -> Facts:
    return [(_x(node).dtype, _x(node).shape), (DType.BOOL, _x(node).shape)]


@rule("Not IsNaN IsInf")
def _to_bool(node: Node, context: Context) -> Facts:
    return [(DType.BOOL, _x(node).shape)]


@rule("Cast BitCast")
def _cast(node: Node, context: Context) -> Facts:
    dtype = from_onnx(node.attributes["to"])
    if dtype is None:
        raise refuse(node, f"to ONNX type {node.attributes['to']} is not supported")
    return [(dtype, _x(node).shape)]


@rule("QuantizeLinear")
def _quantize(node: Node, context: Context) -> Facts:
    zero = node.input(2)
    given = node.attributes.get("output_dtype", 0)
    return [(from_onnx(given) if given else DType.UINT8 if zero is None else zero.dtype, _x(node).shape)]


@rule("DequantizeLinear")
def _dequantize(node: Node, context: Context) -> Facts:
    scale = node.input(1)
    given = node.attributes.get("output_dtype", 0)
    return [(from_onnx(given) if given else None if scale is None else scale.dtype, _x(node).shape)]


@rule("DynamicQuantizeLinear")
def _dynamic_quantize(node: Node, context: Context) -> Facts:
    return [(DType.UINT8, _x(node).shape), (DType.FLOAT32, ()), (DType.UINT8, ())]


@rule("Shape")
def _shape(node: Node, context: Context) -> Facts:
    rank = _x(node).rank
    if rank is None:
        return [(DType.INT64, (unknown(),))]
    start, end = node.attributes.get("start", 0), node.attributes.get("end")
    return [(DType.INT64, (len(range(rank)[slice(start, end)]),))]


@rule("Size")
def _size(node: Node, context: Context) -> Facts:
    return [(DType.INT64, ())]


@rule("Reshape")
def _reshape(node: Node, context: Context) -> Facts:
    x = _x(node)
    wanted = context.elements(node.input(1))
    if wanted is not None:
        return [(x.dtype, _reshaped(node, x.shape, wanted, bool(node.attributes.get("allowzero", 0))))]
    target = node.input(1)
    length = None if target is None or target.static_shape is None else target.static_shape
    return [(x.dtype, tuple(unknown() for _ in range(length[0])) if length else None)]


def _reshaped(node: Node, shape: Shape | None, wanted: tuple[Dim, ...], allowzero: bool) -> Shape:
    dims = list(wanted)
    if not allowzero:
        for i, dim in enumerate(dims):
            if dim == 0:
                dims[i] = shape[i] if shape is not None and i < len(shape) else unknown()
    if -1 in dims:
        place = dims.index(-1)
        rest = dims[:place] + dims[place + 1 :]
        exact = None if shape is None else divide(multiply(*shape), multiply(*rest))
        dims[place] = unknown() if exact is None else exact
    before, after = None if shape is None else multiply(*shape), multiply(*dims)
    if isinstance(before, int) and isinstance(after, int) and before != after:
        raise refuse(node, f"can't reshape {list(shape or ())} to {list(wanted)}")
    return tuple(dims)


@rule("Flatten")
def _flatten(node: Node, context: Context) -> Facts:
    x = _x(node)
    if x.shape is None:
        return [(x.dtype, (unknown(), unknown()))]
    axis = node.attributes.get("axis", 1)
    axis = axis + len(x.shape) if axis < 0 else axis
    return [(x.dtype, (multiply(*x.shape[:axis]), multiply(*x.shape[axis:])))]


@rule("Squeeze")
def _squeeze(node: Node, context: Context) -> Facts:
    x, axes = _x(node), context.elements(node.input(1))
    if x.shape is None or (node.input(1) is not None and axes is None):
        return [(x.dtype, None)]
    if axes is None:
        return [(x.dtype, None if x.static_shape is None else tuple(dim for dim in x.shape if dim != 1))]
    gone = {axis % len(x.shape) for axis in axes if isinstance(axis, int)}
    return [(x.dtype, tuple(dim for i, dim in enumerate(x.shape) if i not in gone))]


@rule("Unsqueeze")
def _unsqueeze(node: Node, context: Context) -> Facts:
    x, axes = _x(node), context.elements(node.input(1))
    if x.shape is None or axes is None:
        return [(x.dtype, None)]
    rank = len(x.shape) + len(axes)
    new = {axis % rank for axis in axes if isinstance(axis, int)}
    if len(new) != len(axes):
        raise refuse(node, f"inserts the axes {list(axes)}, of which two are the same")
    old = iter(x.shape)
    return [(x.dtype, tuple(1 if i in new else next(old) for i in range(rank)))]


@rule("Transpose")
def _transpose(node: Node, context: Context) -> Facts:
    x = _x(node)
    if x.shape is None:
        return [(x.dtype, None)]
    perm = node.attributes.get("perm", list(reversed(range(len(x.shape)))))
    if sorted(perm) != list(range(len(x.shape))):
        raise refuse(node, f"has perm {perm}, which does not permute {len(x.shape)} dimensions")
    return [(x.dtype, tuple(x.shape[axis] for axis in perm))]


@rule("Concat")
def _concat(node: Node, context: Context) -> Facts:
    values = _present(node)
    dtype = _same_types(node, values)
    shapes = [value.shape for value in values]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return [(dtype, None)]
    if any(len(shape) != len(known[0]) for shape in known):
        raise refuse(node, f"joins tensors with {sorted({len(s) for s in known})} dimensions")
    axis = _axis(node, len(known[0]), 0)
    dims = [_agreed(node, [shape[i] for shape in known]) for i in range(len(known[0]))]
    length: Dim = 0
    for shape in known:
        length = add(length, shape[axis])
    for i, dim in enumerate(dims):
        if dim is None and i != axis:
            raise refuse(node, f"joins tensors of shapes {' and '.join(str(list(s)) for s in known)}")
    return [(dtype, tuple(length if i == axis else dims[i] or 0 for i in range(len(dims))))]


def _agreed(node: Node, dims: list[Dim]) -> Dim | None:
    numbers = {dim for dim in dims if isinstance(dim, int)}
    if len(numbers) > 1:
        return None
    return numbers.pop() if numbers else dims[0]


@rule("Split")
def _split(node: Node, context: Context) -> Facts:
    x, count = _x(node), len(node.outputs)
    if x.shape is None:
        return [(x.dtype, None)] * count
    axis = _axis(node, len(x.shape), 0)
    length = x.shape[axis]
    sizes = context.elements(node.input(1))
    if sizes is None and node.input(1) is None and isinstance(length, int):
        pieces = node.attributes.get("num_outputs", count)
        part = -(-length // pieces)
        sizes = tuple(max(min(part, length - i * part), 0) for i in range(pieces))
    if sizes is not None and isinstance(length, int) and all(isinstance(s, int) for s in sizes):
        total = sum(s for s in sizes if isinstance(s, int))
        if total != length or len(sizes) < count:
            raise refuse(node, f"splits {length} elements into {list(sizes)}")
    dims = [unknown() for _ in range(count)] if sizes is None else list(sizes[:count])
    return [(x.dtype, (*x.shape[:axis], dim, *x.shape[axis + 1 :])) for dim in dims]


@rule("Slice")
def _slice(node: Node, context: Context) -> Facts:
    x = _x(node)
    if x.shape is None:
        return [(x.dtype, None)]
    starts, ends, axes, steps = (context.elements(node.input(i)) for i in range(1, 5))
    if node.input(3) is None and starts is not None:
        axes = tuple(range(len(starts)))
    if node.input(4) is None and starts is not None:
        steps = (1,) * len(starts)
    if axes is None or not all(isinstance(axis, int) for axis in axes):
        return [(x.dtype, tuple(unknown() for _ in x.shape))]
    dims = list(x.shape)
    for i, axis in enumerate(axes):
        assert isinstance(axis, int)
        place = axis % len(dims)
        dims[place] = _slice_length(
            dims[place], *((None if part is None else part[i]) for part in (starts, ends, steps))
        )
    return [(x.dtype, tuple(dims))]


def _slice_length(length: Dim, start: Dim | None, end: Dim | None, step: Dim | None) -> Dim:
    if start == 0 and step == 1 and end is not None:
        if isinstance(end, int) and end >= 2**31 - 1:
            return length
        if end == length:
            return length
        if isinstance(end, str) and isinstance(length, int):
            return unknown()
    if isinstance(length, int) and isinstance(start, int) and isinstance(end, int) and isinstance(step, int) and step:
        return len(range(*slice(start, end, step).indices(length)))
    return unknown()


@rule("Expand")
def _expand(node: Node, context: Context) -> Facts:
    x, wanted = _x(node), context.elements(node.input(1))
    if x.shape is None or wanted is None:
        return [(x.dtype, None)]
    shape = broadcast(x.shape, wanted)
    if shape is None:
        raise refuse(node, f"can't expand {list(x.shape)} to {list(wanted)}")
    return [(x.dtype, shape)]


@rule("Tile")
def _tile(node: Node, context: Context) -> Facts:
    x, repeats = _x(node), context.elements(node.input(1))
    if x.shape is None or repeats is None:
        return [(x.dtype, None if x.shape is None else tuple(unknown() for _ in x.shape))]
    return [(x.dtype, tuple(multiply(dim, times) for dim, times in zip(x.shape, repeats, strict=True)))]


@rule("Pad")
def _pad(node: Node, context: Context) -> Facts:
    x, pads = _x(node), context.elements(node.input(1))
    if x.shape is None:
        return [(x.dtype, None)]
    axes = context.elements(node.input(3)) if node.input(3) is not None else tuple(range(len(x.shape)))
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return [(x.dtype, tuple(unknown() for _ in x.shape))]
    dims = list(x.shape)
    for i, axis in enumerate(axes):
        if isinstance(axis, int):
            place = axis % len(dims)
            dims[place] = add(add(dims[place], pads[i]), pads[i + len(axes)])
    return [(x.dtype, tuple(dims))]


@rule("Gather")
def _gather(node: Node, context: Context) -> Facts:
    x, indices = _x(node), node.input(1)
    if x.shape is None or indices is None or indices.shape is None:
        return [(x.dtype, None)]
    axis = _axis(node, len(x.shape), 0)
    return [(x.dtype, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))]


@rule("GatherElements")
def _gather_elements(node: Node, context: Context) -> Facts:
    indices = node.input(1)
    return [(_x(node).dtype, None if indices is None else indices.shape)]


@rule("GatherND")
def _gather_nd(node: Node, context: Context) -> Facts:
    x, indices = _x(node), node.input(1)
    if x.shape is None or indices is None or indices.shape is None or not isinstance(indices.shape[-1], int):
        return [(x.dtype, None)]
    depth = indices.shape[-1] + node.attributes.get("batch_dims", 0)
    return [(x.dtype, (*indices.shape[:-1], *x.shape[depth:]))]


@rule("ConstantOfShape")
def _constant_of_shape(node: Node, context: Context) -> Facts:
    from trine.graph.dtypes import FROM_TORCH

    value = node.attributes.get("value")
    wanted = context.elements(node.input(0))
    return [(DType.FLOAT32 if value is None else FROM_TORCH[value.dtype], wanted)]


@rule("Range")
def _range(node: Node, context: Context) -> Facts:
    bounds = [context.elements(value) for value in node.inputs]
    dtype = _x(node).dtype
    if any(bound is None for bound in bounds):
        return [(dtype, (unknown(),))]
    start, limit, delta = (bound[0] for bound in bounds if bound is not None)
    if delta == 1 and start == 0:
        return [(dtype, (limit,))]
    if isinstance(start, int) and isinstance(limit, int) and isinstance(delta, int) and delta:
        return [(dtype, (len(range(start, limit, delta)),))]
    return [(dtype, (unknown(),))]


@rule("EyeLike")
def _eye_like(node: Node, context: Context) -> Facts:
    given = node.attributes.get("dtype")
    return [(_x(node).dtype if given is None else from_onnx(given), _x(node).shape)]


@rule("OneHot")
def _one_hot(node: Node, context: Context) -> Facts:
    indices, depth, values = _x(node), context.elements(node.input(1)), node.input(2)
    dtype = None if values is None else values.dtype
    if indices.shape is None:
        return [(dtype, None)]
    axis = node.attributes.get("axis", -1) % (len(indices.shape) + 1)
    dim = unknown() if depth is None else depth[0]
    return [(dtype, (*indices.shape[:axis], dim, *indices.shape[axis:]))]


@rule("NonZero")
def _non_zero(node: Node, context: Context) -> Facts:
    rank = _x(node).rank
    return [(DType.INT64, (unknown() if rank is None else rank, unknown()))]


@rule(
    "ReduceSum ReduceMean ReduceProd ReduceMax ReduceMin ReduceSumSquare ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp"
)
def _reduce(node: Node, context: Context) -> Facts:
    x, axes = _x(node), context.elements(node.input(1))
    if x.shape is None:
        return [(x.dtype, None)]
    keep = node.attributes.get("keepdims", 1)
    if axes is None and node.input(1) is not None:
        return [(x.dtype, tuple(unknown() for _ in x.shape) if keep else None)]
    if not axes:
        if node.attributes.get("noop_with_empty_axes", 0):
            return [(x.dtype, x.shape)]
        axes = tuple(range(len(x.shape)))
    return [(x.dtype, _without(x.shape, axes, keep, node))]


def _without(shape: Shape, axes: tuple[Dim, ...], keep: int, node: Node) -> Shape:
    rank = len(shape)
    for axis in axes:
        if isinstance(axis, int) and not -max(rank, 1) <= axis < max(rank, 1):
            raise refuse(node, f"has axis {axis}, but its input has {rank} dimensions")
    gone = {axis % rank for axis in axes if isinstance(axis, int)} if rank else set()
    if keep:
        return tuple(1 if i in gone else dim for i, dim in enumerate(shape))
    return tuple(dim for i, dim in enumerate(shape) if i not in gone)


@rule("ArgMax ArgMin")
def _arg(node: Node, context: Context) -> Facts:
    x = _x(node)
    if x.shape is None:
        return [(DType.INT64, None)]
    axis = _axis(node, len(x.shape), 0)
    return [(DType.INT64, _without(x.shape, (axis,), node.attributes.get("keepdims", 1), node))]


@rule("TopK")
def _top_k(node: Node, context: Context) -> Facts:
    x, k = _x(node), context.elements(node.input(1))
    if x.shape is None:
        return [(x.dtype, None), (DType.INT64, None)]
    axis = _axis(node, len(x.shape), -1)
    dim = unknown() if k is None else k[0]
    shape = (*x.shape[:axis], dim, *x.shape[axis + 1 :])
    return [(x.dtype, shape), (DType.INT64, shape)]


@rule("MatMul MatMulInteger")
def _matmul(node: Node, context: Context) -> Facts:
    a, b = _x(node), node.input(1)
    if b is None:
        raise refuse(node, "needs two inputs")
    dtype = DType.INT32 if node.op == "MatMulInteger" else _same_types(node, [a, b])
    return [(dtype, matmul_shape(node, a.shape, b.shape))]


def matmul_shape(node: Node, a: Shape | None, b: Shape | None) -> Shape | None:
    if a is None or b is None:
        return None
    if not a or not b:
        raise refuse(node, "multiplies a scalar")
    left, right = (1, *a) if len(a) == 1 else a, (*b, 1) if len(b) == 1 else b
    inner = (left[-1], right[-2])
    if all(isinstance(dim, int) for dim in inner) and inner[0] != inner[1]:
        raise refuse(node, f"multiplies {list(a)} by {list(b)}")
    batch = broadcast(left[:-2], right[:-2])
    if batch is None:
        raise refuse(node, f"multiplies {list(a)} by {list(b)}")
    dims = [*batch]
    if len(a) > 1:
        dims.append(left[-2])
    if len(b) > 1:
        dims.append(right[-1])
    return tuple(dims)


@rule("Gemm")
def _gemm(node: Node, context: Context) -> Facts:
    a, b = _x(node), node.input(1)
    if b is None:
        raise refuse(node, "needs two inputs")
    dtype = _same_types(node, _present(node))
    if a.shape is None or b.shape is None:
        return [(dtype, None)]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise refuse(node, f"multiplies {list(a.shape)} by {list(b.shape)}, which are not matrices")
    left = a.shape[::-1] if node.attributes.get("transA") else a.shape
    right = b.shape[::-1] if node.attributes.get("transB") else b.shape
    shape = matmul_shape(node, left, right)
    c = node.input(2)
    if c is not None and c.shape is not None and shape is not None:
        whole = broadcast(shape, c.shape)
        if whole is None or len(whole) != 2:
            raise refuse(node, f"adds C {list(c.shape)} to a product {list(shape)}")
    return [(dtype, shape)]


@rule("Linear")
def _linear(node: Node, context: Context) -> Facts:
    x, w = _x(node), node.inputs[1]
    if x.shape is None or w is None or w.shape is None:
        return [(x.dtype, None)]
    return [(x.dtype, (*x.shape[:-1], w.shape[0]))]


@rule("ScaledDotProductAttention")
def _attention(node: Node, context: Context) -> Facts:
    q, v = _x(node), node.inputs[2]
    if q.shape is None or v is None or v.shape is None:
        return [(q.dtype, None)]
    return [(q.dtype, (*q.shape[:-1], v.shape[-1]))]


def _spatial(node: Node, x: Shape, kernel: tuple[int, ...]) -> list[Dim]:
    rank = len(x) - 2
    attributes = node.attributes
    strides = attributes.get("strides") or [1] * rank
    dilations = attributes.get("dilations") or [1] * rank
    pads = attributes.get("pads") or [0] * (2 * rank)
    auto = attributes.get("auto_pad", "NOTSET")
    if len(strides) != rank or len(dilations) != rank or len(pads) != 2 * rank or len(kernel) != rank:
        raise refuse(node, f"has attributes for another number of dimensions than its input's {rank} spatial ones")
    if min(strides, default=1) < 1 or min(dilations, default=1) < 1:
        raise refuse(node, f"has strides {strides} and dilations {dilations}: they must be positive")
    dims: list[Dim] = []
    for i in range(rank):
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            dims.append(floor_divide(add(x[2 + i], strides[i] - 1), strides[i]) if strides[i] > 1 else x[2 + i])
            continue
        padding = 0 if auto == "VALID" else pads[i] + pads[i + rank]
        dim = window(x[2 + i], kernel[i], strides[i], dilations[i], padding, bool(attributes.get("ceil_mode", 0)))
        if isinstance(dim, int) and dim < 0:
            raise refuse(node, f"has a kernel {list(kernel)} larger than its padded input {list(x)}")
        if attributes.get("ceil_mode", 0):
            size = x[2 + i]
            if isinstance(dim, int) and isinstance(size, int) and (dim - 1) * strides[i] >= size + pads[i]:
                dim -= 1
        dims.append(dim)
    return dims


@rule("Conv FusedConv ConvInteger QLinearConv")
def _conv(node: Node, context: Context) -> Facts:
    x = _x(node)
    quantized = node.op == "QLinearConv"
    w = node.input(3 if quantized else 1)
    zero = node.input(7)
    dtype = DType.INT32 if node.op == "ConvInteger" else zero.dtype if quantized and zero is not None else x.dtype
    if w is None:
        raise refuse(node, "needs a weight")
    if node.op in ("Conv", "FusedConv"):
        _same_types(node, _present(node))
    kernel = None if w.shape is None else w.shape[2:]
    if x.shape is None or kernel is None or not all(isinstance(dim, int) for dim in kernel):
        return [(dtype, None)]
    assert w.shape is not None
    if len(x.shape) != len(w.shape) or len(x.shape) < 3:
        raise refuse(node, f"has a weight {list(w.shape)} for an input {list(x.shape)}")
    group = node.attributes.get("group", 1)
    channels = multiply(w.shape[1], group)
    if isinstance(channels, int) and isinstance(x.shape[1], int) and channels != x.shape[1]:
        raise refuse(node, f"has a weight {list(w.shape)} in {group} groups for an input {list(x.shape)}")
    if isinstance(w.shape[0], int) and (group < 1 or w.shape[0] % group):
        raise refuse(node, f"has {w.shape[0]} filters in {group} groups")
    return [(dtype, (x.shape[0], w.shape[0], *_spatial(node, x.shape, tuple(d for d in kernel if isinstance(d, int)))))]


@rule("MaxPool AveragePool LpPool")
def _pool(node: Node, context: Context) -> Facts:
    x = _x(node)
    if x.shape is None:
        return [(x.dtype, None), (DType.INT64, None)]
    if len(x.shape) != len(node.attributes["kernel_shape"]) + 2:
        raise refuse(node, f"has a kernel {node.attributes['kernel_shape']} for an input {list(x.shape)}")
    shape = (*x.shape[:2], *_spatial(node, x.shape, tuple(node.attributes["kernel_shape"])))
    return [(x.dtype, shape), (DType.INT64, shape)]


@rule("GlobalAveragePool GlobalMaxPool GlobalLpPool")
def _global_pool(node: Node, context: Context) -> Facts:
    x = _x(node)
    return [(x.dtype, None if x.shape is None else (*x.shape[:2], *[1] * (len(x.shape) - 2)))]


@rule("ConvTranspose")
def _conv_transpose(node: Node, context: Context) -> Facts:
    x, w = _x(node), node.input(1)
    if x.shape is None or w is None or w.static_shape is None:
        return [(x.dtype, None)]
    if len(w.static_shape) != len(x.shape) or len(x.shape) < 3:
        raise refuse(node, f"has a weight {list(w.static_shape)} for an input {list(x.shape)}")
    a, rank = node.attributes, len(x.shape) - 2
    group = a.get("group", 1)
    channels = w.static_shape[1] * group
    if a.get("output_shape") or a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        sizes = a.get("output_shape")
        dims: list[Dim] = (
            list(sizes[-rank:])
            if sizes
            else [multiply(x.shape[2 + i], (a.get("strides") or [1] * rank)[i]) for i in range(rank)]
        )
        return [(x.dtype, (x.shape[0], channels, *dims))]
    strides, dilations = a.get("strides") or [1] * rank, a.get("dilations") or [1] * rank
    pads = a.get("pads") or [0] * (2 * rank)
    pads = [0] * (2 * rank) if a.get("auto_pad") == "VALID" else pads
    extra = a.get("output_padding") or [0] * rank
    dims = []
    for i in range(rank):
        grown = (w.static_shape[2 + i] - 1) * dilations[i] + 1 - strides[i] + extra[i] - pads[i] - pads[i + rank]
        dims.append(add(multiply(x.shape[2 + i], strides[i]), grown))
    return [(x.dtype, (x.shape[0], channels, *dims))]


@rule("Resize")
def _resize(node: Node, context: Context) -> Facts:
    x, sizes, scales = _x(node), node.input(3), node.input(2)
    if x.shape is None:
        return [(x.dtype, None)]
    axes = [axis % len(x.shape) for axis in node.attributes.get("axes") or range(len(x.shape))]
    dims = list(x.shape)
    wanted = context.elements(sizes)
    stretched = node.attributes.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    for i, axis in enumerate(axes):
        if wanted is not None and stretched:
            dims[axis] = wanted[i]
        elif scales is not None and scales.is_constant and len(scales.data) == len(axes):
            dims[axis] = _scaled(dims[axis], float(scales.data[i]))
        else:
            dims[axis] = unknown()
    return [(x.dtype, tuple(dims))]


def _scaled(dim: Dim, scale: float) -> Dim:
    if isinstance(dim, int):
        return int(dim * scale)
    return multiply(dim, int(scale)) if scale == int(scale) else unknown()


@rule("SpaceToDepth DepthToSpace")
def _depth_space(node: Node, context: Context) -> Facts:
    x, b = _x(node), node.attributes["blocksize"]
    if x.shape is None or len(x.shape) != 4:
        return [(x.dtype, None)]
    n, c, h, w = x.shape
    if node.op == "DepthToSpace":
        return [(x.dtype, (n, floor_divide(c, b * b), multiply(h, b), multiply(w, b)))]
    return [(x.dtype, (n, multiply(c, b * b), floor_divide(h, b), floor_divide(w, b)))]


@rule("LSTM GRU RNN")
def _recurrent(node: Node, context: Context) -> Facts:
    x, r = _x(node), node.input(2)
    if x.shape is None or r is None or r.shape is None or len(x.shape) != 3:
        return [(x.dtype, None)] * 3
    directions, hidden = r.shape[0], r.shape[-1]
    if node.attributes.get("layout", 0):
        batch, time = x.shape[:2]
        state: Shape = (batch, directions, hidden)
        return [(x.dtype, (batch, time, directions, hidden)), (x.dtype, state), (x.dtype, state)]
    time, batch = x.shape[:2]
    state = (directions, batch, hidden)
    return [(x.dtype, (time, directions, batch, hidden)), (x.dtype, state), (x.dtype, state)]


@rule("If")
def _if(node: Node, context: Context) -> Facts:
    branches: list[Graph] = [node.attributes["then_branch"], node.attributes["else_branch"]]
    if any(branch.inputs for branch in branches) or any(len(b.outputs) < len(node.outputs) for b in branches):
        raise refuse(node, "has a branch with inputs, or with fewer outputs than the node")
    facts: Facts = []
    for a, b in zip(branches[0].outputs, branches[1].outputs, strict=False):
        same = a.shape is not None and a.shape == b.shape
        facts.append((a.dtype if a.dtype is b.dtype else None, a.shape if same else None))
    return facts


@rule("Loop")
def _loop(node: Node, context: Context) -> Facts:
    body: Graph = node.attributes["body"]
    carried = len(node.inputs) - 2
    if len(body.inputs) != carried + 2 or len(body.outputs) < max(carried + 1, len(node.outputs) + 1):
        raise refuse(node, f"carries {carried} values, but its body has {len(body.inputs)} inputs")
    facts: Facts = [(value.dtype, None) for value in body.outputs[1 : 1 + carried]]
    for value in body.outputs[1 + carried :]:
        facts.append(
            (value.dtype, None if value.shape is None else (unknown(), *(_scoped(dim) for dim in value.shape)))
        )
    return facts


@rule("Scan")
def _scan(node: Node, context: Context) -> Facts:
    body: Graph = node.attributes["body"]
    given = len(node.inputs) - node.attributes.get("batched", 0)
    if len(body.inputs) != given or not 0 < node.attributes["num_scan_inputs"] <= given:
        raise refuse(node, f"has {given} inputs, but its body has {len(body.inputs)}")
    return []


@rule("SequenceMap")
def _sequence_map(node: Node, context: Context) -> Facts:
    body: Graph = node.attributes["body"]
    if len(body.inputs) != len(node.inputs):
        raise refuse(node, f"has {len(node.inputs)} inputs, but its body has {len(body.inputs)}")
    return []


def _scoped(dim: Dim) -> Dim:
    """A symbol of a body means another number each time round: outside it says nothing."""
    return dim if isinstance(dim, int) else unknown()


@rule("NonMaxSuppression")
def _non_max_suppression(node: Node, context: Context) -> Facts:
    return [(DType.INT64, (unknown(), 3))]


@rule("SequenceLength SequenceEmpty SequenceConstruct")
def _sequence(node: Node, context: Context) -> Facts:
    return [(DType.INT64, ())] if node.op == "SequenceLength" else [(None, None)]
