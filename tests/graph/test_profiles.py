"""Profiles: what is tuned for, what is refused, and how both are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trine.graph as tg
from tests.graph.models import model, node, weights
from trine.core.errors import ConfigurationError
from trine.graph.profiles import Range, read_profiles


def product() -> Any:
    """y = relu(x w), and z = x + k with k of x's rows."""
    nodes = [node("MatMul", "x w", "p"), node("Relu", "p", "y"), node("Add", "x k", "z")]
    return model(nodes, {"x": ["n", 4], "k": ["n", 1]}, ["y", "z"], {"w": weights(4, 3)})


def rows(count: int) -> dict[str, Any]:
    return {"x": np.ones((count, 4), np.float32), "k": np.ones((count, 1), np.float32)}


def test_the_nth_mention_of_an_input_is_of_the_nth_profile() -> None:
    found = read_profiles(["x:1x4,k:1x1", "x:9x4"], ["x:2x4"], ["x:4x4,k:4x1", "x:16x4"])
    assert found == [
        {"x": Range((2, 4), (1, 4), (4, 4)), "k": Range((4, 1), (1, 1), (4, 1))},
        {"x": Range((16, 4), (9, 4), (16, 4))},
    ]
    assert read_profiles([], ["a:b:0:7"], []) == [{"a:b:0": Range((7,))}]


@pytest.mark.parametrize("text", ["x", "x:", ":1x2", "x:1x", "x:-1x2", "x:1.5", "x:1x2,", "x:1 x2"])
def test_a_shape_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write NAME:1x3x224x224"):
        read_profiles([], [text], [])


def test_a_plan_refuses_what_lies_in_no_profile(tmp_path: Path) -> None:
    profiles = read_profiles(["x:1x4,k:1x1", "x:9x4,k:9x1"], ["x:2x4,k:2x1"], ["x:4x4,k:4x1", "x:16x4,k:16x1"])
    tg.build(product(), profiles=profiles).save(tmp_path / "m.plan")
    plan = tg.load_plan(tmp_path / "m.plan")
    for count in (1, 4, 9, 16):
        np.testing.assert_array_equal(plan.run(rows(count))["z"], np.full((count, 4), 2, np.float32))
    for count in (5, 17):
        message = f"'x' has shape .{count}, 4., outside the plan's profiles: dimension 0 is {count}, it must be 1 to 4;"
        with pytest.raises(tg.InputError, match=message):
            plan.run(rows(count))
    assert plan.inspect()["profiles"][1]["x"] == {"min": (9, 4), "opt": (16, 4), "max": (16, 4)}


def test_a_shape_to_tune_for_refuses_nothing() -> None:
    plan = tg.build(product(), profiles=read_profiles([], ["x:8x4"], []))
    for count in (1, 8, 30):
        assert plan.run(rows(count))["y"].shape == (count, 3)


@pytest.mark.parametrize(
    ("least", "opt", "most", "message"),
    [
        ("u:1x4", "u:1x4", "u:1x4", "no input is called 'u': x, k"),
        ("x:1x5", "x:1x5", "x:1x5", r"'x': 1x5 is not a shape of the model, which has \?x4"),
        ("x:4", "x:4", "x:4", r"4 is not a shape of the model"),
        ("x:3x4", "x:2x4", "x:4x4", "3x4 ≤ 2x4 ≤ 4x4 does not hold"),
        ("x:1x4,k:1x1", "x:2x4,k:3x1", "x:4x4,k:4x1", "'k': n is 3 here, and 2 in another input"),
    ],
)
def test_profiles_that_do_not_fit_the_model_are_refused(least: str, opt: str, most: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tg.build(product(), profiles=read_profiles([least], [opt], [most]))


def test_a_budget_of_nothing_times_nothing(tmp_path: Path) -> None:
    filters = model(
        [node("Conv", "x w", "y", pads=[1, 1, 1, 1])], {"x": [1, 16, 8, 8]}, ["y"], {"w": weights(16, 16, 3, 3)}
    )
    hurried = tg.build(filters, budget=0)
    assert [choice.times for choice in hurried.choices.values()] == [{}]
    timed = tg.build(filters, timing_cache=tmp_path / "times.json")
    assert all(len(choice.times) > 1 for choice in timed.choices.values())
    cached = tg.build(filters, timing_cache=tmp_path / "times.json", budget=0)
    assert [choice.times for choice in cached.choices.values()] == [choice.times for choice in timed.choices.values()]
