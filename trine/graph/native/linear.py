"""Products by a constant matrix, with what follows them."""

from __future__ import annotations

import ctypes
from math import prod

import torch

from trine.graph.dtypes import DType
from trine.graph.errors import PlanError
from trine.graph.ir import Node, Value
from trine.graph.native.args import ACTIVATIONS, LinearArgs, Weight
from trine.graph.native.recorder import Recorder, native
from trine.graph.native.tape import library
from trine.graph.native.tensor import Tensor

_PANEL = 16


def weight_of(tape: Recorder, weight: Value, data: torch.Tensor) -> Tensor:
    """The library's record of a float32 matrix [n, k] in panels (csrc/runtime.h); the panels are shared and saved."""
    n, k = data.shape
    record = _record(n, k)

    def pack() -> torch.Tensor:
        panels = torch.zeros(record.data_bytes, dtype=torch.uint8)
        own, source = _record(n, k), data.contiguous()
        own.data = panels.data_ptr()
        library().trine_weight_pack(ctypes.byref(own), source.data_ptr(), 0)
        return panels

    panels = tape.constant(weight, "panels", pack)
    if panels.buffer.nbytes != record.data_bytes:
        raise PlanError(f"the plan's packed weight {weight.name!r} has the wrong size: build the plan again")
    record.data = panels.buffer.address
    address = tape.address(record)
    address.buffer.owner = (record, panels)
    return address


def _record(n: int, k: int) -> Weight:
    padded, panels = -(-k // 32) * 32, -(-n // _PANEL)
    nbytes = padded * _PANEL * 4
    return Weight(n=n, k=k, k_padded=padded, panels=panels, panel_bytes=nbytes, data_bytes=panels * nbytes, dtype=0)


@native("Linear")
def linear(tape: Recorder, node: Node) -> bool:
    """activation(x weightᵀ + bias + residual) on float32 rows."""
    x, weight, bias = tape.float_tensor(node.inputs[0]), node.inputs[1], node.input(2)
    if x is None or weight is None or not weight.is_constant or node.output.static_shape is None:
        return False
    if weight.dtype is not DType.FLOAT32 or len(x.shape) < 1 or not x.count:
        return False
    shift = tape.float_tensor(bias)
    residual = tape.float_tensor(node.input(3))
    if (bias is not None and shift is None) or (node.input(3) is not None and residual is None):
        return False
    n, k = weight.data.shape
    rows = prod(x.shape[:-1])
    x = x.view((rows, k)) or tape.rows(x).view((rows, k))
    assert x is not None
    if x.strides[1] != 1 and k != 1:
        x = tape.rows(x)
    args = LinearArgs(rows=rows, x_stride=x.strides[0], activation=ACTIVATIONS.index(node.attributes["activation"]))
    y = tape.output(node.output)
    in_place = []
    if residual is not None:
        residual = tape.rows(residual.expand(y.shape))
        args.residual_stride = n
        in_place = [(residual, y)]
    pointers = {"weight": weight_of(tape, weight, weight.data), "x": x, "bias": shift, "out": y, "residual": residual}
    tape.step("linear", args, pointers, in_place=in_place)
    return True
