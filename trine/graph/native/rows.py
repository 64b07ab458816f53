"""Softmax, normalisations and reductions."""

from __future__ import annotations

from math import prod

from trine.graph.ir import Node
from trine.graph.native.args import GroupNormArgs, ReduceArgs, RowNormArgs, SoftmaxArgs
from trine.graph.native.recorder import Recorder, Rule, native
from trine.graph.native.tensor import Tensor


def _single(node: Node) -> bool:
    return sum(bool(value.name) for value in node.outputs) == 1


def _softmax(*, logarithm: bool) -> Rule:
    def rule(tape: Recorder, node: Node) -> bool:
        x = tape.float_tensor(node.inputs[0])
        if x is None or not x.count or not x.shape:
            return False
        axis = node.attributes.get("axis", -1) % len(x.shape)
        args = SoftmaxArgs(
            outer=prod(x.shape[:axis]), size=x.shape[axis], inner=prod(x.shape[axis + 1 :]), logarithm=logarithm
        )
        x, y = tape.rows(x), tape.output(node.output)
        tape.step("softmax", args, {"x": x, "y": y}, in_place=[(x, y)])
        return True

    return rule


native("Softmax")(_softmax(logarithm=False))
native("LogSoftmax")(_softmax(logarithm=True))


def _row_norm(*, rms: bool) -> Rule:
    def rule(tape: Recorder, node: Node) -> bool:
        """Over trailing axes, in float32, without the statistics as results."""
        x, scale = tape.real_tensor(node.inputs[0]), tape.float_tensor(node.inputs[1])
        bias = tape.float_tensor(node.input(2))
        if x is None or scale is None or not x.count or not _single(node) or node.attributes.get("stash_type", 1) != 1:
            return False
        axis = node.attributes.get("axis", -1) % len(x.shape)
        size = prod(x.shape[axis:])
        if (node.input(2) is not None and bias is None) or any(
            part is not None and (part.count != size or part.shape != x.shape[axis:]) for part in (scale, bias)
        ):
            return False
        args = RowNormArgs(rows=x.count // size, size=size, epsilon=node.attributes.get("epsilon", 1e-5), rms=rms)
        x, y = tape.rows(x), tape.output(node.output)
        args.x_dtype, args.y_dtype = x.number, y.number
        shift = None if bias is None else tape.rows(bias)
        tape.step("row_norm", args, {"x": x, "scale": tape.rows(scale), "bias": shift, "y": y}, in_place=[(x, y)])
        return True

    return rule


native("LayerNormalization")(_row_norm(rms=False))
native("RMSNormalization")(_row_norm(rms=True))


@native("InstanceNormalization")
@native("GroupNormalization")
def group_norm(tape: Recorder, node: Node) -> bool:
    """Each group of channels by its own mean and variance; the layout stays."""
    x, scale, bias = (tape.float_tensor(value) for value in node.inputs[:3])
    if x is None or scale is None or bias is None or not x.count or len(x.shape) < 2:
        return False
    channels = x.shape[1]
    groups = node.attributes.get("num_groups", channels)
    if scale.shape != (channels,) or bias.shape != (channels,) or node.attributes.get("stash_type", 1) != 1:
        return False
    last = x.is_image and not x.is_contiguous
    x, y = tape.channels_last(x) if last else tape.rows(x), tape.output(node.output, channels_last=last)
    if last and not (y.is_channels_last and y.strides == x.strides):
        return False
    args = GroupNormArgs(
        outer=x.shape[0],
        channels=channels,
        places=prod(x.shape[2:]),
        groups=groups,
        epsilon=node.attributes.get("epsilon", 1e-5),
        channels_last=last,
    )
    pointers = {"x": x, "scale": tape.rows(scale), "bias": tape.rows(bias), "y": y}
    tape.step("group_norm", args, pointers, in_place=[(x, y)])
    return True


_KINDS = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare")


def reduced(tape: Recorder, x: Tensor, axes: list[int], kind: int, y: Tensor) -> None:
    """A step that reduces `axes` of x into y, whose elements stand in the order of x's other axes."""
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    by_stride = sorted(range(len(x.shape)), key=lambda axis: -x.strides[axis])
    turned = x.permute(by_stride)
    places = [place for place, axis in enumerate(by_stride) if axis in axes]
    together = places == list(range(places[0], places[-1] + 1)) if places else False
    if together and turned.is_contiguous and [axis for axis in by_stride if axis in kept] == kept:
        x, first, end = turned, places[0], places[-1] + 1
    else:
        x, first, end = tape.rows(x.permute([*kept, *axes])), len(kept), len(kept) + len(axes)
    args = ReduceArgs(outer=prod(x.shape[:first]), size=prod(x.shape[first:end]), inner=prod(x.shape[end:]), kind=kind)
    tape.step("reduce", args, {"x": x, "y": y})


def _reduction(kind: int) -> Rule:
    def rule(tape: Recorder, node: Node) -> bool:
        x, given = tape.float_tensor(node.inputs[0]), node.input(1)
        if x is None or not x.count or not x.shape or (given is not None and not given.is_constant):
            return False
        listed = [] if given is None else given.data.reshape(-1).tolist()
        axes = sorted({int(axis) % len(x.shape) for axis in listed})
        if not axes:
            if node.attributes.get("noop_with_empty_axes", 0):
                return False
            axes = list(range(len(x.shape)))
        reduced(tape, x, axes, kind, tape.output(node.output))
        return True

    return rule


for _kind, _name in enumerate(_KINDS):
    native(_name)(_reduction(_kind))
