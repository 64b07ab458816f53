"""`trine doctor` and `trine models`: what they find on this machine, and in good and bad model directories."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.checkpoints import save_checkpoint
from trine.cli.main import main
from trine.diagnostics import inventory, machine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "small")


def findings(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code and findings by name."""
    code = main(["doctor", "--json", *argv])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in report["findings"]}


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys)
    assert code == 0
    assert {"processor", "memory", "disk", "python", "core", "torch", "CPU kernels", "port 8000"} <= found.keys()
    assert all(finding["remedy"] for finding in found.values() if finding["severity"] in ("warning", "problem"))


def test_a_good_model(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, str(checkpoint))
    assert code == 0
    assert "Qwen3ForCausalLM" in found["architecture"]["detail"]
    assert "2 layers of 64" in found["architecture"]["detail"]
    for name in ("weights", "tokenizer", "chat template"):
        assert found[name]["severity"] == "ok"


def test_a_busy_port_names_its_owner(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        code, found = findings(capsys, "--port", str(port))
    assert code == 0  # one can serve elsewhere
    assert f"process {os.getpid()}" in found[f"port {port}"]["detail"]
    assert f"--port {port + 1}" in found[f"port {port}"]["remedy"]


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        ("no config", "config", ["config.json"]),
        ("no weights", "weights", ["no weights", "model.safetensors"]),
        ("pickled weights", "weights", ["*.bin", "save_pretrained"]),
        ("cut weights", "weights", ["damaged", "download it again"]),
        ("other architecture", "architecture", ["FalconForCausalLM", "supported"]),
        ("quantised", "quantization", ["gptq", "original checkpoint"]),
        ("small vocabulary", "tokenizer", ["different models"]),
        ("no tokenizer", "tokenizer", ["tokenizer"]),
    ],
)
def test_a_bad_model(
    damage: str, name: str, words: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    weights, config = directory / "model.safetensors", directory / "config.json"
    changes = {
        "other architecture": {"architectures": ["FalconForCausalLM"]},
        "quantised": {"quantization_config": {"quant_method": "gptq"}},
        "small vocabulary": {"vocab_size": 100},
    }
    if damage in changes:
        config.write_text(json.dumps(json.loads(config.read_text()) | changes[damage]))
    elif damage == "no config":
        config.unlink()
    elif damage == "no tokenizer":
        (directory / "tokenizer.json").unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
        if damage == "pickled weights":
            (directory / "pytorch_model.bin").touch()
    code, found = findings(capsys, str(directory))
    assert code == 1
    assert found[name]["severity"] == "problem"
    said = f"{found[name]['detail']} {found[name]['remedy']}"
    assert all(word in said for word in words), said


def test_people_get_marks_and_remedies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL  config" in out
    assert out.splitlines()[-1].startswith("1 problem, ")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = machine.package_version
    monkeypatch.setattr(machine, "package_version", lambda name: None if name == "uvicorn" else real(name))
    code, found = findings(capsys)
    assert code == 0  # the engine works without it
    assert found["server"]["severity"] == "warning"
    assert found["server"]["remedy"] == "pip install 'trine[server]'"


def test_the_requirements_are_those_of_the_package() -> None:
    """What doctor looks for is what pyproject.toml asks for."""
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for part, names in machine.PACKAGES.items():
        wanted = project["dependencies"] if part == "core" else extras[part]
        assert {entry.partition(">")[0] for entry in wanted if not entry.startswith("trine[")} == set(names)


def test_models_lists_the_hub_cache(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-org--some-model" / "snapshots" / "0123"
    shutil.copytree(checkpoint, snapshot)
    found = {model.name: model for model in inventory.local_models(tmp_path)}
    model = found["some-org/some-model"]
    assert (model.where, model.architecture, model.runs) == ("hub cache", "Qwen3ForCausalLM", True)
    assert model.weight_bytes == (checkpoint / "model.safetensors").stat().st_size


def test_models_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"LlamaForCausalLM", "GPT2LMHeadModel"} <= set(report["architectures"]["text"])
    assert "BertModel" in report["architectures"]["embeddings"]
