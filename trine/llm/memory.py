"""How much memory there is, and how it is shared out between weights, activations and cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trine.core.errors import InsufficientMemoryError
from trine.core.sizes import format_bytes
from trine.llm.batch import CacheSpec

CPU_SHARE = 0.4
"""Of the memory that is available on a CPU after loading, for the cache: the rest belongs to the user's other
programs."""

GPU_SHARE = 0.92
"""Of a GPU's whole memory, for weights, activations and cache together: the driver and the graphs need the rest."""


@dataclass(frozen=True, slots=True)
class CachePlan:
    """num_blocks blocks (the scratch block included) of block_bytes each, so that max_model_len tokens fit."""

    num_blocks: int
    block_bytes: int
    max_model_len: int

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of main memory within the control group's limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - GPU_SHARE) * total)
    available = _meminfo("MemAvailable")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, limit - used)
    except (OSError, ValueError):
        pass  # no control group, or "max": no limit
    return available


def _meminfo(key: str) -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise InsufficientMemoryError(f"/proc/meminfo has no {key}: give --cache-memory")


def check_weights_fit(directory: Path, device: torch.device, share: float = 1.0) -> None:
    """InsufficientMemoryError before anything is loaded, rather than the kernel's SIGKILL in the middle.

    `share` of what the files hold stays in memory: layers are rounded one by one as they come.
    """
    needed = int(share * sum(file.stat().st_size for file in directory.glob("*.safetensors")))
    available = available_bytes(device)
    if needed > available:
        raise InsufficientMemoryError(
            f"the weights in {directory} take {format_bytes(needed)}, but only {format_bytes(available)} of "
            f"{'GPU' if device.type == 'cuda' else 'main'} memory are free: free some, or use a smaller model or "
            f"--quantization {'fp8' if device.type == 'cuda' else 'int8'}"
        )


def activation_bytes(num_tokens: int, num_seqs: int, hidden_size: int, intermediate_size: int, vocab_size: int) -> int:
    """Upper estimate of a step's temporaries: a few copies of the widest layer's rows, and float32 logits thrice."""
    return num_tokens * (8 * hidden_size + 4 * intermediate_size) * 4 + 3 * num_seqs * vocab_size * 4


def plan_cache(
    specs: Sequence[CacheSpec],
    *,
    device: torch.device,
    block_size: int,
    max_model_len: int,
    max_model_len_given: bool,
    max_num_seqs: int,
    cache_bytes: int | None,
    reserved_bytes: int,
) -> CachePlan:
    """Number of blocks: what was asked for, else what fits, but never more than max_num_seqs whole contexts.

    A context that does not fit is shortened when it is the model's own maximum, an error when the user asked for it.
    """
    block_bytes = block_size * sum(spec.bytes_per_token for spec in specs)
    if cache_bytes is None:
        share = 1.0 if device.type == "cuda" else CPU_SHARE
        budget = int(share * (available_bytes(device) - reserved_bytes))
        enough = (max_num_seqs * -(-max_model_len // block_size) + 1) * block_bytes
        budget = min(budget, enough)
    else:
        budget = cache_bytes
        available = available_bytes(device)
        if budget > available:
            raise InsufficientMemoryError(
                f"cache memory {format_bytes(budget)} was asked for, but only {format_bytes(available)} are free: "
                "lower --cache-memory"
            )
    num_blocks = budget // block_bytes
    longest = (num_blocks - 1) * block_size
    if longest < max_model_len:
        needed = format_bytes((-(-max_model_len // block_size) + 1) * block_bytes)
        if max_model_len_given or longest < min(256, max_model_len):
            raise InsufficientMemoryError(
                f"a context of {max_model_len} tokens needs {needed} of cache, but there are "
                f"{format_bytes(max(0, budget))}: lower --max-model-len, or give more with --cache-memory"
            )
        max_model_len = longest
    return CachePlan(num_blocks, block_bytes, max_model_len)
