"""What moves elements and computes nothing: views, copies, concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from trine.graph.dtypes import DType
from trine.graph.ir import Graph, Node, Value
from trine.graph.native.args import CHAIN_BLOCK, COPY_DIMS, ChainArgs, CopyArgs, GatherArgs
from trine.graph.native.elementwise import CODES
from trine.graph.native.recorder import Joined, Recorder, native
from trine.graph.native.tensor import Tensor, collapse


def copy(tape: Recorder, source: Tensor, target: Tensor) -> None:
    """A step that copies `source` to `target`, which has its shape; several, if it has too many dimensions for one."""
    order = sorted(range(len(target.shape)), key=lambda axis: -target.strides[axis])
    shape, (x, y) = collapse(
        [target.shape[axis] for axis in order],
        [[source.strides[axis] for axis in order], [target.strides[axis] for axis in order]],
    )
    if len(shape) > COPY_DIMS:
        for place in range(target.shape[order[0]]):
            copy(tape, source.slice(order[0], place, 1), target.slice(order[0], place, 1))
        return
    turned = next((axis for axis, stride in enumerate(x[:-1]) if stride == 1 and x[-1] != 1), -1)
    args = CopyArgs(dims=len(shape), itemsize=source.itemsize, turned=turned)
    args.shape[: len(shape)], args.x_strides[: len(shape)], args.y_strides[: len(shape)] = shape, x, y
    tape.step("copy", args, {"x": source, "y": target})


@native("Dropout")
@native("Reshape")
@native("Flatten")
@native("Squeeze")
@native("Unsqueeze")
@native("Identity")
def reshape(tape: Recorder, node: Node) -> bool:
    """The same elements under another shape; a copy only where their order in memory is another."""
    x, shape = tape.tensor(node.inputs[0]), node.output.static_shape
    if x is None or shape is None or prod(shape) != x.count or any(value.name for value in node.outputs[1:]):
        return False
    if node.op == "Dropout" and node.input(2) is not None:
        return False  # it may be training
    tape.alias(node.output, x.view(shape) or _viewed(tape.rows(x), shape))
    return True


def _viewed(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    made = tensor.view(shape)
    assert made is not None
    return made


@native("Transpose")
def transpose(tape: Recorder, node: Node) -> bool:
    """A view: who needs another layout copies."""
    x = tape.tensor(node.inputs[0])
    if x is None:
        return False
    tape.alias(node.output, x.permute(node.attributes.get("perm") or range(len(x.shape))[::-1]))
    return True


@native("Expand")
def expand(tape: Recorder, node: Node) -> bool:
    x, shape = tape.tensor(node.inputs[0]), node.output.static_shape
    if x is None or shape is None or len(x.shape) > len(shape):
        return False
    tape.alias(node.output, x.expand(shape))
    return True


@native("Split")
def split(tape: Recorder, node: Node) -> bool:
    """Views."""
    x = tape.tensor(node.inputs[0])
    if x is None:
        return False
    axis, start = node.attributes.get("axis", 0) % len(x.shape), 0
    sizes = [None if value.static_shape is None else value.static_shape[axis] for value in node.outputs]
    counts = [size for size in sizes if size is not None]
    if len(counts) != len(sizes) or sum(counts) != x.shape[axis]:
        return False
    for value, count in zip(node.outputs, counts, strict=True):
        if value.name:
            tape.alias(value, x.slice(axis, start, count))
        start += count
    return True


def _numbers(value: Value | None) -> list[int] | None:
    return None if value is None or not value.is_constant else [int(item) for item in value.data.reshape(-1).tolist()]


@native("Slice")
def slice_(tape: Recorder, node: Node) -> bool:
    """A view, with strides below zero where it runs backwards."""
    x, starts, ends = tape.tensor(node.inputs[0]), _numbers(node.input(1)), _numbers(node.input(2))
    if x is None or starts is None or ends is None:
        return False
    axes = list(range(len(starts))) if node.input(3) is None else _numbers(node.input(3))
    steps = [1] * len(starts) if node.input(4) is None else _numbers(node.input(4))
    if axes is None or steps is None or 0 in steps:
        return False
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis %= len(x.shape)
        places = range(*slice(start, end, step).indices(x.shape[axis]))
        x = x.slice(axis, places.start if places else 0, len(places), step)
    if x.shape != node.output.static_shape:
        return False
    tape.alias(node.output, x)
    return True


@native("Gather")
def gather(tape: Recorder, node: Node) -> bool:
    """Rows by number; a constant single number is a view."""
    x, indices = tape.tensor(node.inputs[0]), node.inputs[1]
    if x is None or indices is None or not x.shape or indices.dtype not in (DType.INT64, DType.INT32):
        return False
    axis = node.attributes.get("axis", 0) % len(x.shape)
    if indices.is_constant and indices.data.dim() == 0:
        place = int(indices.data)
        place += x.shape[axis] if place < 0 else 0
        if 0 <= place < x.shape[axis]:
            row = x.slice(axis, place, 1)
            keep = [i for i in range(len(x.shape)) if i != axis]
            shape, strides = tuple(x.shape[i] for i in keep), tuple(x.strides[i] for i in keep)
            tape.alias(node.output, replace(row, shape=shape, strides=strides))
            return True
    picked = tape.tensor(indices)
    if picked is None or not x.count or not picked.count:
        return False
    x, picked, y = tape.rows(x), tape.rows(picked), tape.output(node.output)
    args = GatherArgs(
        outer=prod(x.shape[:axis]),
        size=x.shape[axis],
        row_bytes=prod(x.shape[axis + 1 :]) * x.itemsize,
        count=picked.count,
        wide=picked.dtype is DType.INT64,
    )
    tape.step("gather", args, {"x": x, "indices": picked, "y": y})
    return True


@native("Pad")
def pad(tape: Recorder, node: Node) -> bool:
    """By a constant: the result filled with it, then the input copied into the middle. Negative pads cut."""
    x, amounts, value = tape.float_tensor(node.inputs[0]), _numbers(node.input(1)), node.input(2)
    if x is None or amounts is None or node.attributes.get("mode", "constant") != "constant" or not x.count:
        return False
    if value is not None and (not value.is_constant or value.data.numel() != 1):
        return False
    rank = len(x.shape)
    axes = list(range(rank)) if node.input(3) is None else _numbers(node.input(3))
    if axes is None or len(amounts) != 2 * len(axes):
        return False
    y = tape.output(node.output, channels_last=x.is_channels_last and not x.is_contiguous)
    middle = y
    for axis, before, after in zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True):
        axis %= rank
        start, end = max(-before, 0), x.shape[axis] - max(-after, 0)
        x = x.slice(axis, start, max(end - start, 0))
        middle = middle.slice(axis, max(before, 0), x.shape[axis])
    fill(tape, y, 0.0 if value is None else float(value.data.reshape(())))
    if x.count:
        copy(tape, x, middle)
    return True


def fill(tape: Recorder, y: Tensor, number: float) -> None:
    """A step that sets every element of y, which is float32 without holes."""
    args = ChainArgs(count=y.count, task=16 * CHAIN_BLOCK, dims=1, output_count=1, op_count=1)
    args.shape[0] = y.count
    args.ops[0].code, args.ops[0].p = CODES["const"], number
    pointers: dict[str | int, Tensor | None] = {ChainArgs.outputs.offset: y}
    tape.step("chain", args, pointers)


@native("Tile")
def tile(tape: Recorder, node: Node) -> bool:
    """A view in which each dimension stands twice, and a copy of it."""
    x, repeats = tape.tensor(node.inputs[0]), _numbers(node.input(1))
    if x is None or repeats is None or len(repeats) != len(x.shape) or not x.count or 0 in repeats:
        return False
    pairs = [(count, size) for count, size in zip(repeats, x.shape, strict=True)]
    single = x.view([part for _, size in pairs for part in (1, size)])
    assert single is not None
    wide = single.expand([part for pair in pairs for part in pair])
    y = tape.output(node.output)
    target = y.view(wide.shape)
    assert target is not None
    copy(tape, wide, target)
    return True


@native("DepthToSpace")
def depth_to_space(tape: Recorder, node: Node) -> bool:
    x = tape.tensor(node.inputs[0])
    if x is None or len(x.shape) != 4 or not x.count:
        return False
    (n, c, h, w), b = x.shape, node.attributes["blocksize"]
    if node.attributes.get("mode", "DCR") == "DCR":
        shape, order = (n, b, b, c // b // b, h, w), (0, 3, 4, 1, 5, 2)
    else:
        shape, order = (n, c // b // b, b, b, h, w), (0, 1, 4, 2, 5, 3)
    return _rearranged(tape, node, x, shape, order)


@native("SpaceToDepth")
def space_to_depth(tape: Recorder, node: Node) -> bool:
    x = tape.tensor(node.inputs[0])
    if x is None or len(x.shape) != 4 or not x.count:
        return False
    (n, c, h, w), b = x.shape, node.attributes["blocksize"]
    return _rearranged(tape, node, x, (n, c, h // b, b, w // b, b), (0, 3, 5, 1, 2, 4))


def _rearranged(tape: Recorder, node: Node, x: Tensor, shape: Sequence[int], order: Sequence[int]) -> bool:
    """x under another shape, its axes in another order: copied into a result with the channels as they lie in x."""
    split = x.view(shape)
    if split is None:
        split = _viewed(tape.rows(x), tuple(shape))
    turned = split.permute(order)
    y = tape.output(node.output, channels_last=x.is_channels_last and not x.is_contiguous)
    target = y.view(turned.shape)
    if target is None:
        return False
    copy(tape, turned, target)
    return True


_IMAGE_MAKERS = frozenset(
    ["Conv", "FusedConv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "Resize"]
)
"""Operators whose rules ask for `image_output`."""


def joined(graph: Graph) -> dict[Value, Joined]:
    """What kernels can write straight to where a concatenation of channels wants it.

    Something that several concatenate goes to the longest of them: where each layer reads all that came before, the
    others are the beginnings of the last.
    """
    found: dict[Value, Joined] = {}
    concats = [node for node in graph.nodes if node.op == "Concat" and _joins_channels(node)]
    for node in sorted(concats, key=lambda node: -len(node.inputs)):
        start = 0
        for value in node.inputs:
            assert value is not None
            assert value.static_shape is not None
            maker = value.producer
            if maker is not None and maker.op in _IMAGE_MAKERS and value not in graph.outputs:
                found.setdefault(value, Joined(node.output, start))
            start += value.static_shape[1]
    return {value: place for value, place in found.items() if place.whole not in graph.outputs}


def _joins_channels(node: Node) -> bool:
    values = [node.output, *(value for value in node.inputs if value is not None)]
    images = all(value.rank == 4 and value.static_shape and value.dtype is DType.FLOAT32 for value in values)
    return images and node.attributes["axis"] in (1, -3) and len(values) == len(node.inputs) + 1


@native("Concat")
def concat(tape: Recorder, node: Node) -> bool:
    parts = [tape.tensor(value) for value in node.inputs]
    if node.output.static_shape is None:
        return False
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return False
    axis = node.attributes["axis"] % len(node.output.static_shape)
    neighbours = _neighbours(known, axis)
    if neighbours is not None:
        tape.alias(node.output, neighbours)
        return True
    if any(place.whole is node.output for place in tape.joined.values()):
        whole = tape.whole(node.output)
        tape.alias(node.output, whole)
    else:
        last = len(node.output.static_shape) == 4 and any(part.is_image and not part.is_contiguous for part in known)
        whole = tape.output(node.output, channels_last=last)
    start = 0
    for part in known:
        target = whole.slice(axis, start, part.shape[axis])
        if part.count and part != target:
            copy(tape, part, target)
        start += part.shape[axis]
    return True


def _neighbours(parts: Sequence[Tensor], axis: int) -> Tensor | None:
    """What the parts are together where they lie side by side in one buffer already."""
    first, count = parts[0], 0
    for part in parts:
        here = first.offset + count * first.strides[axis]
        lies = part.buffer is first.buffer and part.strides == first.strides and part.offset == here
        if not lies or part.shape[:axis] + part.shape[axis + 1 :] != first.shape[:axis] + first.shape[axis + 1 :]:
            return None
        count += part.shape[axis]
    return replace(first, shape=(*first.shape[:axis], count, *first.shape[axis + 1 :]))
