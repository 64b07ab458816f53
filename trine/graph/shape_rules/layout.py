"""Operators that move, cut, join, repeat, pick or make elements."""

from __future__ import annotations

from trine.graph.dims import add, broadcast, divide, multiply, unknown
from trine.graph.dtypes import DType, from_onnx
from trine.graph.ir import Dim, Node, Shape
from trine.graph.shape_rules.common import Context, Facts, axis_of, first, present, refuse, rule, same_types

_MOST_DIMENSIONS = 64
"""More than any tensor library has."""


@rule("Shape")
def _shape(node: Node, context: Context) -> Facts:
    rank = first(node).rank
    if rank is None:
        return [(DType.INT64, (unknown(),))]
    start, end = node.attributes.get("start", 0), node.attributes.get("end")
    return [(DType.INT64, (len(range(rank)[slice(start, end)]),))]


@rule("Size")
def _size(node: Node, context: Context) -> Facts:
    return [(DType.INT64, ())]


@rule("Reshape")
def _reshape(node: Node, context: Context) -> Facts:
    x = first(node)
    wanted = context.elements(node.input(1))
    if wanted is not None:
        return [(x.dtype, _reshaped(node, x.shape, wanted, bool(node.attributes.get("allowzero", 0))))]
    target = node.input(1)
    length = None if target is None or target.static_shape is None else target.static_shape
    if length and length[0] > _MOST_DIMENSIONS:
        raise refuse(node, f"would make a tensor of {length[0]} dimensions")
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
    x = first(node)
    if x.shape is None:
        return [(x.dtype, (unknown(), unknown()))]
    axis = node.attributes.get("axis", 1)
    axis = axis + len(x.shape) if axis < 0 else axis
    return [(x.dtype, (multiply(*x.shape[:axis]), multiply(*x.shape[axis:])))]


@rule("Squeeze")
def _squeeze(node: Node, context: Context) -> Facts:
    x, axes = first(node), context.elements(node.input(1))
    if x.shape is None or (node.input(1) is not None and axes is None):
        return [(x.dtype, None)]
    if axes is None:
        return [(x.dtype, None if x.static_shape is None else tuple(dim for dim in x.shape if dim != 1))]
    gone = {axis % len(x.shape) for axis in axes if isinstance(axis, int)}
    return [(x.dtype, tuple(dim for i, dim in enumerate(x.shape) if i not in gone))]


@rule("Unsqueeze")
def _unsqueeze(node: Node, context: Context) -> Facts:
    x, axes = first(node), context.elements(node.input(1))
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
    x = first(node)
    if x.shape is None:
        return [(x.dtype, None)]
    perm = node.attributes.get("perm", list(reversed(range(len(x.shape)))))
    if sorted(perm) != list(range(len(x.shape))):
        raise refuse(node, f"has perm {perm}, which does not permute {len(x.shape)} dimensions")
    return [(x.dtype, tuple(x.shape[axis] for axis in perm))]


@rule("Concat")
def _concat(node: Node, context: Context) -> Facts:
    values = present(node)
    dtype = same_types(node, values)
    shapes = [value.shape for value in values]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return [(dtype, None)]
    if any(len(shape) != len(known[0]) for shape in known):
        raise refuse(node, f"joins tensors with {sorted({len(s) for s in known})} dimensions")
    axis = axis_of(node, len(known[0]), 0)
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
    x, count = first(node), len(node.outputs)
    if x.shape is None:
        return [(x.dtype, None)] * count
    axis = axis_of(node, len(x.shape), 0)
    length = x.shape[axis]
    sizes = context.elements(node.input(1))
    if sizes is None and node.input(1) is None and isinstance(length, int):
        pieces = node.attributes.get("num_outputs", count)
        if not count <= pieces <= max(length, count):
            raise refuse(node, f"splits {length} elements into {pieces} pieces")
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
    x = first(node)
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
    x, wanted = first(node), context.elements(node.input(1))
    if x.shape is None or wanted is None:
        return [(x.dtype, None)]
    shape = broadcast(x.shape, wanted)
    if shape is None:
        raise refuse(node, f"can't expand {list(x.shape)} to {list(wanted)}")
    return [(x.dtype, shape)]


@rule("Tile")
def _tile(node: Node, context: Context) -> Facts:
    x, repeats = first(node), context.elements(node.input(1))
    if x.shape is None or repeats is None:
        return [(x.dtype, None if x.shape is None else tuple(unknown() for _ in x.shape))]
    return [(x.dtype, tuple(multiply(dim, times) for dim, times in zip(x.shape, repeats, strict=True)))]


@rule("Pad")
def _pad(node: Node, context: Context) -> Facts:
    x, pads = first(node), context.elements(node.input(1))
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
    x, indices = first(node), node.input(1)
    if x.shape is None or indices is None or indices.shape is None:
        return [(x.dtype, None)]
    axis = axis_of(node, len(x.shape), 0)
    return [(x.dtype, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))]


@rule("GatherElements")
def _gather_elements(node: Node, context: Context) -> Facts:
    indices = node.input(1)
    return [(first(node).dtype, None if indices is None else indices.shape)]


@rule("GatherND")
def _gather_nd(node: Node, context: Context) -> Facts:
    x, indices = first(node), node.input(1)
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
    dtype = first(node).dtype
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
    return [(first(node).dtype if given is None else from_onnx(given), first(node).shape)]


@rule("OneHot")
def _one_hot(node: Node, context: Context) -> Facts:
    indices, depth, values = first(node), context.elements(node.input(1)), node.input(2)
    dtype = None if values is None else values.dtype
    if indices.shape is None:
        return [(dtype, None)]
    axis = node.attributes.get("axis", -1) % (len(indices.shape) + 1)
    dim = unknown() if depth is None else depth[0]
    return [(dtype, (*indices.shape[:axis], dim, *indices.shape[axis:]))]


@rule("NonZero")
def _non_zero(node: Node, context: Context) -> Facts:
    rank = first(node).rank
    return [(DType.INT64, (unknown() if rank is None else rank, unknown()))]
