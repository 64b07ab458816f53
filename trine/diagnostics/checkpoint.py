"""A model directory: is everything there, is it sound, is it supported, does it fit?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trine.core.errors import TrineError
from trine.core.machine import memory_bytes
from trine.core.sizes import format_bytes
from trine.diagnostics.findings import Finding, Severity

if TYPE_CHECKING:
    from trine.llm.config import ModelConfig

_SECTION = "model"


def examine_model(name: str) -> Iterator[Finding]:
    """What would keep the model from being served. Reads headers, not weights."""
    from trine.llm.config import ModelConfig
    from trine.llm.loading import resolve_model

    try:
        directory = resolve_model(name)
        yield _found("directory", str(directory))
        config = ModelConfig.from_directory(directory)
    except TrineError as error:
        yield _failed("config", error)
        return
    yield from _architecture(config)
    yield from _weights(directory, config)
    yield from _tokenizer(directory, config)


def _found(name: str, detail: str) -> Finding:
    return Finding(_SECTION, name, "ok", detail)


def _failed(name: str, error: TrineError, severity: Severity = "problem") -> Finding:
    """Trine's errors carry their remedy after the last colon; it stays in the sentence."""
    return Finding(_SECTION, name, severity, error.message)


def _architecture(config: ModelConfig) -> Iterator[Finding]:
    from trine.llm.models import ENCODERS, decoder_class, encoder_class
    from trine.llm.quantization import is_fp8_checkpoint

    try:
        _ = (
            encoder_class(config.architecture)
            if config.architecture in ENCODERS
            else decoder_class(config.architecture)
        )
    except TrineError as error:
        yield _failed("architecture", error)
        return
    kind = "embeddings" if config.architecture in ENCODERS else "text"
    heads = f"{config.num_heads} heads ({config.num_kv_heads} for keys and values)"
    shape = f"{config.num_layers} layers of {config.hidden_size}, {heads}"
    yield _found(
        "architecture",
        f"{config.architecture} ({kind}): {shape}, vocabulary {config.vocab_size:,}, context {config.max_model_len:,}",
    )
    method = config.hf.get("quantization_config", {}).get("quant_method")
    if method and not is_fp8_checkpoint(config.hf["quantization_config"]):
        yield Finding(
            _SECTION,
            "quantization",
            "problem",
            f"the weights are stored in {method}, which is not supported",
            "take the original checkpoint; --quantization int8 makes it small",
        )


def _weights(directory: Path, config: ModelConfig) -> Iterator[Finding]:
    from trine.llm.checkpoint import Checkpoint

    try:
        checkpoint = Checkpoint(directory)
    except TrineError as error:
        yield _failed("weights", error)
        return
    stored = sum(file.stat().st_size for file in checkpoint.files)
    count = len(checkpoint.files)
    dtype = str(config.dtype).removeprefix("torch.")
    yield _found(
        "weights",
        f"{len(checkpoint.tensors)} tensors in {count} file{'s' if count > 1 else ''}, {format_bytes(stored)}, {dtype}",
    )
    yield _fit(stored, config)


def _fit(stored: int, config: ModelConfig) -> Finding:
    """Weights and one whole context against the memory there is; the engine plans the rest at start."""
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * config.dtype.itemsize
    whole = token * config.max_model_len
    _, available = memory_bytes()
    device = "main memory"
    gpu = _free_gpu_bytes()
    if gpu is not None:
        available, device = gpu, "GPU memory"
    cache = f"{format_bytes(token)} of cache a token ({format_bytes(whole)} for a whole context)"
    detail = f"{format_bytes(stored)} of weights + {cache}; {format_bytes(available)} of {device} available"
    if stored > available:
        return Finding(
            _SECTION,
            "memory",
            "problem",
            detail,
            "free memory, take a smaller model, or try --quantization int8 (half of bfloat16)",
        )
    if stored + whole > available:
        longest = max(0, (available - stored) // token)
        return Finding(
            _SECTION,
            "memory",
            "warning",
            detail,
            f"the context will be shortened: at most --max-model-len {longest} fits",
        )
    return _found("memory", detail)


def _free_gpu_bytes() -> int | None:
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def _tokenizer(directory: Path, config: ModelConfig) -> Iterator[Finding]:
    from trine.llm.models import ENCODERS
    from trine.llm.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_directory(directory)
    except TrineError as error:
        yield _failed("tokenizer", error)
        return
    if tokenizer.vocab_size > config.vocab_size:
        yield Finding(
            _SECTION,
            "tokenizer",
            "problem",
            f"it has {tokenizer.vocab_size} tokens, the model {config.vocab_size}",
            "the files are of different models: download the checkpoint again",
        )
        return
    yield _found("tokenizer", f"{tokenizer.vocab_size:,} tokens")
    if config.architecture in ENCODERS:
        return
    if not tokenizer.has_chat_template:
        yield Finding(
            _SECTION,
            "chat template",
            "note",
            "none: /v1/completions works, chat does not",
            "give one with --chat-template FILE",
        )
    else:
        yield from _chat_template(tokenizer)


def _chat_template(tokenizer: object) -> Iterator[Finding]:
    try:
        tokenizer.render_chat([{"role": "user", "content": "Hello"}])  # type: ignore[attr-defined]
    except TrineError as error:
        yield _failed("chat template", error, "warning")
    else:
        yield _found("chat template", "renders a user's turn")
