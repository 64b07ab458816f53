"""What products and convolutions do with their sums before they write them."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("", "relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish", "gelu_fast")
"""Names of activations; kernels know them by their place. The last is GELU by the card's own tanh: it differs from the
exact one by less than 1e-3, and costs a third of its instructions. On a CPU it is the exact one.
"""


def place(activation: str, on_gpu: bool) -> int:
    """The activation's place, for a kernel on a GPU or in the interpreter."""
    return ACTIVATIONS.index("gelu" if activation == "gelu_fast" and not on_gpu else activation)


@triton.jit
def activate(x, activation: tl.constexpr):
    """The activation of ACTIVATIONS at that place, of float32 numbers."""
    if activation == 1:
        x = tl.maximum(x, 0.0)
    elif activation == 2:
        x = tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif activation == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == 4:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif activation == 5:
        x = x * tl.sigmoid(x)
    elif activation == 6:
        x = tl.sigmoid(x)
    elif activation == 7:
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif activation == 9:
        inner = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], tl.float32, True, 1)
        x = 0.5 * x + 0.5 * x * tanh
    elif activation == 8:
        x = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    return x


@triton.jit
def rounded(x, inverse_scale):
    """x times the inverse of its scale, within what float8 (e4m3) holds."""
    return tl.minimum(tl.maximum(x * inverse_scale, -448.0), 448.0)
