"""What products and convolutions do with their sums before they write them."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("", "relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish")
"""Names of activations; kernels know them by their place."""


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
    elif activation == 8:
        x = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    return x


@triton.jit
def rounded(x, inverse_scale):
    """x times the inverse of its scale, within what float8 (e4m3) holds."""
    return tl.minimum(tl.maximum(x * inverse_scale, -448.0), 448.0)
