"""`trine build`, `trine run model.plan` and `trine bench model.plan`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.graph.models import model, node, weights
from trine.cli.main import main


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    made = model([node("MatMul", "x w", "p"), node("Relu", "p", "y")], {"x": ["n", 4]}, ["y"], {"w": weights(4, 3)})
    onnx.save(made, tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", np.ones((2, 4), np.float32))
    return tmp_path / "model.onnx"


def test_build_run_and_bench(onnx_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = onnx_file.parent
    plan = str(folder / "model.plan")
    assert main(["build", str(onnx_file), "-o", plan, "--opt", "x:2x4", "--explain"]) == 0
    explained = capsys.readouterr().out
    assert "pass fuse_linear: -1 MatMul, -1 Relu, +1 Linear" in explained
    assert main(["run", plan, "--input", f"x=@{folder / 'x.npy'}", "--output-dir", str(folder / "out")]) == 0
    expected = np.maximum(np.ones((2, 4), np.float32) @ weights(4, 3), 0)
    np.testing.assert_allclose(np.load(folder / "out" / "y.npy"), expected, rtol=1e-5, atol=1e-6)
    capsys.readouterr()
    assert main(["bench", plan, "--shape", "x:2x4", "--duration", "0.01", "--profile", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] >= 10
    assert [layer["op"] for layer in report["layers"]] == ["Linear"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "none.onnx", "-o", "x.plan"], "is not a file"),
        (["run", "MODEL", "--input", "x"], "write NAME=@FILE.npy"),
        (["run", "MODEL"], "input 'x' is missing"),
    ],
)
def test_mistakes_are_one_line(
    onnx_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(onnx_file) if text == "MODEL" else text for text in arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
