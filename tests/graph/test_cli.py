"""`trine build`, `trine run model.plan`, `trine bench model.plan` and `trine refit`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import trine.graph as tg
from tests.graph.models import model, node, weights
from trine.cli.main import main

FIGURES = re.compile(
    r"throughput: [\d.]+ runs/s\n"
    r"latency: min = [\d.]+ ms, max = [\d.]+ ms, mean = [\d.]+ ms, median = [\d.]+ ms, "
    r"percentile\(90%\) = [\d.]+ ms, percentile\(95%\) = [\d.]+ ms, percentile\(99%\) = [\d.]+ ms\n"
)


def network(scale: float = 1.0) -> onnx.ModelProto:
    nodes = [
        node("MatMul", "x w", "p", name="product"),
        node("Relu", "p", "r", name="act"),
        node("Add", "r k", "y", name="shift"),
    ]
    return model(nodes, {"x": ["n", 4]}, ["y"], {"w": weights(4, 3) * scale, "k": weights(3) * scale})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With model.onnx, an input of two rows and what the model makes of it."""
    monkeypatch.chdir(tmp_path)
    onnx.save(network(), "model.onnx")
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    np.save("x.npy", x)
    np.save("y.npy", np.maximum(x @ weights(4, 3), 0) + weights(3))
    np.savez("all.npz", x=x)
    return tmp_path


def test_the_journey_from_a_model_to_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "model.onnx", "-o", "model.plan", "--opt", "x:2x4", "--explain", "--report", "r.html"]) == 0
    output = capsys.readouterr()
    assert "pass fuse_linear: -1 MatMul, -1 Relu, +1 Linear" in output.out
    assert "computes MatMul product, Relu act" in output.out
    assert FIGURES.search(output.out)
    assert "model.plan: 2 layers, built in" in output.err
    assert "<title>model.plan</title>" in Path("r.html").read_text()

    assert main(["run", "model.plan", "--input", "x=@x.npy", "--output-dir", "out"]) == 0
    np.testing.assert_allclose(np.load("out/y.npy"), np.load("y.npy"), rtol=1e-5, atol=1e-6)
    assert main(["run", "model.plan", "--input", "@all.npz", "--reference", "y=@y.npy"]) == 0
    assert "y: PASSED" in capsys.readouterr().out

    assert main(["bench", "model.plan", "--duration", "0.01", "--profile", "--export", "figures.json"]) == 0
    printed = capsys.readouterr().out
    assert FIGURES.search(printed)
    assert re.search(r"product +Linear ", printed)
    report = json.loads(Path("figures.json").read_text())
    assert report["runs"] == len(report["times_ms"]) >= 10
    assert report["inputs"] == {"x": "float32[2,4]"} or report["inputs"] == {"x": "float32[2, 4]"}
    assert [layer["op"] for layer in report["layers"]] == ["Linear", "Add"]
    assert sum(layer["percent"] for layer in report["layers"]) == pytest.approx(100, abs=0.1)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, "--duration", "0", "--warm-up", "0", "--export", "-"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_bench_takes_a_model_shapes_streams_and_percentiles(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--shapes", "x:5x4", "--streams", "3", "--iterations", "30", "--percentile", "50,99.9")
    report = bench(capsys, "model.onnx", *arguments, "--no-tune")
    assert (report["runs"], report["streams"], report["inputs"]["x"]) == (30, 3, "float32[5, 4]")
    latency = report["latency_ms"]
    assert latency["min"] <= latency["p50"] == latency["median"] <= latency["p99.9"] <= latency["max"]
    assert bench(capsys, "model.onnx", "--input", "x=@x.npy", "--budget", "0")["inputs"]["x"] == "float32[2, 4]"


def test_a_plan_is_measured_where_it_was_tuned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["build", "model.onnx", "-o", "m.plan", "--min", "x:1x4", "--opt", "x:3x4", "--max", "x:8x4", "--no-tune"])
    assert not FIGURES.search(capsys.readouterr().out)
    assert bench(capsys, "m.plan")["inputs"]["x"] == "float32[3, 4]"
    assert main(["bench", "m.plan", "--shapes", "x:9x4"]) == 1
    assert "dimension 0 is 9, it must be 1 to 8" in capsys.readouterr().err


