"""ONNX models compiled when they are loaded: what a configuration may ask for, and the plans kept on disk.

    optimization { execution_accelerators { cpu_execution_accelerator: [ {
      name: "trine" parameters { key: "opt_shapes" value: "x:8x3x224x224" } } ] } }

`tensorrt` is another name for the accelerator `trine`, among those of the GPU, too.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trine
from trine.core.errors import ConfigurationError, ModelLoadError
from trine.server.configuration.types import datatype_name

if TYPE_CHECKING:
    from trine.graph import Plan

logger = logging.getLogger("trine.server")

ModelConfig = Any

NAMES = ("trine", "tensorrt")
OPTIONS = {
    "precision_mode": "FP32, BF16 or INT8: how the plan computes (default: as the model does)",
    "calibration": "an .npz file of inputs in the model's folder, which INT8 is calibrated on",
    "min_shapes": "NAME:1x3x224x224,NAME:…, the least shape of a profile",
    "opt_shapes": "the shape to tune for",
    "max_shapes": "the largest",
    "tune": "false takes the first candidate for each layer instead of timing them",
    "budget_seconds": "how long tuning may take",
}
_NOTHING_TO_DO = ("max_workspace_size_bytes", "trt_engine_cache_enable", "trt_engine_cache_path")
"""Parameters of the original accelerator: workspace has no limit here, and plans are always kept."""


def accelerator_of(config: ModelConfig) -> Any | None:
    """The accelerator by which a model asks to be compiled."""
    accelerators = config.optimization.execution_accelerators
    for accelerator in (*accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator):
        if accelerator.name in NAMES:
            return accelerator
    return None


def compiled(config: ModelConfig, path: Path, settings: Mapping[str, str]) -> Plan:
    """The plan of the ONNX model at `path`: the one on disk, if the same model was compiled alike before."""
    from trine import graph

    options = _options(config, path)
    folder = Path(settings.get("cache-directory") or _default_folder())
    kept = folder / f"{_fingerprint(path, options)}.plan"
    if kept.is_file():
        try:
            return graph.load_plan(kept)
        except graph.PlanError as error:
            logger.warning("model '%s' is compiled again: %s", config.name, error.message)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cache = folder / "times.json"
    except OSError:
        cache = None
    plan = graph.build(path, timing_cache=cache, **options)
    try:
        plan.save(kept)
    except OSError as error:
        logger.warning("the plan of model '%s' can't be kept in %s: %s", config.name, folder, error.strerror)
        return plan
    return graph.load_plan(kept)  # whose weights are mapped, and shared with every process that loads it


def _default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trine" / "plans"


def _options(config: ModelConfig, path: Path) -> dict[str, Any]:
    """The accelerator's parameters as arguments of `trine.graph.build`."""
    from trine.graph.profiles import read_profiles

    accelerator = accelerator_of(config)
    given = {} if accelerator is None else dict(accelerator.parameters)
    for key in given.keys() - OPTIONS.keys() - set(_NOTHING_TO_DO):
        raise ConfigurationError(
            f"model '{config.name}': the accelerator has no parameter {key!r}; it has {', '.join(OPTIONS)}"
        )
    options: dict[str, Any] = {"tune": _flag(config, given, "tune"), "device": device_of(config)}
    if "precision_mode" in given:
        options["precision"] = given["precision_mode"].lower()
    if "calibration" in given:
        options["calibration"] = _inside(config, path, given["calibration"])
    if "budget_seconds" in given:
        options["budget"] = _seconds(config, given["budget_seconds"])
    shapes = [[given[key]] if key in given else [] for key in ("min_shapes", "opt_shapes", "max_shapes")]
    options["profiles"] = read_profiles(*shapes)
    if not any(shapes):
        options["shapes"] = _batch_shapes(config)
    return options


def device_of(config: ModelConfig) -> str:
    """A GPU for a model that has the accelerator among those of the GPU, where there is one."""
    import torch

    wanted = any(item.name in NAMES for item in config.optimization.execution_accelerators.gpu_execution_accelerator)
    return "cuda" if wanted and torch.cuda.is_available() else "cpu"


def _batch_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """What to tune for where nothing says it: the batch that the scheduler prefers."""
    if not config.max_batch_size:
        return {}
    preferred = list(config.dynamic_batching.preferred_batch_size)
    rows = preferred[0] if preferred else config.max_batch_size
    shapes = {}
    for tensor in config.input:
        dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
        if datatype_name(tensor.data_type) != "BYTES" and -1 not in dims:
            shapes[tensor.name] = [rows, *dims]
    return shapes


def _flag(config: ModelConfig, given: Mapping[str, str], key: str) -> bool:
    text = given.get(key, "true").lower()
    if text not in ("true", "false", "1", "0"):
        raise ConfigurationError(f"model '{config.name}': {key}={given[key]!r}: expected true or false")
    return text in ("true", "1")


def _seconds(config: ModelConfig, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ConfigurationError(f"model '{config.name}': budget_seconds={text!r}: expected a number of seconds")
    return seconds


def _inside(config: ModelConfig, path: Path, name: str) -> Path:
    """A file of the model's folder."""
    folder = path.parent.parent.resolve()
    file = (folder / name).resolve()
    if not (file.is_relative_to(folder) and file.is_file()):
        raise ModelLoadError(f"model '{config.name}': calibration={name!r}: there is no such file in {folder}")
    return file


def _fingerprint(path: Path, options: Mapping[str, Any]) -> str:
    """Of everything that the plan depends on: the model's files, the options, this machine, this version."""
    from trine.graph.tactics.tuning import device_key

    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr((trine.__version__, device_key(), sorted(options.items()))).encode())
    files = [options["calibration"]] if "calibration" in options else []
    for file in [*sorted(file for file in path.parent.iterdir() if file.is_file()), *files]:
        digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
