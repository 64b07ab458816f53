"""Convolutions with weights in bfloat16 or float16: bfloat16's own arithmetic where the processor has it."""

from __future__ import annotations

import torch

from trine.graph.dtypes import DType
from trine.graph.ir import Node, Value, constant
from trine.graph.native.quantized import (
    finish,
    packed_weight,
    panels,
    panels_shape,
    pointers_of,
    row_constants,
    window_args,
)
from trine.graph.native.recorder import RULES, Recorder, native
from trine.graph.native.tape import library

_HAS_BF16 = (b"amx", b"avx512_bf16", b"emulated")
_STEP, _MULTIPLE = 2, 32


@native("ReducedConv")
def reduced_conv(tape: Recorder, node: Node) -> bool:
    """With tiles or pairs of bfloat16; else float32's kernels on the widened weight."""
    x, weight, bias = tape.float_tensor(node.inputs[0]), node.inputs[1], node.input(2)
    if x is None or not x.count or weight is None or not weight.is_constant or node.output.static_shape is None:
        return False
    if bias is not None and not bias.is_constant:
        return False
    group = node.attributes["group"]
    depthwise = group > 1 and weight.data.shape[1] == 1
    if weight.dtype is not DType.BFLOAT16 or depthwise or library().trine_isa() not in _HAS_BF16:
        return _widened(tape, node, weight)
    residual = tape.float_tensor(node.input(3))
    if min(node.attributes["pads"]) < 0 or (node.input(3) is not None and residual is None):
        return False
    if residual is not None and residual.shape != node.output.static_shape:
        return False
    x = tape.channels_last(x)
    residual = None if residual is None else tape.channels_last(residual)
    y = tape.output(node.output, channels_last=True)
    args = window_args(x, y, weight.data, node.attributes)
    layout = f"bf16:{_STEP}x{_MULTIPLE}:{group}"
    shape = panels_shape(weight.data, group, _STEP, _MULTIPLE)
    packed = packed_weight(tape, weight, layout, shape, lambda: panels(weight.data, group, _STEP, _MULTIPLE))
    args.depth = packed.shape[2] * _STEP
    args.finish, finished = finish(node, y, residual)
    args.finish.out_stride = args.finish.residual_stride = group * args.filters
    finished |= row_constants(tape, group, None, bias)
    in_place = [] if residual is None else [(residual, y)]
    tape.step("bf16_conv", args, pointers_of(type(args), {"x": x, "weight": packed}, finished), in_place=in_place)
    return True


def _widened(tape: Recorder, node: Node, weight: Value) -> bool:
    """As a FusedConv of float32, whose packed weights the plan keeps under the same name."""
    wide = tape.packed.companion(weight, "float32", lambda: constant(f"{weight.name}.float32", _float32(weight)))
    stand_in = Node("FusedConv", [node.inputs[0], wide, *node.inputs[2:]], [], dict(node.attributes), node.name)
    stand_in.outputs = node.outputs
    return any(rule(tape, stand_in) for rule in RULES.get("FusedConv", {}).values())


def _float32(weight: Value) -> torch.Tensor:
    data: torch.Tensor = weight.data
    return data.to(torch.float32)
