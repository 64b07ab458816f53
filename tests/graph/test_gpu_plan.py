"""Plans for a GPU: here their runtime on the CPU, node by node, and what they say where there is no GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trine.graph as tg
from tests.graph.gpu_models import Encoder, Images, encoder_inputs, graph_of
from tests.graph.models import model, node, weights
from trine.core.errors import ConfigurationError
from trine.graph.gpu import PRECISIONS, GpuRuntime, inductor, spread, tactics, tuning
from trine.graph.gpu.api import GpuPlan, build
from trine.graph.gpu.lowering import lower
from trine.graph.gpu.program import DeviceProgram
from trine.graph.gpu.registry import Target
from trine.graph.importer import import_model
from trine.graph.ir import Graph
from trine.graph.passes import optimise
from trine.graph.report.text import text as report
from trine.graph.runtime import Program
from trine.graph.tactics import TimingCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LIMITS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2, "fp8": 8e-2}


def plan_of(graph: Graph, device: str = "cpu", precision: str = "fp32", **options: Any) -> GpuPlan:
    given: dict[str, Any] = {
        "tune": False,
        "timing_cache": None,
        "shapes": {},
        "profiles": [],
        "calibration": None,
        "budget": None,
    }
    return build(graph, [], device, precision=precision, inductor=False, **{**given, **options})


def expected(graph: Graph, *inputs: torch.Tensor) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        result: np.ndarray[Any, Any] = Program(graph).run(*inputs)[0].numpy()
    return result


def named(graph: Graph, *inputs: torch.Tensor) -> dict[str, Any]:
    return {value.name: x.numpy() for value, x in zip(graph.inputs, inputs, strict=True)}


def assert_near(actual: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], limit: float) -> None:
    assert actual.shape == wanted.shape
    assert actual.dtype == wanted.dtype
    assert np.linalg.norm(actual - wanted) <= limit * np.linalg.norm(wanted)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small tile of each kind, launched once: the interpreter is slow."""
    for name in ("_SPLIT_TILES", "_CONV_SPLIT_TILES"):
        monkeypatch.setattr(tactics, name, ("32x32x32w4s3k2",))
    for name in ("_FEW_ROWS", "_SOME_ROWS", "_CONV_TILES", "_CONV_FEW_ROWS", "_CONV_FEW_CHANNELS"):
        monkeypatch.setattr(tactics, name, ("32x32x32w4s3",))
    monkeypatch.setattr(spread, "_TILES", ("32x32x32w4s3",))
    monkeypatch.setattr(tuning, "_LAUNCHES", 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # the interpreter multiplies bfloat16 wrongly
def test_networks(precision: str) -> None:
    x, tokens = torch.randn(2, 3, 16, 16), encoder_inputs()
    for module, inputs in ((Images(), (x,)), (Encoder(False), tokens), (Encoder(True), tokens)):
        graph = graph_of(module, *inputs)
        result = plan_of(graph, precision=precision).run(named(graph, *inputs))
        assert_near(next(iter(result.values())), expected(graph, *inputs), LIMITS[precision])


def test_what_a_plan_tells_of_itself() -> None:
    x = torch.randn(2, 3, 16, 16)
    told = report(plan_of(graph_of(Images(), x), precision="fp16").inspect())
    assert "device: CPU; captured for 0 of 1 sets of shapes" in told
    assert re.search(r"layers: (\d+), from \d+ nodes", told)
    assert re.search(r"precision: \d+ in float16", told)
    assert re.search(r"intermediates: [\d.]+ KiB at once", told)


@pytest.mark.usefixtures("quick")
def test_every_candidate_agrees_with_its_node() -> None:
    pytest.importorskip("triton")
    x, tokens = torch.randn(2, 3, 16, 16), encoder_inputs()
    tried = set()
    for module, inputs in ((Images(), (x,)), (Encoder(True), tokens)):
        graph = lower(graph_of(module, *inputs), {f"x{i}": y.shape for i, y in enumerate(inputs)})
        runtime = GpuRuntime(graph, DEVICE, "fp16" if DEVICE == "cuda" else "fp32")
        target = runtime.target
        with torch.inference_mode():
            choices, times = tuning.tune(graph, runtime.on_device(inputs), target, TimingCache())
        for item, found in times.items():
            assert choices[item] in found
            assert set(found) == set(tuning.options(item, target))
            tried |= {(item.op, name.partition("_")[0]) for name in found}
    assert ("FusedConv", "depthwise") in tried
    assert {("FusedConv", "patches"), ("ConvTranspose", "triton"), ("HeadsAttention", "triton")} <= tried


def test_open_batch_is_prepared_when_it_comes(tmp_path: Path) -> None:
    inputs = encoder_inputs()
    graph = graph_of(Encoder(False), *inputs, open_batch=True)
    plan = plan_of(graph)
    assert plan.inspect()["gpu"]["points"] == []
    plan.save(tmp_path / "m.plan")
    for made in (plan, tg.load_plan(tmp_path / "m.plan")):
        assert isinstance(made, GpuPlan)
        for batch in (2, 3, 1):
            inputs = encoder_inputs(batch)
            result = next(iter(made.run(named(graph, *inputs)).values()))
            assert_near(result, expected(graph, *inputs), 1e-4)
        assert len(made.inspect()["gpu"]["points"]) == 3


def test_float8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRECISIONS, "fp8", torch.float16)  # the interpreter multiplies bfloat16 wrongly
    inputs = encoder_inputs()
    graph = graph_of(Encoder(True), *inputs)
    with pytest.raises(ConfigurationError, match="needs calibration data"):
        plan_of(graph, precision="fp8")
    plan = plan_of(graph, precision="fp8", calibration=[named(graph, *inputs)])
    plan.save(tmp_path / "m.plan")
    for made in (plan, tg.load_plan(tmp_path / "m.plan")):
        result = next(iter(made.run(named(graph, *inputs)).values()))
        assert_near(result, expected(graph, *inputs), LIMITS["fp8"])