def test_lower_precision_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--precision", "int8", "--calibration", "all.npz", "--calibration-cache", "ranges.json"]
    assert main(["build", "model.onnx", "-o", "m.plan", *arguments, "--explain", "--no-tune"]) == 0
    assert tg.load_plan("m.plan").precision["precision"] == "int8"
    assert "precision" in capsys.readouterr().out
    assert main(["run", "m.plan", "--input", "x=@x.npy", "--reference", "y=@y.npy", "--atol", "0.05"]) == 0


def test_an_output_that_differs_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = np.load("y.npy")
    expected[1, 2] += 0.5
    np.save("other.npy", expected)
    assert main(["run", "model.onnx", "--input", "x=@x.npy", "--reference", "y=@other.npy"]) == 1
    printed = capsys.readouterr().out
    assert "y: FAILED, largest difference 0.5 absolute" in printed
    assert "1 of 6 elements differ" in printed
    assert main(["run", "model.onnx", "--input", "x=@x.npy", "--reference", "y=@other.npy", "--atol", "1"]) == 0


def test_refit_from_a_model_and_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["build", "model.onnx", "-o", "model.plan", "--no-tune"])
    onnx.save(network(2.0), "other.onnx")
    np.save("w.npy", weights(4, 3) * 2)
    np.save("k.npy", weights(3) * 2)
    expected = tg.build("other.onnx", optimise=False).run({"x": np.load("x.npy")})["y"]
    assert main(["refit", "model.plan", "--from", "other.onnx", "-o", "a.plan"]) == 0
    assert main(["refit", "model.plan", "--weight", "w=@w.npy", "--weight", "k=@k.npy", "-o", "b.plan"]) == 0
    for plan in ("a.plan", "b.plan"):
        np.testing.assert_allclose(tg.load_plan(plan).run({"x": np.load("x.npy")})["y"], expected, rtol=1e-5)
    onnx.save(model([node("Relu", "x", "y")], {"x": ["n", 4]}, ["y"]), "third.onnx")
    assert main(["refit", "model.plan", "--from", "third.onnx", "-o", "c.plan"]) == 1
    assert "not of the plan's architecture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "none.onnx", "-o", "x.plan"], "is not a file"),
        (["build", "model.onnx", "-o", "x.plan", "--opt", "x"], "write NAME:1x3x224x224"),
        (["build", "model.onnx", "-o", "x.plan", "--opt", "z:1x4"], "no input is called 'z'"),
        (["build", "model.onnx", "-o", "x.plan", "--precision", "int8"], "needs calibration data"),
        (["build", "model.onnx", "-o", "x.plan", "--device", "cuda:99"], "cuda:99"),
        (["build", "model.onnx", "-o", "x.plan", "--inductor"], "plans on a GPU"),
        (["run", "model.onnx", "--input", "x"], "write NAME=@FILE.npy"),
        (["run", "model.onnx", "--input", "x=@none.npy"], "can't be read"),
        (["run", "model.onnx", "--input", "x=@all.npz"], "an .npz file: leave the name out"),
        (["run", "model.onnx", "--input", "@x.npy"], "one array: write NAME=@FILE.npy"),
        (["run", "model.onnx", "--input", "x=@model.onnx"], "can't be read"),
        (["run", "model.onnx"], "input 'x' is missing"),
        (["run", "model.onnx", "--input", "x=@x.npy", "--reference", "z=@y.npy"], "no output is called that: y"),
        (["run", "model.onnx", "--input", "x=@x.npy", "--reference", "y=@x.npy"], "the output is float32[2, 3]"),
        (["bench", "model.onnx", "--shapes", "z:1x4"], "no input is called 'z'"),
        (["refit", "model.onnx", "--from", "model.onnx", "-o", "x.plan"], "is not a Trine plan"),
        (["refit", "model.plan", "-o", "x.plan"], "give --from MODEL.onnx, or --weight"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "m.plan", "--percentile", "0"], "percentages above 0"),
        (["bench", "m.plan", "--duration", "-1"], "not a number from 0 on"),
        (["build", "m.onnx", "-o", "m.plan", "--budget", "x"], "not a number from 0 on"),
        (["build", "m.onnx", "-o", "m.plan", "--precision", "int4"], "invalid choice"),
    ],
)
def test_options_that_can_not_be_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
