"""One output element from one element of each input: arithmetic, comparison, logic, activations.

torch has no arithmetic on uint16, uint32 and uint64: NumPy computes those.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trine.graph.operators.registry import operator

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def _binary(name: str, function: Callable[..., Any], unsigned: Callable[..., Any]) -> Callable[..., Any]:
    def apply(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype in _UNSIGNED:
            with np.errstate(all="ignore"):
                return torch.from_numpy(np.asarray(unsigned(a.numpy(), b.numpy())))
        result: Tensor = function(a, b)
        return result

    apply.__name__ = name.lower()
    apply.__doc__ = f"ONNX {name}, with NumPy's broadcasting."
    return operator(name)(apply)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided towards zero, as C does."""
    if a.is_floating_point() or a.is_complex():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


add = _binary("Add", torch.add, np.add)
sub = _binary("Sub", torch.sub, np.subtract)
mul = _binary("Mul", torch.mul, np.multiply)
div = _binary("Div", _divide, np.floor_divide)
greater = _binary("Greater", torch.gt, np.greater)
less = _binary("Less", torch.lt, np.less)
greater_or_equal = _binary("GreaterOrEqual", torch.ge, np.greater_equal)
less_or_equal = _binary("LessOrEqual", torch.le, np.less_equal)
bitwise_and = _binary("BitwiseAnd", torch.bitwise_and, np.bitwise_and)
bitwise_or = _binary("BitwiseOr", torch.bitwise_or, np.bitwise_or)
bitwise_xor = _binary("BitwiseXor", torch.bitwise_xor, np.bitwise_xor)
maximum = _binary("_Maximum", torch.maximum, np.maximum)
minimum = _binary("_Minimum", torch.minimum, np.minimum)


@operator("Equal")
def equal(a: Tensor, b: Tensor) -> Tensor:
    """Also of strings and booleans."""
    if isinstance(a, np.ndarray):
        return torch.from_numpy(np.asarray(a == b, dtype=bool))
    return torch.eq(a, b)


@operator("And")
def logical_and(a: Tensor, b: Tensor) -> Tensor:
    return torch.logical_and(a, b)


@operator("Or")
def logical_or(a: Tensor, b: Tensor) -> Tensor:
    return torch.logical_or(a, b)


@operator("Xor")
def logical_xor(a: Tensor, b: Tensor) -> Tensor:
    return torch.logical_xor(a, b)


@operator("Pow")
def power(a: Tensor, b: Tensor) -> Tensor:
    """The result has the base's dtype: an integer base to a float power is computed in floats and cut."""
    if a.dtype in _UNSIGNED or b.dtype in _UNSIGNED:
        with np.errstate(all="ignore"):
            computed = np.asarray(np.power(a.numpy(), b.numpy()))
        return torch.from_numpy(computed).to(a.dtype)
    if not a.is_floating_point() and not b.is_floating_point():
        return _integer_power(a, b)
    return torch.pow(a if a.is_floating_point() else a.double(), b).to(a.dtype)


def _integer_power(a: Tensor, b: Tensor) -> Tensor:
    """torch refuses negative exponents of integers; the result is cut towards zero, as C's pow cast back."""
    if bool((b < 0).any()):
        return torch.pow(a.double(), b.double()).to(a.dtype)
    return torch.pow(a, b).to(a.dtype)


@operator("Mod")
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """The sign of the divisor (Python's %), or with fmod=1 of the dividend (C's fmod)."""
    if a.dtype in _UNSIGNED:
        return torch.from_numpy(np.asarray(np.mod(a.numpy(), b.numpy())))
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@operator("BitShift")
def bit_shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    """Shifts of as many bits as the type has, or more, give 0."""
    shift = np.left_shift if direction == "LEFT" else np.right_shift
    numbers, counts = a.numpy(), b.numpy()
    bits = numbers.dtype.itemsize * 8
    shifted = shift(numbers, np.minimum(counts, np.array(bits - 1, counts.dtype)))
    return torch.from_numpy(np.asarray(np.where(counts >= bits, np.zeros((), numbers.dtype), shifted)))


