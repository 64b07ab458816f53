"""`trine check`, `trine explain` and `trine traffic`: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.server.serving import identity, scaling, write_model
from trine.cli.explain import duration, lines
from trine.cli.main import main


def test_check_names_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity(tmp_path)
    scaling(tmp_path, "onnx", {"1": 1.0}, "max_batch_size: 4 dynamic_batching { }")
    assert main(["check", str(tmp_path), "--load"]) == 0
    out = capsys.readouterr().out
    assert "identity; version 1; batches up to 8; 1 instance on CPU" in out
    assert "2 models, no problems" in out
    write_model(tmp_path, "typo", "\nmax_batch_sise: 3")
    folder = write_model(tmp_path, "corrupt", "")
    (folder / "1" / "model.onnx").write_bytes(b"nonsense")
    write_model(
        tmp_path,
        "ensemble",
        """platform: "ensemble" max_batch_size: 8 input [{ name: "x" data_type: TYPE_FP32 dims: [4] }]
        output [{ name: "y" data_type: TYPE_FP32 dims: [4] }]
        ensemble_scheduling { step [{ model_name: "nothing" input_map { key: "a" value: "x" }
          output_map { key: "b" value: "y" } }] }""",
    )
    assert main(["check", str(tmp_path), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    problems = {found["model"]: found["detail"] for found in answer["findings"] if found["severity"] == "problem"}
    assert not answer["ok"]
    assert problems.keys() == {"typo", "corrupt", "ensemble"}
    assert "config.pbtxt:2:1" in problems["typo"]
    assert "Did you mean 'max_batch_size'" in problems["typo"]
    assert "model.onnx" in problems["corrupt"]
    assert "depends on 'nothing'" in problems["ensemble"]
    (tmp_path / "typo" / "config.pbtxt").write_text(
        (tmp_path / "ensemble" / "config.pbtxt").read_text().replace("nothing", "ensemble")
    )
    ensemble = tmp_path / "ensemble" / "config.pbtxt"
    ensemble.write_text(ensemble.read_text().replace("nothing", "typo"))
    assert main(["check", str(tmp_path)]) == 1
    assert "circular dependency between ensembles: typo -> ensemble -> typo" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "none")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:1"
    for command in (["explain", "id"], ["traffic", "m"], ["traffic", "m", "1=90", "2=10"]):
        assert main([*command, "--url", url]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"trine: error: no answer from {url}")
        assert error.count("\n") == 1
    assert main(["traffic", "m", "1", "--url", url]) == 1
    assert "is not VERSION=WEIGHT" in capsys.readouterr().err
    assert main(["traffic", "m", "1=1", "--off", "--url", url]) == 1
    assert "give weights, or one of" in capsys.readouterr().err


def test_what_is_explained_reads_well() -> None:
    entry = {
        "request_id": "r1",
        "model": "m",
        "version": "1",
        "received": 0,
        "rows": 1,
        "computed": True,
        "waited_us": 1500.0,
        "waited_for": "the batch was full",
        "batch_requests": 3,
        "batch_rows": 4,
        "instance": "m_0",
        "input_us": 3.0,
        "infer_us": 900.0,
        "output_us": 4.0,
        "total_us": 2_500_000.0,
        "error": None,
    }
    text = "\n".join(lines(entry))
    for part in ("1.5 ms  the batch was full", "900 µs  with 2 other requests: 4 rows, 1 its own, on m_0", "2.5 s"):
        assert part in text
    assert duration(7) == "7 µs"
    refused = {**entry, "computed": False, "error": "Exceeds maximum queue size"}
    assert "1.5 ms  and was not computed: Exceeds maximum queue size" in "\n".join(lines(refused))
