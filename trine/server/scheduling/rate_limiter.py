"""The rate limiter: instances of all models share named resources, and execute only while they hold what they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trine.core.errors import ConfigurationError
from trine.server.backends.base import Device

if TYPE_CHECKING:
    from trine.server.instances import InstancePool

Resource = tuple[str, int | None]
"""Name, and the device that has it; None: it is global."""


@dataclass(slots=True)
class Claim:
    """What one instance needs to execute. `executions` × `priority` decides who is next: 2 has half the chances."""

    needs: dict[Resource, int]
    priority: int
    executions: int = 0


class RateLimiter:
    """Counts what is taken. There is as much of a resource as the settings say, else as its largest claim needs."""

    def __init__(self, amounts: Mapping[Resource, int]) -> None:
        self._given = dict(amounts)
        self._claims: list[Claim] = []
        self._taken: dict[Resource, int] = {}
        self._waiting: list[InstancePool] = []

    def claim(self, group: Any, device: Device) -> Claim:
        """The claim of an instance of an instance group. ConfigurationError where there will never be enough."""
        index = device.index if device.kind == "cuda" else 0
        limiter = group.rate_limiter
        needs: dict[Resource, int] = {
            (resource.name, None if getattr(resource, "global") else index): resource.count
            for resource in limiter.resources
        }
        for resource, count in needs.items():
            amount = self._given.get(resource, self._given.get((resource[0], None)))
            if amount is not None and count > amount:
                raise ConfigurationError(
                    f"instance group {group.name} needs {count} of resource {resource[0]!r}, there are {amount}: raise "
                    "--rate-limit-resource, or ask for fewer"
                )
        made = Claim(needs, max(1, limiter.priority))
        self._claims.append(made)
        return made

    def release_claim(self, claim: Claim) -> None:
        """The instance is gone."""
        self._claims.remove(claim)

    def available(self, claim: Claim) -> bool:
        return all(
            self._taken.get(resource, 0) + count <= self._amount(resource) for resource, count in claim.needs.items()
        )

    def _amount(self, resource: Resource) -> int:
        given = self._given.get(resource)
        if given is not None:
            return given
        return max((claim.needs.get(resource, 0) for claim in self._claims), default=0)

    def take(self, claim: Claim) -> None:
        for resource, count in claim.needs.items():
            self._taken[resource] = self._taken.get(resource, 0) + count
        claim.executions += 1

    def give_back(self, claim: Claim) -> None:
        for resource, count in claim.needs.items():
            self._taken[resource] -= count

    def wait(self, pool: InstancePool) -> None:
        """The pool has something to compute and an idle instance that lacks resources."""
        if pool not in self._waiting:
            self._waiting.append(pool)

    def wake(self, pool: InstancePool) -> None:
        """Resources are free again, given back by `pool`: those that had the fewest turns go first."""
        waiting, self._waiting = [*self._waiting, *([] if pool in self._waiting else [pool])], []
        for candidate in sorted(waiting, key=lambda candidate: candidate.turns):
            candidate.on_free()
