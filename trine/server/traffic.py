"""Traffic splitting: requests that name no version are spread over versions by weight.

A request with a key (header `trine-traffic-key`, or a sequence) always goes to the same version while the weights
stay, and few keys move when they change. The header `trine-traffic-version` overrides the choice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from trine.server.errors import ServerError
from trine.server.request import InferRequest

if TYPE_CHECKING:
    from trine.server.model import ServedModel

KEY_HEADER = "trine-traffic-key"
VERSION_HEADER = "trine-traffic-version"
_GOLDEN = 0.6180339887498949  # a step that spreads points evenly over [0, 1), whatever their number
_ARM = re.compile(r"\s*(\d+)\s*=\s*(\d+(?:\.\d+)?)\s*%?\s*")


class TrafficSplit:
    """The versions of a model and their weights. Arms lie by version on [0, 1)."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        given = {version: float(weight) for version, weight in weights.items()}
        if not given or any(not 0 <= weight < 1e9 for weight in given.values()) or sum(given.values()) <= 0:
            raise ServerError(
                f"traffic weights {dict(weights)} can't be used: give numbers from 0 on, at least one above 0, such as "
                "1=90 2=10"
            )
        self.weights = dict(sorted(given.items(), key=lambda item: int(item[0]) if item[0].isdigit() else 0))
        self.counts = dict.fromkeys(self.weights, 0)
        """Requests that each version got by this split."""
        total = sum(self.weights.values())
        self._bounds = list(accumulate(weight / total for weight in self.weights.values()))
        self._versions = list(self.weights)
        self._point = 0.0
        self._find: Callable[[str], ServedModel] | None = None

    @classmethod
    def parse(cls, arms: list[str]) -> TrafficSplit:
        """From "1=90", "2=10" …; ServerError says how it is written."""
        weights: dict[str, float] = {}
        for arm in arms:
            found = _ARM.fullmatch(arm)
            if found is None or found[1] in weights:
                raise ServerError(f"traffic {arm!r} is not VERSION=WEIGHT, each version once, such as 1=90 2=10")
            weights[found[1]] = float(found[2])
        return cls(weights)

    def attach(self, find: Callable[[str], ServedModel], ready: list[str]) -> None:
        """`find` gives a version. ServerError where one with a weight is not ready."""
        missing = [version for version, weight in self.weights.items() if weight and version not in ready]
        if missing:
            raise ServerError(
                f"traffic can't go to version {', '.join(missing)}: ready are {', '.join(ready)}; set version_policy "
                "so that the versions are served side by side"
            )
        self._find = find

    def choose(self, request: InferRequest) -> ServedModel | None:
        """The model for this request; None: whoever is asked."""
        assert self._find is not None
        version = self._version(request)
        try:
            model = self._find(version)
        except ServerError:  # the version was unloaded: the newest one answers
            return None
        if version in self.counts:
            self.counts[version] += 1
        return model

    def _version(self, request: InferRequest) -> str:
        context = request.context or {}
        if VERSION_HEADER in context:
            return context[VERSION_HEADER]
        key = context.get(KEY_HEADER) or request.sequence_id
        if key:
            digest = hashlib.blake2b(str(key).encode(), digest_size=8).digest()
            point = int.from_bytes(digest, "little") / 2**64
        else:
            point = self._point = (self._point + _GOLDEN) % 1.0
        for version, bound in zip(self._versions, self._bounds, strict=True):
            if point < bound:
                return version
        return next(version for version in reversed(self._versions) if self.weights[version])

    def describe(self) -> dict[str, object]:
        """Weights in percent and requests so far, by version."""
        total = sum(self.weights.values())
        return {
            "weights": {version: round(100 * weight / total, 4) for version, weight in self.weights.items()},
            "requests": dict(self.counts),
        }
