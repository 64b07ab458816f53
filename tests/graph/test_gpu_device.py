"""What only a GPU shows of plans: captured profiles, several callers, split products, weights swapped, plan files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trine.graph as tg
from tests.graph.gpu_models import Encoder, Images, encoder_inputs, graph_of
from tests.graph.models import weights
from tests.graph.test_gpu_plan import assert_near, expected, named, plan_of
from trine.graph.gpu import tactics
from trine.graph.gpu.api import GpuPlan
from trine.graph.profiles import Range

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def only(results: dict[str, Any]) -> np.ndarray[Any, Any]:
    (result,) = results.values()
    return result


def profile(low: int, best: int, high: int) -> dict[str, Range]:
    return {name: Range((best, 6), (low, 6), (high, 6)) for name in ("x0", "x1")}


def test_each_profile_has_its_graph(tmp_path: Path) -> None:
    graph = graph_of(Encoder(True), *encoder_inputs(), open_batch=True)
    plan = plan_of(graph, "cuda", "fp16", tune=True, profiles=[profile(1, 2, 4), profile(5, 16, 32)])
    assert [point["captured"] for point in plan.inspect()["gpu"]["points"]] == [True, True]
    plan.save(tmp_path / "m.plan")
    loaded = tg.load_plan(tmp_path / "m.plan")
    assert isinstance(loaded, GpuPlan)
    assert loaded.runtime.points == plan.runtime.points
    for made in (plan, loaded):
        for batch in (2, 16, 1, 32):
            inputs = encoder_inputs(batch, seed=batch)
            assert_near(only(made.run(named(graph, *inputs))), expected(graph, *inputs), 5e-3)
        with pytest.raises(tg.InputError):
            made.run(named(graph, *encoder_inputs(33)))


def test_several_callers() -> None:
    """Threads that bring different shapes, host and device arrays, to one plan."""
    graph = graph_of(Encoder(False), *encoder_inputs(), open_batch=True)
    plan = plan_of(graph, "cuda", "fp16")
    wanted = {batch: expected(graph, *encoder_inputs(batch, seed=batch)) for batch in range(1, 6)}

    def call(number: int) -> None:
        batch = number % 5 + 1
        given = named(graph, *encoder_inputs(batch, seed=batch))
        if number % 2:
            result = only(plan.run({name: torch.from_numpy(x).cuda() for name, x in given.items()})).cpu().numpy()  # type: ignore[attr-defined]
        else:
            result = only(plan.run(given))
        assert_near(result, wanted[batch], 5e-3)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(call, range(60)))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_split_products_in_a_graph(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counters of every split product are ready for the next replay."""
    for name in ("_FEW_ROWS", "_SOME_ROWS", "_SPLIT_TILES"):
        monkeypatch.setattr(tactics, name, ("64x32x128w4s4k4",))
    module = torch.nn.Sequential(torch.nn.Linear(1024, 96), torch.nn.ReLU(), torch.nn.Linear(96, 1024))
    module.append(torch.nn.Linear(1024, 48))
    inputs = (torch.randn(19, 1024),)
    graph = graph_of(module, *inputs)
    plan = plan_of(graph, "cuda", precision, tune=True)
    (point,) = plan.runtime.points.values()
    split = [name for times in point.times.values() for name in times if name.endswith("k4")]
    assert split, point.times
    for label, times in point.times.items():
        point.choices[label] = next((name for name in times if name.endswith("k4")), point.choices[label])
    plan.runtime.forget()
    for seed in range(5):
        x = torch.randn(19, 1024, generator=torch.Generator().manual_seed(seed))
        limit = {"fp16": 5e-3, "bf16": 2e-2}[precision]
        assert_near(only(plan.run(named(graph, x))), expected(graph, x), limit)


def test_refit() -> None:
    x = torch.randn(2, 3, 32, 32)
    graph = graph_of(Images(), x)
    plan = plan_of(graph, "cuda", "fp16", tune=True)
    before = only(plan.run(named(graph, x)))
    plan.refit({"last.bias": weights(5) + 3})
    after = only(plan.run(named(graph, x)))
    assert_near(after, expected(graph, x), 5e-3)
    assert not np.allclose(before, after)
    assert {op for _, op, _ in plan.profile(named(graph, x), 2)} >= {"FusedConv", "MaxPool", "Linear"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trine.cli.main import main

    path, plan = tmp_path / "m.onnx", tmp_path / "m.plan"
    x = torch.randn(2, 3, 32, 32)
    torch.onnx.export(Images().eval(), (x,), str(path), input_names=["x"], dynamo=False, opset_version=17)
    command = ["build", str(path), "-o", str(plan), "--device", "cuda", "--precision", "fp16", "--explain"]
    assert main([*command, "--report", str(tmp_path / "r.html"), "--timing-cache", str(tmp_path / "t.json")]) == 0
    told = capsys.readouterr().out
    assert "in float16" in told
    assert "captured for 1 of 1" in told
    assert "FusedConv" in told
    assert "FusedConv" in (tmp_path / "r.html").read_text()
    np.save(tmp_path / "x.npy", x.numpy())
    assert main(["run", str(plan), "--input", f"x=@{tmp_path}/x.npy"]) == 0
    assert main(["bench", str(plan), "--duration", "0.2", "--profile"]) == 0
    assert "FusedConv" in capsys.readouterr().out
