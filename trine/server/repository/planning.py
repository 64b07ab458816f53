"""What follows from plans: the order of loading, and whether a change needs a load at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trine.core.errors import ConfigurationError, TrineError
from trine.server.repository.loader import Plan, members

ModelConfig = Any


def message_of(error: object) -> str:
    """What to say of a failure; what is no failure but an end (a cancelled task) is raised again."""
    if isinstance(error, TrineError):
        return error.message
    assert isinstance(error, BaseException)
    if not isinstance(error, Exception):
        raise error
    return f"{type(error).__name__}: {error}"


def in_dependency_order(plans: list[Plan]) -> list[list[Plan]]:
    """Stages to load one after the other: models, then ensembles of them, then ensembles of those."""
    remaining = {plan.folder.name: plan for plan in plans}
    stages: list[list[Plan]] = []
    while remaining:
        stage = [
            plan
            for name, plan in remaining.items()
            if not any(member in remaining and member != name for member, _ in members(plan.config))
        ]
        stage = stage or list(remaining.values())  # a circle: each fails with what it lacks
        stages.append(stage)
        for plan in stage:
            del remaining[plan.folder.name]
    return stages


def check_circle(config: ModelConfig, config_of: Callable[[str], ModelConfig | None]) -> None:
    """ConfigurationError where an ensemble is, by way of its members, a member of itself."""
    way: list[str] = []

    def visit(name: str, found: ModelConfig | None) -> None:
        if name in way:
            circle = " -> ".join([*way[way.index(name) :], name])
            raise ConfigurationError(f"circular dependency between ensembles: {circle}")
        way.append(name)
        for member, _ in members(found):
            visit(member, config if member == config.name else config_of(member))
        way.pop()

    visit(config.name, config)


def differ_in_instances_only(served: ModelConfig, wanted: ModelConfig) -> bool:
    """Whether instance groups are all that a new configuration changes."""
    before, after = type(wanted)(), type(wanted)()
    before.CopyFrom(served)
    after.CopyFrom(wanted)
    before.ClearField("instance_group")
    after.ClearField("instance_group")
    same: bool = before == after
    return same and not members(wanted)
