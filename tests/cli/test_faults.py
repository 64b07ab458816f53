"""What goes wrong outside the program: one line that says what, where, and what to do; no traceback; exit code 1."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import save_checkpoint
from trine.cli import failures
from trine.cli.main import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line that a command that must fail says."""
    assert main(argv) == 1
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("trine: error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_port_in_use(checkpoint: Path, taken_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "serve", str(checkpoint), "--port", str(taken_port))
    assert f"port {taken_port}" in line
    assert "--port" in line


def test_missing_weights(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.safetensors").unlink()
    line = error_of(capsys, "run", str(copy), "Hello")
    assert str(copy) in line
    assert "model.safetensors" in line


def test_missing_weights_when_serving(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same from the engine's process, after HTTP has begun to answer."""
    (copy / "model.safetensors").unlink()
    line = error_of(capsys, "serve", str(copy), "--port", "0")
    assert "model.safetensors" in line


def test_missing_shard(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    line = error_of(capsys, "run", str(copy), "Hello")
    assert "model-00001-of-00002.safetensors" in line
    assert "download" in line


def test_truncated_weights(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    line = error_of(capsys, "run", str(copy), "Hello")
    assert "model.safetensors" in line
    assert "download it again" in line


def test_config_that_is_not_json(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "config.json").write_text("{'hidden_size': 64}")
    assert "config.json" in error_of(capsys, "run", str(copy), "Hello")


def test_config_with_a_bad_value(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(copy, num_hidden_layers="two")
    line = error_of(capsys, "run", str(copy), "Hello")
    assert "num_hidden_layers='two'" in line
    assert "expected an integer" in line


def test_unsupported_architecture(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(copy, architectures=["MambaForCausalLM"])
    line = error_of(capsys, "run", str(copy), "Hello")
    assert "MambaForCausalLM" in line
    assert "LlamaForCausalLM" in line


def test_too_long_prompt(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "run", str(checkpoint), "word " * 300, "--max-model-len", "128")
    assert "128" in line


def test_context_longer_than_the_model(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "run", str(checkpoint), "Hello", "--max-model-len", "100000")
    assert "max_model_len=100000" in line
    assert "lower it" in line


def test_more_cache_than_memory(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "run", str(checkpoint), "Hello", "--cache-memory", "900TiB")
    assert "900 TiB" in line
    assert "--cache-memory" in line


def test_too_little_cache(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "run", str(checkpoint), "Hello", "--cache-memory", "10kB", "--max-model-len", "512")
    assert "--max-model-len" in line
    assert "--cache-memory" in line


def test_weights_larger_than_memory(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(2**43)  # 8 TiB on paper, a hole on the disk
    line = error_of(capsys, "run", str(copy), "Hello")
    assert "8.00 TiB" in line
    assert "--quantization int8" in line


def test_directory_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "run", "./no-such-model", "Hello")
    assert "no-such-model" in line
    assert "path" in line


def test_unknown_name_offline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = error_of(capsys, "run", "no-such-org/no-such-model", "Hello")
    assert "no-such-org/no-such-model" in line
    assert "directory" in line


def test_no_gpu(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    line = error_of(capsys, "run", str(checkpoint), "Hello", "--device", "cuda")
    assert "cuda" in line.lower()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("no room"), ["out of memory", "--quantization int8"]),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried …"),
            ["out of memory", "--cache-memory"],
        ),
        (ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn"), ["uvicorn", "pip install 'trine[server]'"]),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), ["pip install einops"]),
        (PermissionError(13, "Permission denied", "/root/x"), ["/root/x", "Permission denied"]),
        (OSError(28, "No space left on device"), ["No space left", "HF_HOME"]),
    ],
)
def test_explanations(error: Exception, words: list[str]) -> None:
    line = failures.explain(error)
    assert line is not None
    assert "\n" not in line
    assert all(word in line for word in words)


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    assert failures.explain(KeyError("oops")) is None
