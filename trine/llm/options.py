"""What a user can set about an engine. Everything has a default that is fast and safe on the machine at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from trine.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of `LLM` and `AsyncLLM`; None means: chosen from the model and the machine.

    model: directory, hub name, or "tiny". dtype: auto (the checkpoint's), float32, bfloat16, float16. device: auto,
    cpu, cuda. max_model_len: tokens of prompt and output of one sequence. max_num_seqs: sequences that run at once.
    max_num_batched_tokens: tokens computed in one step. max_waiting: sequences queued beyond the running ones before
    new ones are refused. cache_bytes: memory for keys and values. block_size: tokens a cache block (16 on a CPU, 64 on
    a GPU, where a block is one request to memory). quantization: None (what the checkpoint holds), int8 (weights only,
    on a CPU) or fp8 (weights and activations). cache_dtype: of keys and values, auto (the model's) or fp8, which holds
    twice as many. load_format: auto, or dummy for random weights from config.json alone. async_loop: plan a step while
    the last one is computed. threads: CPU threads that compute. seed: makes the seeds of requests without one
    reproducible.
    """

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_waiting: int = 1024
    cache_bytes: int | None = None
    block_size: int | None = None
    enable_prefix_caching: bool = True
    quantization: Literal["int8", "fp8"] | None = None
    cache_dtype: Literal["auto", "fp8"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    async_loop: bool = True
    threads: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self._among("dtype", ("auto", "float32", "bfloat16", "float16"))
        self._among("device", ("auto", "cpu", "cuda"))
        self._among("load_format", ("auto", "dummy"))
        self._among("quantization", (None, "int8", "fp8"))
        self._among("cache_dtype", ("auto", "fp8"))
        for name, least in (
            ("max_model_len", 2),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_waiting", 0),
            ("cache_bytes", 1),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"{name}={value!r} is too small: give at least {least}", param=name)
        size = self.block_size
        if size is not None and (size < 8 or size & (size - 1)):
            raise ConfigurationError(
                f"block_size={size}: give a power of two from 8 on, or leave it out", param="block_size"
            )

    def _among(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            expected = ", ".join(str(choice) for choice in allowed)
            raise ConfigurationError(f"{name}={value!r} is unknown: give one of {expected}", param=name)


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, cut by the control group's quota if there is one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            cpus = min(cpus, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cpus
