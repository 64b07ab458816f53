"""The models that are measured: named shapes, and their weights in the forms that the engines read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.engine_process import EngineUnavailableError

_SHAPE_FILES = Path(__file__).resolve().parent / "shapes"
SHAPES = {
    "tiny": "",
    "Qwen2.5-0.5B": "qwen2.5-0.5b.json",
    "Llama-3.1-8B": "llama-3.1-8b.json",
    "Qwen3-30B-A3B": "qwen3-30b-a3b.json",
}


@dataclass(frozen=True)
class Model:
    """A directory with a config.json, and weights if `has_weights`."""

    name: str
    directory: Path
    config: dict[str, Any]
    has_weights: bool


def default_directory() -> Path:
    return Path(os.environ.get("PEERS_DIR") or ".peers")


def find(name: str, peers_dir: Path, *, write_weights: bool) -> Model:
    """A model directory, the embedded model, or a shape: a config.json, and random weights on disk if asked."""
    if name == "tiny":
        from trine.llm.loading import resolve_model

        return _open(name, resolve_model(name))
    if name not in SHAPES:
        if not (Path(name) / "config.json").exists():
            raise SystemExit(f"--model {name}: no such directory with a config.json; shapes: {', '.join(SHAPES)}")
        return _open(name, Path(name))
    directory = (peers_dir / "models" / name).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text((_SHAPE_FILES / SHAPES[name]).read_text())
    if write_weights and not list(directory.glob("*.safetensors")):
        print(f"# writing random weights of {name} to {directory}", flush=True)
        _run(sys.executable, "write_checkpoint.py", str(directory))
    return _open(name, directory)


def _open(name: str, directory: Path) -> Model:
    config = json.loads((directory / "config.json").read_text())
    return Model(name, directory, config, bool(list(directory.glob("*.safetensors"))))


def files_for(engine: str, model: Model, quantization: str | None, peers_dir: Path) -> dict[str, Any]:
    """The settings that name an engine's own form of the model, converted on first use."""
    settings: dict[str, Any] = {
        "model": str(model.directory),
        "load_format": "auto" if model.has_weights else "dummy",
    }
    place = peers_dir / "converted"
    if engine == "llama_cpp":
        place.mkdir(parents=True, exist_ok=True)
        bf16, q8 = (place / f"{model.directory.name}-{kind}.gguf" for kind in ("bf16", "q8_0"))
        if not bf16.exists():
            _run(_python("llama_cpp", peers_dir), "write_gguf.py", str(model.directory), str(bf16))
        if quantization == "int8" and not q8.exists():
            _run(_python("llama_cpp", peers_dir), "quantize_gguf.py", str(bf16), str(q8))
        settings["gguf"] = str(q8 if quantization == "int8" else bf16)
    if engine == "openvino":
        weights = {"int8": "int8", None: "fp16"}.get(quantization)
        if weights is None:
            raise EngineUnavailableError(f"no {quantization} weights here")
        exported = place / f"{model.directory.name}-openvino-{weights}"
        if not exported.exists():
            _export_openvino(model, exported, weights, _python("openvino", peers_dir))
        settings["openvino"] = str(exported)
    return settings


def _export_openvino(model: Model, exported: Path, weights: str, python: str) -> None:
    tool = Path(python).parent / "optimum-cli"
    arguments = ["--model", str(model.directory), "--task", "text-generation-with-past", "--weight-format", weights]
    _checked([str(tool), "export", "openvino", *arguments, str(exported)])


def _python(engine: str, peers_dir: Path) -> str:
    from peers.engine_process import interpreter

    return interpreter(engine, {}, peers_dir)


def _run(python: str, script: str, *arguments: str) -> None:
    _checked([python, str(Path(__file__).resolve().parent / "peers" / script), *arguments])


def _checked(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise EngineUnavailableError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["it said nothing"]
        raise EngineUnavailableError(f"{' '.join(command[:3])} failed: {words[-1]}")
