"""From a name or a directory to a model with weights."""

from __future__ import annotations

import ctypes
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from trine.core.errors import ModelLoadError
from trine.llm.checkpoint import Checkpoint, StoredTensor, few
from trine.llm.config import ModelConfig, read_json
from trine.llm.layers.module import WeightedModule, WeightKey
from trine.llm.models import ENCODERS, decoder_class
from trine.llm.models.base import Build, CausalLM, CheckpointNames
from trine.llm.quantization import is_fp8_checkpoint, linear_method, stored_method

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only

EMBEDDED = ("tiny",)
POOL = 1_048_573
HUB_DUPLICATES = ["consolidated*", "original/*", "onnx/*", "openvino/*"]  # the same weights for other tools
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "1_Pooling/*"]


def resolve_model(name_or_dir: str | Path) -> Path:
    """The directory of a model: an embedded one ("tiny"), a directory, or a name on the Hugging Face hub.

    A hub model is downloaded to the hub client's cache. Raises ModelLoadError when there is no such model or network.
    """
    name = str(name_or_dir)
    if name in EMBEDDED:
        directory = Path(str(resources.files("trine"))) / "data" / name
        if not (directory / "config.json").exists():
            raise ModelLoadError(
                f"the embedded model {name!r} is missing from this installation ({directory}): reinstall"
            )
        return directory
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"{path} is a file: give the directory that holds config.json and the weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelLoadError(f"there is no directory {path}: check the path")
    return _download(name)


def is_encoder(name_or_dir: str | Path) -> bool:
    """Whether a model computes embeddings, by config.json, which alone is downloaded for it. Raises ModelLoadError."""
    name = str(name_or_dir)
    local = name in EMBEDDED or Path(name).expanduser().exists()
    directory = resolve_model(name) if local else _download(name, ["config.json"])
    config = read_json(directory / "config.json") or {}
    return bool(set(config.get("architectures") or ()) & set(ENCODERS))


def _download(name: str, patterns: list[str] = HUB_FILES) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelLoadError(
            f"{name!r} is not a directory here, and huggingface_hub, which downloads models, is not installed: "
            "pip install huggingface_hub, or give a directory"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=HUB_DUPLICATES))
    except Exception as error:  # the client raises many kinds: no such name, no access, no network
        reason = str(error).strip().splitlines()[0]
        raise ModelLoadError(
            f"{name!r} is neither a directory here nor a model that the Hugging Face hub gives us ({reason}). "
            "Check the spelling and the network, log in with `hf auth login` for a gated model, "
            "or give a local directory, or `tiny`"
        ) from error


def load_model(
    directory: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None = None,
    cache_dtype: torch.dtype | None = None,
    load_format: str = "auto",
    max_model_len: int | None = None,
    config: ModelConfig | None = None,
) -> tuple[CausalLM, ModelConfig]:
    """The model of a checkpoint directory, and its configuration.

    load_format "dummy" needs config.json only and draws random weights. `max_model_len` is the longest context that
    will be served (default: all that the checkpoint allows): tables of positions have that length. A checkpoint in
    float8 is used as it is unless `quantization` says otherwise. `cache_dtype` is that of keys and values, by default
    `dtype`; `config` is the directory's unless given. Raises ModelLoadError naming the file, tensor or key that is
    wrong.
    """
    directory = Path(directory)
    config = config or ModelConfig.from_directory(directory)
    stored = config.hf.get("quantization_config")
    if stored and not is_fp8_checkpoint(stored):
        raise ModelLoadError(
            f"{directory} holds weights quantised by {stored.get('quant_method', 'unknown')!r}, which is not "
            "supported: take one in float8, or the original, with quantization='int8' if it has to be small"
        )
    if stored and quantization is None:
        method = stored_method(device, load_format == "dummy")
    else:
        method = linear_method(quantization, device)
    build = Build(device, dtype, method, max_model_len or config.max_model_len, cache_dtype)
    model = decoder_class(config.architecture)(config, build).eval()
    if load_format == "dummy":
        fill_random(model, device)
    else:
        names = model.names.ignoring("^lm_head\\.") if config.tie_word_embeddings else model.names
        load_weights(model, Checkpoint(directory), names, device)
    return model, config


