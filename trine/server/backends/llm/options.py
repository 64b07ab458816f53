"""A model's `parameters` as options of the engine, under Trine's names and those of TensorRT-LLM's templates."""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trine.core.errors import ConfigurationError, ModelLoadError
from trine.core.sizes import parse_size
from trine.llm.options import EngineOptions

logger = logging.getLogger("trine.server")

ModelConfig = Any

MODEL_KEYS = ("model", "gpt_model_path", "engine_dir", "model_path")
_ALIASES = {"tokenizer_dir": "tokenizer", "enable_kv_cache_reuse": "enable_prefix_caching"}
_OWN = {"exclude_input_in_output"}
_BYTES = {"cache_bytes"}


def engine_options(config: ModelConfig, version_directory: Path) -> dict[str, Any]:
    """Keyword arguments of `AsyncLLM`.

    The model is the parameter `model` (a directory, a hub name, "tiny"), or the checkpoint in the version's directory.
    Parameters left as `${name}` by a template count as not given. Raises ConfigurationError, ModelLoadError.
    """
    given = parameters_of(config)
    known = {field.name: field for field in fields(EngineOptions)}
    options: dict[str, Any] = {"model": _model(config, given, version_directory)}
    for key, text in given.items():
        name = _ALIASES.get(key, key)
        if name in known and name != "model":
            options[name] = _value(config, key, text, known[name].type, is_size=name in _BYTES)
        elif key not in (*MODEL_KEYS, *_OWN):
            _unknown(config, key, [*known, *_ALIASES, *_OWN])
    return options


def parameters_of(config: ModelConfig) -> dict[str, str]:
    """The parameters that are given: templates leave the others empty or as `${name}`."""
    found = {key: value.string_value for key, value in config.parameters.items()}
    return {key: text for key, text in found.items() if text and not (text.startswith("${") and text.endswith("}"))}


def _model(config: ModelConfig, given: dict[str, str], version_directory: Path) -> str:
    model = next((given[key] for key in MODEL_KEYS if key in given), None)
    if model is None:
        if not (version_directory / "config.json").exists():
            raise ModelLoadError(
                f"model '{config.name}': no checkpoint: set the parameter `model` to a directory, a hub name or tiny, "
                f"or put config.json, the weights and the tokenizer into {version_directory}"
            )
        model = str(version_directory)
    _refuse_engine(config, Path(model))
    return model


def _refuse_engine(config: ModelConfig, directory: Path) -> None:
    """TensorRT-LLM's compiled engines hold no weights that others can read."""
    try:
        content = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return
    if isinstance(content, dict) and "pretrained_config" in content and "architectures" not in content:
        raise ModelLoadError(
            f"model '{config.name}': {directory} is a TensorRT-LLM engine, compiled for one GPU: give the Hugging Face "
            "checkpoint that it was made of; nothing has to be built here"
        )


def _value(config: ModelConfig, key: str, text: str, annotation: Any, *, is_size: bool) -> Any:
    """`text` as the option's type."""
    if is_size:
        return parse_size(text, name=key)
    kinds = _kinds(annotation)
    if bool in kinds:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigurationError(f"model '{config.name}': parameter {key}={text!r}: expected true or false")
        return text.lower() in ("true", "1")
    if int in kinds:
        try:
            return int(text)
        except ValueError:
            raise ConfigurationError(f"model '{config.name}': parameter {key}={text!r}: expected an integer") from None
    return text


def _kinds(annotation: Any) -> set[type]:
    """Which of bool and int an option's annotation, a string such as "int | None", names."""
    words = str(annotation).replace("|", " ").split()
    return {kind for kind in (bool, int) if kind.__name__ in words}


def _unknown(config: ModelConfig, key: str, known: list[str]) -> None:
    """TensorRT-LLM's templates set much that does not apply here; elsewhere a strange name is a mistake."""
    if config.backend != "llm":
        logger.info("model %s: parameter %s has no effect here", config.name, key)
        return
    close = get_close_matches(key, known, 1)
    hint = f": did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"
    raise ConfigurationError(f"model '{config.name}': the engine has no parameter {key}{hint}")
