"""Profiles: the shapes of a model's inputs that a plan is tuned for, and those that it takes.

A profile gives some inputs a least, a best and a largest shape. The plan is tuned at the best. A plan with profiles
that have bounds takes what lies in one of them; a plan without takes every shape that the model takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trine.core.errors import ConfigurationError
from trine.graph.errors import InputError
from trine.graph.ir import Graph, Value

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Shapes of one input: tuned for `opt`; `least` and `most` are None where nothing is refused."""

    opt: Sizes
    least: Sizes | None = None
    most: Sizes | None = None

    def misses(self, shape: Sequence[int]) -> int | None:
        """The first dimension that is out of range."""
        if self.least is None or self.most is None:
            return None
        for axis, (low, size, high) in enumerate(zip(self.least, shape, self.most, strict=True)):
            if not low <= size <= high:
                return axis
        return None


Profile = Mapping[str, Range]
"""By the input's name. An input that is not there takes every shape."""


def read_profiles(least: Sequence[str], opt: Sequence[str], most: Sequence[str]) -> list[Profile]:
    """From texts as `NAME:1x3x224x224,NAME:…`: the n-th mention of an input is of the n-th profile.

    Without `opt` the largest shape is tuned for, without `least` or `most` that one is the bound; with `opt` alone
    nothing is refused.
    """
    kinds = [_by_profile(texts) for texts in (least, opt, most)]
    profiles: list[Profile] = []
    for index in range(max(map(len, kinds))):
        low, best, high = (kind[index] if index < len(kind) else {} for kind in kinds)
        profiles.append({name: _range(name, low, best, high) for name in {**low, **best, **high}})
    return profiles


def read_shapes(text: str) -> list[tuple[str, Sizes]]:
    """`NAME:1x3x224x224,NAME:…`; names may hold colons. ConfigurationError for another form."""
    found = []
    for part in text.split(","):
        name, colon, dims = part.rpartition(":")
        sizes = tuple(int(dim) if dim.isdecimal() else -1 for dim in dims.split("x"))
        if not colon or not name or any(size < 0 for size in sizes):
            raise ConfigurationError(f"{part!r} is not a shape: write NAME:1x3x224x224")
        found.append((name, sizes))
    return found


def _by_profile(texts: Sequence[str]) -> list[dict[str, Sizes]]:
    profiles: list[dict[str, Sizes]] = []
    for text in texts:
        for name, sizes in read_shapes(text):
            free = next((profile for profile in profiles if name not in profile), None)
            if free is None:
                free = {}
                profiles.append(free)
            free[name] = sizes
    return profiles


def _range(name: str, low: dict[str, Sizes], best: dict[str, Sizes], high: dict[str, Sizes]) -> Range:
    least, opt, most = low.get(name), best.get(name), high.get(name)
    if least is None and most is None:
        assert opt is not None
        return Range(opt)
    opt = opt or most or least
    assert opt is not None
    return Range(opt, opt if least is None else least, opt if most is None else most)


def check_profiles(profiles: Sequence[Profile], graph: Graph) -> None:
    """That they fit the model's inputs. ConfigurationError names profile, input and value."""
    inputs = {value.name: value for value in graph.inputs}
    for number, profile in enumerate(profiles):
        sizes: dict[str, int] = {}
        for name, bounds in profile.items():
            where = f"profile {number}, input {name!r}"
            if name not in inputs:
                raise ConfigurationError(f"profile {number}: no input is called {name!r}: {', '.join(inputs)}")
            least, most = bounds.least or bounds.opt, bounds.most or bounds.opt
            for shape in (least, bounds.opt, most):
                _check_declared(inputs[name], shape, where)
            if any(not low <= best <= high for low, best, high in zip(least, bounds.opt, most, strict=True)):
                shown = " ≤ ".join(_text(shape) for shape in (least, bounds.opt, most))
                raise ConfigurationError(f"{where}: {shown} does not hold in every dimension")
            for dim, size in zip(inputs[name].shape or (), bounds.opt, strict=False):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise ConfigurationError(f"{where}: {dim} is {size} here, and {sizes[dim]} in another input")


def _check_declared(value: Value, shape: Sizes, where: str) -> None:
    if value.shape is None:
        return
    fits = len(shape) == len(value.shape)
    if not fits or any(isinstance(d, int) and d != s for d, s in zip(value.shape, shape, strict=True)):
        declared = "x".join("?" if isinstance(dim, str) else str(dim) for dim in value.shape)
        raise ConfigurationError(f"{where}: {_text(shape)} is not a shape of the model, which has {declared}")


def find_profile(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The first profile that these inputs lie in; None where there are none. InputError says what is out of range."""
    for number, profile in enumerate(profiles):
        if all(_holds(bounds, shapes.get(name)) for name, bounds in profile.items()):
            return number
    if not profiles:
        return None
    raise _outside(profiles, shapes)


def _holds(bounds: Range, shape: Sequence[int] | None) -> bool:
    return shape is None or (len(shape) == len(bounds.opt) and bounds.misses(shape) is None)


def _outside(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> InputError:
    """Names the dimension of the first input that no profile takes; else the first that the first profile does not."""
    misses = {
        name: [_miss(profile[name], shape) for profile in profiles if name in profile and profile[name].least]
        for name, shape in shapes.items()
    }
    name = next((name for name, found in misses.items() if found and all(found)), "")
    name = name or next(name for name, found in misses.items() if any(found))
    texts = list(dict.fromkeys(text for text in misses[name] if text))
    shape = list(shapes[name])
    return InputError(
        f"input {name!r} has shape {shape}, outside the plan's profile{'s' if len(profiles) > 1 else ''}: "
        f"{'; '.join(texts)}",
        param=name,
    )


def _miss(bounds: Range, shape: Sequence[int]) -> str:
    """What is out of range; "" if nothing is."""
    if len(shape) != len(bounds.opt):
        return f"it must have {len(bounds.opt)} dimensions"
    axis = bounds.misses(shape)
    if axis is None or bounds.least is None or bounds.most is None:
        return ""
    return f"dimension {axis} is {shape[axis]}, it must be {bounds.least[axis]} to {bounds.most[axis]}"


def described(profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """As a plan file's header, and `Plan.inspect()`, have them."""
    return [
        {name: {"min": bounds.least, "opt": bounds.opt, "max": bounds.most} for name, bounds in profile.items()}
        for profile in profiles
    ]


def from_description(described_profiles: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Profile]:
    """What `described` gave. ValueError or KeyError for another form."""

    def sizes(shape: Sequence[int] | None) -> Sizes | None:
        return None if shape is None else tuple(int(size) for size in shape)

    profiles: list[Profile] = []
    for profile in described_profiles:
        ranges = {}
        for name, item in profile.items():
            ranges[name] = Range(tuple(map(int, item["opt"])), sizes(item["min"]), sizes(item["max"]))
        profiles.append(ranges)
    return profiles


def _text(shape: Sizes) -> str:
    return "x".join(map(str, shape)) or "scalar"
