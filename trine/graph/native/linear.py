"""Products by a constant matrix, with what follows them."""

from __future__ import annotations

import ctypes
from math import prod

import torch

from trine.graph.dtypes import FROM_TORCH, DType
from trine.graph.errors import PlanError
from trine.graph.ir import Node, Value
from trine.graph.native.args import ACTIVATIONS, LinearArgs, Weight
from trine.graph.native.recorder import Recorder, native
from trine.graph.native.tape import library
from trine.graph.native.tensor import NUMBERS, Tensor

_PANEL = 16
_WEIGHTS = (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16)


def weight_of(tape: Recorder, weight: Value, data: torch.Tensor) -> Tensor:
    """The library's record of a matrix [n, k] in panels (csrc/runtime.h); the panels are shared and saved.

    The matrix is of float32, bfloat16 or float16.
    """
    record = _record(data)

    def pack() -> torch.Tensor:
        panels = torch.zeros(record.data_bytes, dtype=torch.uint8)
        own, source = _record(data), data.contiguous()
        own.data = panels.data_ptr()
        library().trine_weight_pack(ctypes.byref(own), source.data_ptr(), own.dtype)
        return panels

    panels = tape.constant(weight, "panels", pack)
    if panels.buffer.nbytes != record.data_bytes:
        raise PlanError(f"the plan's packed weight {weight.name!r} has the wrong size: build the plan again")
    record.data = panels.buffer.address
    address = tape.address(record)
    address.buffer.owner = (record, panels)
    return address


def _record(data: torch.Tensor) -> Weight:
    (n, k), dtype = data.shape, NUMBERS[FROM_TORCH[data.dtype]]
    padded, panels = -(-k // 32) * 32, -(-n // _PANEL)
    size = padded * _PANEL * data.element_size()
    return Weight(n=n, k=k, k_padded=padded, panels=panels, panel_bytes=size, data_bytes=panels * size, dtype=dtype)


@native("ReducedLinear")
@native("Linear")
def linear(tape: Recorder, node: Node) -> bool:
    """activation(x weightᵀ + bias + residual) on float32 rows. The weight may be stored in 16 bits: what arithmetic
    that takes is the processor's choice (bfloat16's own with AMX or AVX-512, else float32's).
    """
    x, weight, bias = tape.float_tensor(node.inputs[0]), node.inputs[1], node.input(2)
    if x is None or weight is None or not weight.is_constant or node.output.static_shape is None:
        return False
    if weight.dtype not in _WEIGHTS or len(x.shape) < 1 or not x.count:
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
    if y.dtype is not DType.FLOAT32:
        return False
    in_place = []
    if residual is not None:
        residual = tape.rows(residual.expand(y.shape))
        args.residual_stride = n
        in_place = [(residual, y)]
    pointers = {"weight": weight_of(tape, weight, weight.data), "x": x, "bias": shift, "out": y, "residual": residual}
    tape.step("linear", args, pointers, in_place=in_place)
    return True