@operator("Where")
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(x, np.ndarray):
        return np.where(condition.numpy(), x, y)
    return torch.where(condition, x, y)


def _variadic(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(*inputs: Tensor) -> Tensor:
        return reduce(function, inputs)

    apply.__doc__ = f"ONNX {name} of one or more tensors, with broadcasting."
    return operator(name)(apply)


sum_ = _variadic("Sum", add)
max_ = _variadic("Max", maximum)
min_ = _variadic("Min", minimum)


@operator("Mean")
def mean(*inputs: Tensor) -> Tensor:
    return reduce(torch.add, inputs) / len(inputs)


def _unary(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        return function(x)

    apply.__doc__ = f"ONNX {name}."
    return operator(name)(apply)


_AS_TORCH_CALLS_THEM = (
    "Acos Acosh Asin Asinh Atan Atanh Cos Cosh Erf Exp Log Reciprocal Sigmoid Sign Sin Sinh Sqrt Tan Tanh Neg"
)
for _name in _AS_TORCH_CALLS_THEM.split():
    _unary(_name, getattr(torch, _name.lower()))
_unary("Round", torch.round)  # halves go to the even neighbour, as ONNX wants
_unary("IsNaN", torch.isnan)
_unary("Not", torch.logical_not)
_unary("BitwiseNot", lambda x: torch.from_numpy(np.invert(x.numpy())) if x.dtype in _UNSIGNED else torch.bitwise_not(x))
_unary("Abs", lambda x: x.clone() if x.dtype in _UNSIGNED else torch.abs(x))
_unary("Floor", torch.floor)
_unary("Ceil", torch.ceil)
_unary("Relu", torch.relu)
_unary("Softplus", lambda x: torch.logaddexp(x, torch.zeros((), dtype=x.dtype)))
_unary("Softsign", torch.nn.functional.softsign)
_unary("HardSwish", torch.nn.functional.hardswish)
_unary("Mish", torch.nn.functional.mish)


@operator("Identity")
def identity(x: Any) -> Any:
    return x


@operator("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    x = x.float() if x.dtype.itemsize == 1 else x
    infinite = torch.isinf(x)
    if not detect_negative:
        infinite &= x > 0
    if not detect_positive:
        infinite &= x < 0
    return infinite


@operator("Clip")
def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Where low > high, every element becomes high."""
    if low is not None:
        x = maximum(x, low)
    return x if high is None else minimum(x, high)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return torch.nn.functional.leaky_relu(x, alpha)


@operator("PRelu")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x < 0, alpha * torch.expm1(x), x)


@operator("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.clamp(x, min=0) + torch.clamp(alpha * torch.expm1(x / alpha), max=0)


@operator("Selu")
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


@operator("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros((), dtype=x.dtype))


@operator("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    zero = torch.zeros((), dtype=x.dtype)
    shrunk = torch.where(x > lambd, x - bias, torch.where(x < -lambd, x + bias, zero))
    return shrunk.to(x.dtype)


@operator("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


@operator("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x times the logistic function of alpha x; alpha = 1 is SiLU."""
    return torch.nn.functional.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("Dropout")
def dropout(
    x: Tensor, ratio: Tensor | None = None, training_mode: Tensor | None = None, *, seed: int = 0, _outputs: int = 1
) -> Any:
    """Inference: x itself, and a mask of ones. Training drops each element with probability `ratio` (0.5)."""
    probability = 0.5 if ratio is None else float(ratio)
    mask = torch.ones(x.shape, dtype=torch.bool)
    if training_mode is not None and bool(training_mode) and probability > 0:
        drawn = np.random.RandomState(seed).uniform(0, 1, tuple(x.shape))
        mask = torch.from_numpy(np.asarray(drawn >= probability))
        x = torch.where(mask, x * (1 / (1 - probability)), torch.zeros((), dtype=x.dtype))
    return (x, mask) if _outputs > 1 else x
