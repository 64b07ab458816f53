"""What moves elements and computes nothing: views, copies, concatenation."""

from __future__ import annotations

from trine.graph.ir import Node
from trine.graph.native.args import COPY_DIMS, CopyArgs
from trine.graph.native.recorder import Recorder, native
from trine.graph.native.tensor import Tensor, collapse


def copy(tape: Recorder, source: Tensor, target: Tensor) -> None:
    """A step that copies `source` to `target`, which has its shape. RuntimeError for more dimensions than fit."""
    order = sorted(range(len(target.shape)), key=lambda axis: -target.strides[axis])
    shape, (x, y) = collapse(
        [target.shape[axis] for axis in order],
        [[source.strides[axis] for axis in order], [target.strides[axis] for axis in order]],
    )
    if len(shape) > COPY_DIMS:
        raise RuntimeError(f"a copy of {len(shape)} dimensions")
    turned = next((axis for axis, stride in enumerate(x[:-1]) if stride == 1 and x[-1] != 1), -1)
    args = CopyArgs(dims=len(shape), itemsize=source.itemsize, turned=turned)
    args.shape[: len(shape)], args.x_strides[: len(shape)], args.y_strides[: len(shape)] = shape, x, y
    tape.step("copy", args, {"x": source, "y": target})


@native("Reshape")
@native("Flatten")
@native("Squeeze")
@native("Unsqueeze")
@native("Identity")
def reshape(tape: Recorder, node: Node) -> bool:
    """The same elements under another shape; a copy only where their order in memory is another."""
    x, shape = tape.tensor(node.inputs[0]), node.output.static_shape
    if x is None or shape is None:
        return False
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


@native("Concat")
def concat(tape: Recorder, node: Node) -> bool:
    parts = [tape.tensor(value) for value in node.inputs]
    if node.output.static_shape is None:
        return False
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return False
    last = len(node.output.static_shape) == 4 and any(
        part.is_channels_last and not part.is_contiguous for part in known
    )
    whole = tape.output(node.output, channels_last=last)
    axis, start = node.attributes["axis"] % len(whole.shape), 0
    for part in known:
        if part.count:
            copy(tape, part, whole.slice(axis, start, part.shape[axis]))
        start += part.shape[axis]
    return True
