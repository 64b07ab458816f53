"""Dimensions that may be symbols: a result is a number, or a name so that equal names are equal numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import count

from trine.graph.ir import Dim, Shape

_fresh = count(1)


def unknown() -> Dim:
    """A dimension of which nothing is known."""
    return f"?{next(_fresh)}"


def _factors(dim: Dim) -> tuple[int, Counter[str]]:
    if isinstance(dim, int):
        return dim, Counter()
    number, symbols = 1, Counter[str]()
    for part in dim.split("*"):
        if part.isdigit():
            number *= int(part)
        else:
            symbols[part] += 1
    return number, symbols


def _named(number: int, symbols: Counter[str]) -> Dim:
    if number == 0 or not symbols:
        return number
    parts = sorted(symbols.elements())
    return "*".join(parts if number == 1 else [str(number), *parts])


def multiply(*dims: Dim) -> Dim:
    number, symbols = 1, Counter[str]()
    for dim in dims:
        factor, names = _factors(dim)
        number *= factor
        symbols += names
    return _named(number, symbols)


def divide(a: Dim, b: Dim) -> Dim | None:
    """a / b where it is known to be exact, else None."""
    (number, symbols), (divisor, names) = _factors(a), _factors(b)
    if divisor == 0 or number % divisor or names - symbols:
        return None
    return _named(number // divisor, symbols - names)


def apply(function: str, *dims: Dim) -> Dim:
    """The name of a function of dimensions of which one is a symbol: a pure function of its arguments."""
    return f"{function}({','.join(str(dim).replace('*', '·') for dim in dims)})"


def add(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0:
        return b
    return a if b == 0 else apply("add", *sorted((a, b), key=str))


def subtract(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return 0 if a == b else a if b == 0 else apply("sub", a, b)


def floor_divide(a: Dim, b: Dim) -> Dim:
    exact = divide(a, b)
    if exact is not None:
        return exact
    if isinstance(a, int) and isinstance(b, int) and b:
        return a // b
    return apply("floordiv", a, b)


def window(size: Dim, kernel: int, stride: int, dilation: int, padding: int, ceil_mode: bool = False) -> Dim:
    """Places of a window that slides over `size` padded elements."""
    if kernel == 1 and stride == 1 and padding == 0:
        return size
    reach = (kernel - 1) * dilation + 1
    if isinstance(size, str):
        if stride == 1 and padding == reach - 1:
            return size
        return apply("window", size, reach, stride, padding, int(ceil_mode))
    space = size + padding - reach
    return (-(-space // stride) if ceil_mode else space // stride) + 1


def broadcast(a: Shape, b: Shape) -> Shape | None:
    """NumPy's rule; None where the shapes can't go together."""
    rank = max(len(a), len(b))
    left, right = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    dims: list[Dim] = []
    for x, y in zip(left, right, strict=True):
        if x == y or y == 1:
            dims.append(x)
        elif x == 1:
            dims.append(y)
        elif isinstance(x, int) and isinstance(y, int):
            return None
        elif isinstance(x, int) or isinstance(y, int):
            dims.append(x if isinstance(x, int) else y)  # the symbol is 1, or the number
        else:
            dims.append(apply("broadcast", *sorted((x, y))))
    return tuple(dims)


def numel(shape: Iterable[Dim]) -> Dim:
    return multiply(*shape)