def weight_bytes(model: nn.Module) -> int:
    """Memory that the model's weights take, packed as they are."""
    return sum(module.weight_bytes() for module in model.modules() if isinstance(module, WeightedModule))


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Checkpoint, names: CheckpointNames, device: torch.device) -> None:
    """Stream a checkpoint into a model. Everything is checked before anything is read.

    A layer is allocated at its first tensor and packed at its last, so that memory peaks at the packed model and the
    layers that are half-way. Raises ModelLoadError for tensors missing, left over or of the wrong shape.
    """
    modules = {path: module for path, module in model.named_modules() if isinstance(module, WeightedModule)}
    places = _match(modules, checkpoint, names)
    waiting: dict[str, set[WeightKey]] = {}
    for path, key in places.values():
        waiting.setdefault(path, set()).add(key)
    started: set[str] = set()
    for stored, tensor in checkpoint.stream():
        if stored.name not in places:
            continue
        path, key = places[stored.name]
        module = modules[path]
        if path not in started:
            module.create_weights(device)
            started.add(path)
        module.load_weight(key, tensor)
        waiting[path].remove(key)
        if not waiting[path]:
            finish_weights(module)


def finish_weights(module: WeightedModule) -> None:
    """Pack a layer whose weights are all there, and give the memory of what was packed back to the system.

    Without the last, the C library keeps most of it: small weights that stay break its free blocks up.
    """
    module.process_weights()
    if module.weight_bytes() > 1 << 20 and _malloc_trim is not None:
        _malloc_trim(0)


def _match(
    modules: dict[str, WeightedModule], checkpoint: Checkpoint, names: CheckpointNames
) -> dict[str, tuple[str, WeightKey]]:
    """Where each tensor goes, by its name."""
    expected = {
        (path, key): shape for path, module in modules.items() for key, shape in module.expected_weights().items()
    }
    places: dict[str, tuple[str, WeightKey]] = {}
    unused: list[str] = []
    for stored in checkpoint.tensors.values():
        place = names.resolve(stored.name)
        if place is None:
            continue
        if place[0] in modules and place[1] in modules[place[0]].optional_weights():
            places[stored.name] = place
            continue
        if place not in expected:
            unused.append(f"{stored.name} ({stored.file.name})")
            continue
        _check_shape(stored, expected[place])
        places[stored.name] = place
    missing = [names.describe(*place) for place in expected.keys() - set(places.values())]
    if missing:
        files = ", ".join(file.name for file in checkpoint.files[:2])
        raise ModelLoadError(
            f"weights missing from {checkpoint.files[0].parent} ({files}…): {few(sorted(missing))}; "
            "config.json asks for them. Is the download complete, and does config.json belong to it?"
        )
    if unused:
        raise ModelLoadError(
            f"weights in {checkpoint.files[0].parent} that this model has no place for: {few(sorted(unused))}. "
            "Does config.json belong to these weights?"
        )
    return places


def _check_shape(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise ModelLoadError(
            f"{stored.name} in {stored.file} has shape {list(stored.shape)}, expected {list(shape)} by config.json. "
            "Does config.json belong to these weights?"
        )


@torch.no_grad()
def fill_random(model: nn.Module, device: torch.device, seed: int = 0) -> None:
    """Random weights for measurements and tests: normal with deviation 0.02, norms 1, biases 0, the same every time."""
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, WeightedModule):
            continue
        module.create_weights(device)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name == "bias" else 1.0)
            else:
                _fill_normal(parameter, generator)
        finish_weights(module)


def _fill_normal(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Normal numbers, repeated from a pool: drawing billions one by one takes minutes.

    The pool's size is a prime larger than a vocabulary, so that no two rows of a matrix are equal.
    """
    flat = parameter.view(-1)
    pool = torch.empty(min(POOL, flat.numel()), dtype=torch.float32, device=flat.device)
    pool = pool.normal_(0.0, 0.02, generator=generator).to(flat.dtype)
    whole = flat.numel() // pool.numel() * pool.numel()
    flat[:whole].view(-1, pool.numel()).copy_(pool.expand(whole // pool.numel(), -1))
    flat[whole:].copy_(pool[: flat.numel() - whole])
