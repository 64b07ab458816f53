"""What a configuration leaves out: back end from the files, then the defaults that Triton's clients see filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trine.server.proto import pb

ModelConfig = Any

ENSEMBLE = "ensemble"
DEFAULT_SEQUENCE_IDLE_US = 1_000_000
DEFAULT_MAX_BATCH_SIZE = 4

PLATFORM_BACKENDS = {
    "onnxruntime_onnx": "onnxruntime",
    "pytorch_libtorch": "pytorch",
    "torch_aoti": "pytorch",
    "tensorrt_plan": "tensorrt",
    "tensorflow_graphdef": "tensorflow",
    "tensorflow_savedmodel": "tensorflow",
}
BACKEND_PLATFORMS = {
    "onnxruntime": "onnxruntime_onnx",
    "pytorch": "pytorch_libtorch",
    "tensorrt": "tensorrt_plan",
}
DEFAULT_FILES = {
    "onnxruntime": "model.onnx",
    "pytorch": "model.pt",
    "tensorrt": "model.plan",
    "plan": "model.plan",
    "openvino": "model.xml",
    "python": "model.py",
}
"""Back end to the file that a version directory holds unless `default_model_filename` names another."""

_FILE_BACKENDS = {
    "model.onnx": "onnxruntime",
    "model.pt": "pytorch",
    "model.pt2": "pytorch",
    "model.plan": "tensorrt",
    "model.xml": "openvino",
    "model.py": "python",
    "model.graphdef": "tensorflow",
    "model.savedmodel": "tensorflow",
}
TWO_CPU_INSTANCES = ("onnxruntime", "tensorflow")


def fill_backend(config: ModelConfig, name: str, version_directory: Path | None) -> None:
    """Name, back end, platform and model file, from each other, from the files and from the directory's name."""
    if not config.name:
        config.name = name
    if config.HasField("ensemble_scheduling") and not config.platform and not config.backend:
        config.platform = ENSEMBLE
    if config.platform == ENSEMBLE:
        return
    if not config.backend and config.platform:
        config.backend = PLATFORM_BACKENDS.get(config.platform, "")
    if not config.backend:
        config.backend = _backend_from_files(config, name, version_directory)
    if not config.platform:
        config.platform = BACKEND_PLATFORMS.get(config.backend, "")
    if not config.default_model_filename and config.backend in DEFAULT_FILES:
        config.default_model_filename = _model_file(config.backend, version_directory)


def _backend_from_files(config: ModelConfig, name: str, version_directory: Path | None) -> str:
    if config.default_model_filename in _FILE_BACKENDS:
        return _FILE_BACKENDS[config.default_model_filename]
    if version_directory is not None:
        for file, backend in _FILE_BACKENDS.items():
            if (version_directory / file).exists():
                return backend
    stem, _, suffix = name.rpartition(".")
    return suffix if stem else ""


def _model_file(backend: str, version_directory: Path | None) -> str:
    """The back end's default file, or another that it reads and that is there instead."""
    default = DEFAULT_FILES[backend]
    if version_directory is not None and not (version_directory / default).exists():
        for file, owner in _FILE_BACKENDS.items():
            if owner == backend and (version_directory / file).exists():
                return file
    return default


def complete_config(
    config: ModelConfig,
    *,
    gpus: int = 0,
    auto_complete: Callable[[ModelConfig], None] | None = None,
    settings: Mapping[str, str] | None = None,
) -> None:
    """Fill every default, in place. `auto_complete` is the back end's own part, from the model's files."""
    _drop_repeated(config)
    if auto_complete is not None and config.platform != ENSEMBLE:
        auto_complete(config)
    policy = config.version_policy
    if not (policy.HasField("all") or policy.HasField("specific")) and not policy.latest.num_versions:
        policy.latest.num_versions = 1
    _complete_batching(config)
    if config.platform == ENSEMBLE:
        return
    config.optimization.input_pinned_memory.enable = _enabled(config.optimization, "input_pinned_memory")
    config.optimization.output_pinned_memory.enable = _enabled(config.optimization, "output_pinned_memory")
    _complete_instances(config, gpus)


def default_max_batch_size(settings: Mapping[str, str]) -> int:
    """The batch limit given to auto-completed models that batch: `--backend-config=default-max-batch-size=N`."""
    return int(settings.get("default-max-batch-size", DEFAULT_MAX_BATCH_SIZE))


def _drop_repeated(config: ModelConfig) -> None:
    """A tensor that is declared again word for word, as in templates that are in use, counts once."""
    for tensors in (config.input, config.output):
        for index in range(len(tensors) - 1, 0, -1):
            if tensors[index] in tensors[:index]:
                del tensors[index]


def _enabled(optimization: Any, field: str) -> bool:
    return bool(getattr(optimization, field).enable) if optimization.HasField(field) else True


def _complete_batching(config: ModelConfig) -> None:
    batches = config.max_batch_size > 0
    if config.HasField("dynamic_batching") and not config.dynamic_batching.preferred_batch_size and batches:
        config.dynamic_batching.preferred_batch_size.append(config.max_batch_size)
    if config.HasField("sequence_batching"):
        sequence = config.sequence_batching
        sequence.max_sequence_idle_microseconds = sequence.max_sequence_idle_microseconds or DEFAULT_SEQUENCE_IDLE_US
        if sequence.HasField("oldest") and not sequence.oldest.preferred_batch_size and batches:
            sequence.oldest.preferred_batch_size.append(config.max_batch_size)


def _complete_instances(config: ModelConfig, gpus: int) -> None:
    kinds = pb.ModelInstanceGroup.Kind
    single = not config.instance_group
    if single:
        config.instance_group.add(name=config.name)
    for index, group in enumerate(config.instance_group):
        if not group.name:
            group.name = f"{config.name}_{index}"
        if group.kind == kinds.Value("KIND_AUTO"):
            on_gpu = gpus > 0 and all(device < gpus for device in group.gpus)
            group.kind = kinds.Value("KIND_GPU" if on_gpu else "KIND_CPU")
        if group.count < 1:
            on_cpu = group.kind == kinds.Value("KIND_CPU")
            group.count = 2 if on_cpu and config.backend in TWO_CPU_INSTANCES else 1
        if group.kind == kinds.Value("KIND_GPU") and not group.gpus:
            group.gpus.extend(range(gpus))
