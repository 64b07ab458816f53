"""Nodes without candidates of their own: torch's views and simple operations, or the operator's own meaning.

Float32 values travel in the target's type. An operator that a narrow type would harm (sums, exponentials, …) computes
in float32. One that can't run on the device, or that would have to look at results there, runs on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trine.graph.dtypes import DType, from_onnx
from trine.graph.gpu.registry import Kernel, Target
from trine.graph.ir import Node, Value
from trine.graph.runtime import bind

NARROW = frozenset({
    "Abs", "Add", "And", "Clip", "Concat", "DepthToSpace", "Div", "Equal", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Less", "LessOrEqual", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Not", "Or", "PRelu",
    "Pad", "Relu", "Reshape", "Shape", "Sigmoid", "Slice", "SpaceToDepth", "Split", "Squeeze", "Sub", "Swish",
    "Tanh", "Tile", "Transpose", "Unsqueeze", "Where", "Xor", "ScaledDotProductAttention", "HeadsAttention",
    "Linear", "FusedConv", "ConvTranspose", "SpreadConcat",
})  # fmt: skip
"""Operators that compute in the target's type; all others get float32."""

_HOST_INPUTS = {
    **{name: {1} for name in ("Reshape", "Expand", "Squeeze", "Unsqueeze", "Split", "Tile", "TopK", "CumSum")},
    "Slice": {1, 2, 3, 4},
    "Pad": {1, 3},
    "Resize": {1, 2, 3},
    "OneHot": {1},
    "Range": {0, 1, 2},
    "ConstantOfShape": {0},
}
"""Inputs that operators read as numbers, not as tensors: they stay on the host where they are constant."""


def kernel(node: Node, target: Target) -> Kernel:
    """What computes the node on tensors of the target, constants and all."""
    found = _simple(node, target)
    return found if found is not None else meaning(node, target)


def _simple(node: Node, target: Target) -> Kernel | None:
    """Views with their shapes written out, and operators that torch has just so."""
    shape, op, a = node.output.static_shape, node.op, node.attributes
    if op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") and shape is not None and not _constant(node, 0):
        return lambda x, *rest: x.reshape(shape)
    if op == "Expand" and shape is not None and not _constant(node, 0):
        return lambda x, *rest: x.expand(shape)
    if op == "Transpose" and "perm" in a and not _constant(node, 0):
        perm = list(a["perm"])
        return lambda x: x.permute(perm)
    if op == "Split" and all(value.static_shape is not None for value in node.outputs):
        axis = a.get("axis", 0)
        sizes = [value.static_shape[axis] for value in node.outputs if value.static_shape is not None]
        return lambda x, *rest: torch.split(x, sizes, axis)
    if op == "Concat":
        fixed = [target.constant(v) if v is not None and v.is_constant else None for v in node.inputs]
        return lambda *parts: torch.cat([p if f is None else f for p, f in zip(parts, fixed, strict=True)], a["axis"])
    if op == "Gather" and shape is not None and node.inputs[0] is not None and node.inputs[0].static_shape is not None:
        return _gather(node, shape, node.inputs[0].static_shape, target)
    return None


def _gather(node: Node, shape: tuple[int, ...], source: tuple[int, ...], target: Target) -> Kernel:
    """Rows of an axis by number, from the end where that is negative. Numbers out of range are the nearest that is in:
    a plan checks those of its inputs, and a GPU can't raise an error.
    """
    axis, indices = node.attributes.get("axis", 0) % len(source), node.inputs[1]
    size = source[axis]

    def places(x: Tensor) -> Tensor:
        return torch.where(x < 0, x + size, x).clamp(0, max(size - 1, 0)).reshape(-1)

    if indices is not None and indices.is_constant:
        fixed = places(indices.data.to(target.device))
        if torch.equal(fixed, torch.arange(size, device=target.device, dtype=fixed.dtype)):
            return lambda x, *rest: x.reshape(shape)
        return lambda x, *rest: x.index_select(axis, fixed).reshape(shape)
    if _constant(node, 0):
        table: Any = target.constant(node.inputs[0])  # type: ignore[arg-type]
        return lambda x, indices: table.index_select(axis, places(indices)).reshape(shape)
    return lambda x, indices: x.index_select(axis, places(indices)).reshape(shape)


def _constant(node: Node, index: int) -> bool:
    value = node.input(index)
    return value is not None and value.is_constant


def meaning(node: Node, target: Target) -> Kernel:
    """The operator's own meaning, on the device."""
    function, captures = bind(node)
    wide = node.op not in NARROW and target.dtype is not torch.float32
    values = [*node.inputs, *captures]
    fixed = [_fixed(node, index, value, target, wide) for index, value in enumerate(values)]
    narrow = [value.dtype is DType.FLOAT32 for value in node.outputs]
    to_float = node.op == "Cast" and from_onnx(node.attributes["to"]) is DType.FLOAT32

    def run(*given: Any) -> Any:
        arguments = [
            _widened(x, target) if wide and f is None else x if f is None else f
            for x, f in zip(given, fixed, strict=True)
        ]
        if to_float and isinstance(arguments[0], Tensor):
            return arguments[0].to(target.dtype)
        with target.device:
            result = function(*arguments)
        return _narrowed(result, narrow, target)

    return run


def _fixed(node: Node, index: int, value: Value | None, target: Target, wide: bool) -> Any:
    """The constant that input `index` is, where it belongs; None for what is computed."""
    if value is None or not value.is_constant:
        return None
    if index in _HOST_INPUTS.get(node.op, ()) or (node.op.startswith("Reduce") and index == 1):
        return value.data
    if not isinstance(value.data, Tensor):
        return value.data
    return value.data.to(target.device) if wide else target.constant(value)


def _widened(x: Any, target: Target) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype is target.dtype else x


def _narrowed(result: Any, narrow: Sequence[bool], target: Target) -> Any:
    """Floats of values that the graph calls float32, in the target's type."""
    if isinstance(result, tuple):
        flags = [*narrow, *[False] * (len(result) - len(narrow))]
        return tuple(_narrowed(part, [flag], target) for part, flag in zip(result, flags, strict=False))
    if narrow[0] and isinstance(result, Tensor) and result.dtype is torch.float32:
        return result.to(target.dtype)
    return result


def on_host(node: Node, target: Target) -> Kernel:
    """The operator's meaning on the CPU: inputs come over, results go back."""
    function, captures = bind(node)
    fixed = [None if value is None or not value.is_constant else value.data for value in [*node.inputs, *captures]]
    narrow = [value.dtype is DType.FLOAT32 for value in node.outputs]

    def run(*given: Any) -> Any:
        arguments = [_to_host(x, target) if f is None else f for x, f in zip(given, fixed, strict=True)]
        return _to_device(_narrowed(function(*arguments), narrow, target), target)

    return run


def _to_host(x: Any, target: Target) -> Any:
    if isinstance(x, list):
        return [_to_host(item, target) for item in x]
    return _widened(x, target).cpu() if isinstance(x, Tensor) else x


def _to_device(x: Any, target: Target) -> Any:
    if isinstance(x, list | tuple):
        return type(x)(_to_device(item, target) for item in x)
    return x.to(target.device) if isinstance(x, Tensor) else x


def safe(node: Node, make: Callable[[], Kernel], target: Target) -> Kernel:
    """`make`'s kernel, or the host's where that can't even be made."""
    try:
        return make()
    except (RuntimeError, TypeError, ValueError, KeyError):
        return on_host(node, target)