@pytest.mark.usefixtures("quick")
def test_choices_survive_the_plan_file(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    graph = graph_of(Images(), x)
    plan = plan_of(graph, tune=True, timing_cache=tmp_path / "times.json")
    plan.save(tmp_path / "m.plan")
    loaded = tg.load_plan(tmp_path / "m.plan")
    assert isinstance(loaded, GpuPlan)
    assert loaded.runtime.points == plan.runtime.points
    (point,) = plan.runtime.points.values()
    assert len(point.choices) == 8
    layers = {layer["op"]: layer for layer in plan.inspect()["layers"]}
    assert layers["MaxPool"]["tactic"] in layers["MaxPool"]["times_ms"]
    loaded.run(named(graph, x))
    assert loaded.inspect()["gpu"]["points"][0]["tactics"] == point.choices
    again = plan_of(graph, tune=True, timing_cache=tmp_path / "times.json")
    assert again.runtime.points == plan.runtime.points  # the cache had every time


def test_operators_without_candidates() -> None:
    """Numbers as shapes, sums in float32, results whose size only the numbers say, loops on the host."""
    nodes = [
        node("Shape", "x", "s"),
        node("Expand", "x s", "e"),
        node("ReduceSum", "e axes", "r", keepdims=1),
        node("CumSum", "r one", "c"),
        node("NonZero", "c", "n"),
        node("Cast", "n", "f", to=1),
        node("TopK", "x two", "values places", axis=-1),
        node("Slice", "values zero one one", "first"),
        node("Softmax", "first", "y"),
    ]
    constants = {"axes": np.array([1]), "one": np.array([1]), "zero": np.array([0]), "two": np.array([2])}
    constants["one"] = np.array([1])
    graph = import_model(model(nodes, {"x": [3, 5]}, ["y", "f"], constants))
    optimise(graph)
    x = torch.randn(3, 5)
    with torch.inference_mode():
        wanted = [part.numpy() for part in Program(graph).run(x)]
    result = plan_of(graph, precision="fp16").run({"x": x.numpy()})
    assert_near(result["y"], wanted[0], 5e-3)
    np.testing.assert_array_equal(result["f"], wanted[1])


def test_a_row_number_out_of_range_is_refused() -> None:
    inputs = encoder_inputs()
    graph = graph_of(Encoder(False), *inputs)
    plan = plan_of(graph)
    inputs[0][1, 2] = -50  # from the end
    assert_near(next(iter(plan.run(named(graph, *inputs)).values())), expected(graph, *inputs), 1e-4)
    for wrong in (50, -51):
        inputs[0][1, 2] = wrong
        with pytest.raises(tg.InputError, match=rf"'x0' has the number {wrong}; .* 50 rows"):
            plan.run(named(graph, *inputs))
    with pytest.raises(tg.InputError, match="no input is called"):
        plan.run({"x": inputs[0].numpy()})


def test_refit_and_profile() -> None:
    x = torch.randn(1, 3, 8, 8)
    graph = graph_of(Images(), x)
    plan = plan_of(graph)
    before = plan.run(named(graph, x))
    assert {op for _, op, _ in plan.profile(named(graph, x), 1)} >= {"FusedConv", "MaxPool", "Linear"}
    plan.refit({"last.bias": weights(5) + 3})
    assert_near(next(iter(plan.run(named(graph, x)).values())), expected(graph, x), 1e-4)
    assert not np.allclose(next(iter(before.values())), expected(graph, x))


def test_the_graph_as_torch_operations_for_inductor() -> None:
    inputs = encoder_inputs()
    graph = graph_of(Encoder(True), *inputs)
    lowered = lower(graph, {value.name: x.shape for value, x in zip(graph.inputs, inputs, strict=True)})
    target = Target(torch.device("cpu"), torch.float32)
    program = DeviceProgram(lowered, inductor.torch_kernels(lowered, target), target)
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        traced = make_fx(lambda *given: program.run(*given))(*inputs)
        assert_near(traced(*inputs)[0].numpy(), expected(graph, *inputs), 1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(ConfigurationError, match="no GPU that torch can use"):
        tg.build(model([node("Relu", "x", "y")], {"x": [2]}, ["y"]), device="cuda")
    with pytest.raises(ConfigurationError, match="precision 'int4' on a GPU: fp32, tf32"):
        GpuRuntime(Graph(), "cpu", "int4")


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
def test_captured(precision: str) -> None:
    x, tokens = torch.randn(2, 3, 32, 32), encoder_inputs()
    for module, inputs in ((Images(), (x,)), (Encoder(False), tokens), (Encoder(True), tokens)):
        graph = graph_of(module, *inputs)
        data = [named(graph, *inputs)] if precision == "fp8" else None
        plan = plan_of(graph, "cuda", precision, tune=True, calibration=data)
        assert all(point["captured"] for point in plan.inspect()["gpu"]["points"])
        for _ in range(2):
            assert_near(
                next(iter(plan.run(named(graph, *inputs)).values())), expected(graph, *inputs), LIMITS[precision]
            )
        device = plan.run({name: torch.from_numpy(array).cuda() for name, array in named(graph, *inputs).items()})
        assert all(output.is_cuda for output in device.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    from trine.cli.main import main

    onnx.save(model([node("Relu", "x", "y")], {"x": [2]}, ["y"]), tmp_path / "m.onnx")
    command = ["build", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.plan"), "--device", "cuda"]
    assert main(command) != 0
    assert "no GPU that torch can use" in capsys.readouterr().err
    assert main([*command[:-2], "--inductor"]) != 0
    assert "for plans on a GPU" in capsys.readouterr().err
    assert not (tmp_path / "m.plan").exists()


@pytest.mark.usefixtures("quick")
def test_no_time_is_no_timing() -> None:
    x = torch.randn(1, 3, 8, 8)
    plan = plan_of(graph_of(Images(), x), tune=True, budget=0.0)
    (point,) = plan.runtime.points.values()
    assert point.times == {}
    assert point.choices
