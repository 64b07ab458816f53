"""Matrix products and what is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from trine.graph.operators.elementwise import add
from trine.graph.operators.registry import operator


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product; integers in int64, cut back (torch's own wraps, too, but not for every type)."""
    if a.is_floating_point() or a.is_complex():
        return torch.matmul(a, b)
    return torch.matmul(a.long(), b.long()).to(a.dtype)


@operator("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b)


@operator("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """alpha A' B' + beta C, where C broadcasts to the product."""
    y = _product(a.T if transA else a, b.T if transB else b)
    if alpha != 1:
        y = (y * alpha).to(a.dtype)
    if c is None or beta == 0:
        return y
    if beta != 1:
        c = (c * beta).to(a.dtype)
    if torch.broadcast_shapes(y.shape, c.shape) != y.shape:
        raise ValueError(f"Gemm adds C {list(c.shape)} to a product {list(y.shape)}, to which it can't broadcast")
    return add(y, c)


@operator("Einsum")
def einsum(*inputs: Tensor, equation: str) -> Tensor:
    if not inputs[0].is_floating_point():
        return torch.einsum(equation, *(x.long() for x in inputs)).to(inputs[0].dtype)
    return torch.einsum(equation.replace(" ", ""), *inputs)


@operator("Det")
def det(x: Tensor) -> Tensor:
    return torch.linalg.det(x)


@operator("Linear")
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, activation: str = ""
) -> Tensor:
    """Trine's own: activation(x [..., K] @ weight [N, K]ᵀ + bias [N] + residual [..., N])."""
    y = torch.matmul(x, weight.T)
    if bias is not None:
        y = y + bias
    return activate(y if residual is None else y + residual, activation)


def activate(x: Tensor, activation: str) -> Tensor:
    """What fused operators apply last: "" for nothing, or a name of `_ACTIVATIONS`."""
    return _ACTIVATIONS[activation](x) if activation else x


_ACTIVATIONS = {
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": torch.nn.functional.hardswish,
}
