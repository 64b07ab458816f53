"""Ensembles: graphs of models, side by side where they can be, streams in order, failures as themselves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from tests.server.serving import SleepingBackend, infer, row, scaling, serving, slow, start, write_model
from trine.core.errors import ModelLoadError
from trine.server.errors import Code, ServerError


def ensemble(root: Path, name: str, steps: str, *, extra: str = "", dims: int = 4, batch: int = 8) -> None:
    write_model(
        root,
        name,
        f"""platform: "ensemble" max_batch_size: {batch}
        input [{{ name: "x" data_type: TYPE_FP32 dims: [{dims}] }}]
        output [{{ name: "y" data_type: TYPE_FP32 dims: [{dims}] }}] {extra}
        ensemble_scheduling {{ step [ {steps} ] }}""",
    )


def step(model: str, source: str, target: str, *, version: int = -1, names: tuple[str, str] = ("x", "y")) -> str:
    return f"""{{ model_name: "{model}" model_version: {version}
      input_map {{ key: "{names[0]}" value: "{source}" }} output_map {{ key: "{names[1]}" value: "{target}" }} }}"""


IO = ("IN", "OUT")


async def test_tensors_go_through_the_graph_and_versions_are_honoured(tmp_path: Path) -> None:
    scaling(tmp_path, "scale", {"1": 2.0, "2": 3.0}, "version_policy { all { } } max_batch_size: 8")
    ensemble(tmp_path, "e", step("scale", "x", "mid", version=1) + "," + step("scale", "mid", "y"))
    async with serving(tmp_path) as repository:
        answer = await infer(repository, "e", {"x": np.ones((2, 4), np.float32)}, id="q")
        assert answer["y"].tolist() == [[6.0] * 4] * 2
        statistics = repository.model("e").statistics
        assert (statistics.success.count, statistics.inference_count, statistics.execution_count) == (1, 2, 1)
        assert repository.model("scale", "1").statistics.success.count == 1
        assert repository.is_ready("e")
        assert not repository.model("e").busy


async def test_independent_steps_run_side_by_side(tmp_path: Path) -> None:
    extra = 'parameters { key: "delay_ms" value { string_value: "60" } }'
    slow(tmp_path, "left", extra)
    slow(tmp_path, "right", extra)
    write_model(
        tmp_path,
        "e",
        f"""platform: "ensemble" max_batch_size: 8 input [{{ name: "x" data_type: TYPE_FP32 dims: [1] }}]
        output [{{ name: "a" data_type: TYPE_FP32 dims: [1] }}, {{ name: "b" data_type: TYPE_FP32 dims: [1] }}]
        ensemble_scheduling {{ step [ {step("left", "x", "a", names=IO)}, {step("right", "x", "b", names=IO)} ] }}""",
    )
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        answer = await infer(repository, "e", {"x": row(5)})
        assert (answer["a"].item(), answer["b"].item()) == (5, 5)
        assert backend.most_concurrent == 2
        only = await infer(repository, "e", {"x": row(6)}, outputs=["b"])
        assert list(only) == ["b"]
        assert [name for name, _ in backend.batches].count("left:0") == 1  # nobody needed it the second time


async def test_responses_of_a_decoupled_member_each_go_on_and_keep_their_order(tmp_path: Path) -> None:
    slow(tmp_path, "stream", "model_transaction_policy { decoupled: true }")
    slow(
        tmp_path,
        "after",
        """instance_group [{ kind: KIND_CPU count: 3 }]
        parameters { key: "delay_ms" value { string_value: "5" } }
        parameters { key: "repeat" value { string_value: "-1" } }""",
    )
    steps = step("stream", "x", "mid", names=IO) + "," + step("after", "mid", "y", names=IO)
    ensemble(tmp_path, "e", steps, dims=1)
    ensemble(tmp_path, "bounded", steps, dims=1)
    config = tmp_path / "bounded" / "config.pbtxt"
    config.write_text(
        config.read_text().replace("ensemble_scheduling {", "ensemble_scheduling { max_inflight_requests: 1")
    )
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        assert repository.model("e").decoupled
        for name, most in (("e", 3), ("bounded", 1)):
            backend.most_concurrent = 0
            responses = await start(repository, name, {"x": row(6)})
            assert [response.outputs[0].array.item() for response in responses if response.outputs] == [
                0,
                1,
                2,
                3,
                4,
                5,
            ]
            assert [response.final for response in responses] == [False] * 6 + [True]
            assert backend.most_concurrent <= most
            none = await start(repository, name, {"x": row(0)})
            assert [(len(response.outputs), response.final) for response in none] == [(0, True)]


async def test_a_failing_member_fails_the_ensemble_with_its_reason(tmp_path: Path) -> None:
    slow(tmp_path, "bad", 'parameters { key: "fails" value { string_value: "1" } }')
    ensemble(tmp_path, "e", step("bad", "x", "y", names=IO), dims=1)
    async with serving(tmp_path) as repository:
        with pytest.raises(ServerError, match=r"^told to fail$"):
            await infer(repository, "e", {"x": row(1)})
        assert repository.model("e").statistics.fail.count == 1
        assert repository.model("e").statistics.failures["OTHER"] == 2
        assert repository.model("bad").statistics.failures["BACKEND"] == 1


async def test_cancelling_reaches_the_members(tmp_path: Path) -> None:
    slow(tmp_path, "m", 'parameters { key: "delay_ms" value { string_value: "60" } }')
    ensemble(tmp_path, "e", step("m", "x", "y", names=IO), dims=1)
    backend = SleepingBackend()
    async with serving(tmp_path, backend) as repository:
        first = start(repository, "e", {"x": row(1)})
        await asyncio.sleep(0.01)
        second = start(repository, "e", {"x": row(2)})
        await asyncio.sleep(0.01)
        second.request.cancel()  # type: ignore[attr-defined]
        with pytest.raises(ServerError) as cancelled:
            await second
        assert cancelled.value.error_code is Code.CANCELLED
        await first
        assert [values for _, values in backend.batches] == [[1.0]]
        async with asyncio.timeout(10):  # the queue looks at it when the next batch is made
            while repository.model("m").statistics.failures["CANCELED"] != 1:
                await asyncio.sleep(0.01)


async def test_optional_inputs_pass_through(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        "both",
        """backend: "identity" max_batch_size: 4
        input [{ name: "A" data_type: TYPE_FP32 dims: [1] },
               { name: "B" data_type: TYPE_FP32 dims: [1] optional: true }]
        output [{ name: "a" data_type: TYPE_FP32 dims: [1] }, { name: "b" data_type: TYPE_FP32 dims: [1] }]""",
    )
    write_model(
        tmp_path,
        "e",
        """platform: "ensemble" max_batch_size: 4
        input [{ name: "P" data_type: TYPE_FP32 dims: [1] },
               { name: "Q" data_type: TYPE_FP32 dims: [1] optional: true }]
        output [{ name: "p" data_type: TYPE_FP32 dims: [1] }, { name: "q" data_type: TYPE_FP32 dims: [1] }]
        ensemble_scheduling { step [{ model_name: "both" model_version: -1
          input_map { key: "A" value: "P" } input_map { key: "B" value: "Q" }
          output_map { key: "a" value: "p" } output_map { key: "b" value: "q" } }] }""",
    )
    async with serving(tmp_path) as repository:
        assert list(await infer(repository, "e", {"P": row(1)})) == ["p"]
        assert list(await infer(repository, "e", {"P": row(1), "Q": row(2)})) == ["p", "q"]
        with pytest.raises(ServerError, match=r"but missing required input\(s\) \['P'\]"):
            await infer(repository, "e", {"Q": row(2)})


async def test_members_with_and_without_a_batch_dimension_meet(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        "unbatched",
        """backend: "identity" input [{ name: "x" data_type: TYPE_FP32 dims: [4] }]
        output [{ name: "y" data_type: TYPE_FP32 dims: [4] }]""",
    )
    scaling(tmp_path, "scale", {"1": 2.0}, "max_batch_size: 8")
    ensemble(tmp_path, "e", step("scale", "x", "mid") + "," + step("unbatched", "mid", "y"), batch=0)
    async with serving(tmp_path) as repository:
        answer = await infer(repository, "e", {"x": np.ones(4, np.float32)})
        assert answer["y"].tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (step("scale", "nothing", "y"), "ensemble tensor 'nothing' is not mapped as output in any step"),
        (step("scale", "x", "z"), "no step makes its output 'y'"),
        (step("scale", "x", "y") + "," + step("scale", "x", "y"), "'y' is written more than once"),
        (
            step("scale", "x", "y", names=("a", "y")),
            "tensor x is mapping to non-existing input a in model scale, which has x",
        ),
        (
            step("scale", "a", "b") + "," + step("scale", "b", "a") + "," + step("scale", "x", "y"),
            "circular dependency",
        ),
        (step("scale", "x", "y") + "," + step("scale", "x", "z"), "ensemble tensor 'z' is unused in ensemble 'e'"),
        (
            step("wide", "x", "y"),
            "inconsistent shape: [-1,4] is inferred from model e while [-1,5] is inferred from model wide",
        ),
        (
            step("small", "x", "y"),
            "ensemble e allows maximum batch size 8, but it contains model small which only allows maximum batch size "
            "to be 2",
        ),
        (step("missing", "x", "y"), "ensemble e depends on 'missing' which has no loaded version"),
        (step("scale", "x", "y", version=9), "depends on 'scale' which has no loaded version 9"),
        (
            step("whole", "x", "y", names=("n", "m")),
            "ensemble tensor x: inconsistent data type: TYPE_FP32 is inferred from model e while TYPE_INT64 is "
            "inferred from model whole",
        ),
    ],
)
async def test_a_graph_that_can_not_run_is_refused(tmp_path: Path, steps: str, message: str) -> None:
    scaling(tmp_path, "scale", {"1": 2.0}, "max_batch_size: 8")
    write_model(
        tmp_path,
        "whole",
        """backend: "identity" max_batch_size: 8 input [{ name: "n" data_type: TYPE_INT64 dims: [4] }]
        output [{ name: "m" data_type: TYPE_INT64 dims: [4] }]""",
    )
    for name, rows, width in (("wide", 8, 5), ("small", 2, 4)):
        write_model(
            tmp_path,
            name,
            f"""backend: "identity" max_batch_size: {rows} input [{{ name: "x" data_type: TYPE_FP32 dims: [{width}] }}]
            output [{{ name: "y" data_type: TYPE_FP32 dims: [{width}] }}]""",
        )
    ensemble(tmp_path, "e", steps)
    with pytest.raises(ModelLoadError) as refused:
        async with serving(tmp_path):
            pass
    assert message in refused.value.message


async def test_streams_that_can_not_be_matched_are_refused(tmp_path: Path) -> None:
    for name in ("left", "right"):
        slow(tmp_path, name, "model_transaction_policy { decoupled: true }")
    write_model(
        tmp_path,
        "e",
        f"""platform: "ensemble" max_batch_size: 8 input [{{ name: "x" data_type: TYPE_FP32 dims: [1] }}]
        output [{{ name: "a" data_type: TYPE_FP32 dims: [1] }}, {{ name: "b" data_type: TYPE_FP32 dims: [1] }}]
        ensemble_scheduling {{ step [ {step("left", "x", "a", names=IO)}, {step("right", "x", "b", names=IO)} ] }}""",
    )
    with pytest.raises(ModelLoadError, match="receives inputs originated from different decoupled models"):
        async with serving(tmp_path):
            pass


async def test_an_ensemble_can_not_become_its_own_member(tmp_path: Path) -> None:
    scaling(tmp_path, "scale", {"1": 2.0}, "max_batch_size: 8")
    ensemble(tmp_path, "inner", step("scale", "x", "y"))
    ensemble(tmp_path, "outer", step("inner", "x", "y"))
    async with serving(tmp_path, control_mode="explicit", load_models=("*",)) as repository:
        ensemble(tmp_path, "inner", step("outer", "x", "y"))
        with pytest.raises(ServerError, match="circular dependency between ensembles: inner -> outer -> inner"):
            await repository.load("inner")
        assert (await infer(repository, "outer", {"x": row(1, 1, 1, 1)}))["y"].tolist() == [[2.0] * 4]
    async with serving(tmp_path, control_mode="explicit") as repository:
        with pytest.raises(ServerError, match="failed to load 'inner'"):
            await repository.load("inner")


async def test_a_member_that_is_swapped_is_used_at_once_and_one_unloaded_is_missed(tmp_path: Path) -> None:
    scaling(tmp_path, "scale", {"1": 2.0}, "max_batch_size: 8")
    ensemble(tmp_path, "e", step("scale", "x", "y"))
    async with serving(tmp_path, control_mode="explicit", load_models=("e",)) as repository:  # brings its member along
        assert (await infer(repository, "e", {"x": row(1, 1, 1, 1)}))["y"].tolist() == [[2.0] * 4]
        scaling(tmp_path, "scale", {"2": 5.0}, "max_batch_size: 8")
        await repository.load("scale")
        assert (await infer(repository, "e", {"x": row(1, 1, 1, 1)}))["y"].tolist() == [[5.0] * 4]
        await repository.unload("scale")
        assert not repository.is_ready("e")
        with pytest.raises(ServerError, match="'scale' has no available versions"):
            await infer(repository, "e", {"x": row(1, 1, 1, 1)})


async def test_unloading_an_ensemble_with_its_dependents(tmp_path: Path) -> None:
    for name in ("mine", "shared"):
        scaling(tmp_path, name, {"1": 2.0}, "max_batch_size: 8")
    ensemble(tmp_path, "e", step("mine", "x", "mid") + "," + step("shared", "mid", "y"))
    ensemble(tmp_path, "other", step("shared", "x", "y"))
    async with serving(tmp_path, control_mode="explicit") as repository:
        await repository.load("e")
        await repository.load("other")
        await repository.unload("e", dependents=True)
        await asyncio.sleep(0.05)
        assert {entry.name for entry in repository.index(ready=True)} == {"other", "shared"}


async def test_responses_of_decoupled_models_are_counted_by_their_index(tmp_path: Path) -> None:
    slow(tmp_path, "stream", "model_transaction_policy { decoupled: true }")
    async with serving(tmp_path) as repository:
        for count in (0, 2, 2):
            await start(repository, "stream", {"IN": row(count)})
        statistics = repository.model("stream").statistics
        counted = {index: (r.success.count, r.empty_response.count) for index, r in statistics.responses.items()}
        assert counted == {0: (2, 1), 1: (2, 0), 2: (0, 2)}
        assert sum(statistics.first_response.counts) == 3
        assert statistics.success.count == 3


async def test_a_member_that_does_not_batch_takes_a_batch_as_a_shape(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        "whole",
        """backend: "identity" input [{ name: "x" data_type: TYPE_FP32 dims: [-1, 4] }]
        output [{ name: "y" data_type: TYPE_FP32 dims: [-1, 4] }]""",
    )
    scaling(tmp_path, "scale", {"1": 2.0}, "max_batch_size: 8")
    ensemble(tmp_path, "e", step("scale", "x", "mid") + "," + step("whole", "mid", "y"))
    async with serving(tmp_path) as repository:
        answer = await infer(repository, "e", {"x": np.ones((3, 4), np.float32)})
        assert answer["y"].tolist() == [[2.0] * 4] * 3
