"""Reductions, products, convolutions, pooling, resizing and recurrent layers."""

from __future__ import annotations

from trine.graph.dims import add, broadcast, floor_divide, multiply, unknown, window
from trine.graph.dtypes import DType
from trine.graph.ir import Dim, Node, Shape
from trine.graph.shape_rules.common import Context, Facts, axis_of, first, present, refuse, rule, same_types


@rule(
    "ReduceSum ReduceMean ReduceProd ReduceMax ReduceMin ReduceSumSquare ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp"
)
def _reduce(node: Node, context: Context) -> Facts:
    x, axes = first(node), context.elements(node.input(1))
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
    x = first(node)
    if x.shape is None:
        return [(DType.INT64, None)]
    axis = axis_of(node, len(x.shape), 0)
    return [(DType.INT64, _without(x.shape, (axis,), node.attributes.get("keepdims", 1), node))]


@rule("TopK")
def _top_k(node: Node, context: Context) -> Facts:
    x, k = first(node), context.elements(node.input(1))
    if x.shape is None:
        return [(x.dtype, None), (DType.INT64, None)]
    axis = axis_of(node, len(x.shape), -1)
    dim = unknown() if k is None else k[0]
    shape = (*x.shape[:axis], dim, *x.shape[axis + 1 :])
    return [(x.dtype, shape), (DType.INT64, shape)]


@rule("MatMul MatMulInteger")
def _matmul(node: Node, context: Context) -> Facts:
    a, b = first(node), node.input(1)
    if b is None:
        raise refuse(node, "needs two inputs")
    dtype = DType.INT32 if node.op == "MatMulInteger" else same_types(node, [a, b])
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
    a, b = first(node), node.input(1)
    if b is None:
        raise refuse(node, "needs two inputs")
    dtype = same_types(node, present(node))
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
    x, w = first(node), node.inputs[1]
    if x.shape is None or w is None or w.shape is None:
        return [(x.dtype, None)]
    return [(x.dtype, (*x.shape[:-1], w.shape[0]))]


@rule("ScaledDotProductAttention")
def _attention(node: Node, context: Context) -> Facts:
    q, v = first(node), node.inputs[2]
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
    x = first(node)
    quantized = node.op == "QLinearConv"
    w = node.input(3 if quantized else 1)
    zero = node.input(7)
    dtype = DType.INT32 if node.op == "ConvInteger" else zero.dtype if quantized and zero is not None else x.dtype
    if w is None:
        raise refuse(node, "needs a weight")
    if node.op in ("Conv", "FusedConv"):
        same_types(node, present(node))
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
    x = first(node)
    if x.shape is None:
        return [(x.dtype, None), (DType.INT64, None)]
    if len(x.shape) != len(node.attributes["kernel_shape"]) + 2:
        raise refuse(node, f"has a kernel {node.attributes['kernel_shape']} for an input {list(x.shape)}")
    shape = (*x.shape[:2], *_spatial(node, x.shape, tuple(node.attributes["kernel_shape"])))
    return [(x.dtype, shape), (DType.INT64, shape)]


@rule("GlobalAveragePool GlobalMaxPool GlobalLpPool")
def _global_pool(node: Node, context: Context) -> Facts:
    x = first(node)
    return [(x.dtype, None if x.shape is None else (*x.shape[:2], *[1] * (len(x.shape) - 2)))]


@rule("ConvTranspose")
def _conv_transpose(node: Node, context: Context) -> Facts:
    x, w = first(node), node.input(1)
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
    x, sizes, scales = first(node), node.input(3), node.input(2)
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
    x, b = first(node), node.attributes["blocksize"]
    if x.shape is None or len(x.shape) != 4:
        return [(x.dtype, None)]
    n, c, h, w = x.shape
    if node.op == "DepthToSpace":
        return [(x.dtype, (n, floor_divide(c, b * b), multiply(h, b), multiply(w, b)))]
    return [(x.dtype, (n, multiply(c, b * b), floor_divide(h, b), floor_divide(w, b)))]


@rule("LSTM GRU RNN")
def _recurrent(node: Node, context: Context) -> Facts:
    x, r = first(node), node.input(2)
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
